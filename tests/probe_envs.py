"""Tiny Gymnasium tasks whose right answers are known. Importing this module registers them."""

import gymnasium as gym
import numpy as np


class Probe(gym.Env):
    """Observes 0 and ends every episode after one step; subclasses say what it pays."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observe(), {}

    def step(self, action):
        self.steps += 1
        terminated, truncated = self.end()
        return self.observe(), self.reward(float(action[0])), terminated, truncated, {}

    def observe(self):
        return np.zeros(1, np.float32)

    def reward(self, action):
        return 2.0

    def end(self):
        return True, False


class Skewed(Probe):
    """Whatever the action: 0 with probability 0.7, else 10. Its mean is 3, its median 0."""

    def reward(self, action):
        return 10.0 * (self.np_random.random() < 0.3)


class Target(Probe):
    """Best action: 0.5, well inside the bounds, which therefore clip next to no sample."""

    action_space = gym.spaces.Box(-5, 5, (1,), np.float32)

    def reward(self, action):
        return -((action - 0.5) ** 2)


class Endless(Probe):
    """Pays 1 forever and never terminates; a time limit cuts the episodes."""

    def reward(self, action):
        return 1.0

    def end(self):
        return False, self.steps == 5


class Marked(Probe):
    """Shows 1000 with the end of every episode and pays 3, 4, 5, ... The lengths of its episodes go 1, 4, 2, 7, 1, ...

    The final observation enters a rollout only with the dummy row that follows it, so a 1000 among the samples, or
    a statistic that is not that of the real rewards and observations, gives away a dummy row.
    """

    lengths = (1, 4, 2, 7)
    episode = -1

    def reset(self, *, seed=None, options=None):
        if seed is None:  # make_envs resets with a seed first: that episode is never played
            self.episode += 1
        return super().reset(seed=seed)

    def length(self):
        return self.lengths[self.episode % 4]

    def observe(self):
        return np.full(1, 1000 if self.steps == self.length() else self.steps + 1, np.float32)

    def reward(self, action):
        return 2.0 + self.steps

    def end(self):
        over = self.steps == self.length()
        return over and self.episode % 2 == 0, over and self.episode % 2 == 1


class Uneven(Probe):
    """Pays 1 a step; an episode lasts one step or nine, by chance."""

    def reset(self, *, seed=None, options=None):
        result = super().reset(seed=seed)
        self.length = int(self.np_random.choice([1, 9]))
        return result

    def reward(self, action):
        return 1.0

    def end(self):
        return self.steps == self.length, False


class BrokenReward(Endless):
    """The reward of every later step of an episode is NaN once this many steps were made in all."""

    made, broken_after = 0, 300

    def step(self, action):
        self.made += 1
        return super().step(action)

    def reward(self, action):
        return float("nan") if self.made > self.broken_after else 1.0


class BrokenObservation(BrokenReward):
    def observe(self):
        return np.full(1, np.nan if self.made > self.broken_after else 0, np.float32)

    def reward(self, action):
        return 1.0


class Dictionary(Probe):
    observation_space = gym.spaces.Dict(state=Probe.observation_space)

    def observe(self):
        return {"state": np.zeros(1, np.float32)}


class Image(Probe):
    observation_space = gym.spaces.Box(0, 255, (8, 8, 3), np.uint8)

    def observe(self):
        return np.zeros((8, 8, 3), np.uint8)


class Choice(Probe):
    action_space = gym.spaces.Discrete(3)


for task in (
    Probe,
    Skewed,
    Target,
    Endless,
    Marked,
    Uneven,
    BrokenReward,
    BrokenObservation,
    Dictionary,
    Image,
    Choice,
):
    gym.register(f"{task.__name__}-v0", entry_point=task, disable_env_checker=True)
