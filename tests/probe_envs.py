"""Tiny Gymnasium tasks whose right answers are known. Importing this module registers them."""

import time

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


class Small(Probe):
    def reward(self, action):
        return 0.01


class Skewed(Probe):
    """Whatever the action: 0 with probability 0.7, else 10. Its mean is 3, its median 0."""

    def reward(self, action):
        return 10.0 * (self.np_random.random() < 0.3)


class Target(Probe):
    """Best action: 0.5, a tenth of the way from the middle to the bound."""

    action_space = gym.spaces.Box(-5, 5, (1,), np.float32)

    def reward(self, action):
        return -((action - 0.5) ** 2)


class Inner(Probe):
    """Bounds that are not symmetric; the best action, 0.3, is 0.4 below the middle in units of half the width."""

    action_space = gym.spaces.Box(0, 1, (1,), np.float32)

    def reward(self, action):
        return -((action - 0.3) ** 2)


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


class PayingResets(gym.vector.VectorWrapper):
    """Pays a million for the step that only resets the simulator."""

    done = False

    def step(self, actions):
        obs, rewards, terminated, truncated, infos = super().step(actions)
        rewards, self.done = rewards + 1e6 * self.done, terminated | truncated
        return obs, rewards, terminated, truncated, infos


class Breaking(Endless):
    """From this many steps on, an environment's rewards and observations are what the subclass says."""

    made, broken_after, broken_reward, broken_observation = 0, 300, 1.0, 0.0

    def step(self, action):
        self.made += 1
        return super().step(action)

    def observe(self):
        broken = self.made > self.broken_after
        return np.full(1, self.broken_observation if broken else 0, self.observation_space.dtype)

    def reward(self, action):
        return self.broken_reward if self.made > self.broken_after else 1.0


class NanReward(Breaking):
    broken_reward = np.nan


class HugeReward(Breaking):
    broken_reward = 1e39


class NanObservation(Breaking):
    broken_observation = np.nan


class NanReset(Endless):
    def observe(self):
        return np.full(1, np.nan, np.float32)


class HugeObservation(Breaking):
    """Finite, but not in float32."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float64)
    broken_observation = 1e39


class Sleepy(Breaking):
    """Takes a minute for every later step."""

    def reward(self, action):
        time.sleep(60 * (self.made > self.broken_after))
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


TASKS = [
    Probe,
    Small,
    Skewed,
    Target,
    Inner,
    Endless,
    Marked,
    NanReward,
    HugeReward,
    NanObservation,
    NanReset,
    HugeObservation,
]
for task in [*TASKS, Sleepy, Dictionary, Image, Choice]:
    gym.register(f"{task.__name__}-v0", entry_point=task, disable_env_checker=True)
