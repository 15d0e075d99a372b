"""Scripted simulators for every script, and tiny Gymnasium tasks, which importing this module registers."""

import time
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import torch
from common import ATARI, ROBOTS

# --- simulators of whatever a test needs

LENGTHS = (1, 4, 2, 7)


def one_step(e, k, action):
    """The best action is 0.5; of Atari's three, the third is worse."""
    return 7.0, 0.5 - (action - 0.5) ** 2, "terminated"


def marked(e, k, action):
    """Shows its step, pays 3, 4, 5, ...; lengths go 1, 4, 2, 7, 1, ...; it ends, is cut by a time limit, or both."""
    last = k + 1 == LENGTHS[e % 4]
    return k + 1.0, 3.0 + k, ("truncated", "terminated", "terminated, truncated")[e % 3] if last else ""


class Scripted:
    """N environments. episode(e, k, action) gives step k (from 0) of an environment's e-th episode: the observation
    before it, its reward, and how it ends: "terminated", "truncated", both, a lost "life" (Atari) or "".

    After an end the true last observation is `last`, and the next step, a dummy, resets and pays a million, which
    counts nowhere; or, with next_step=False, the next episode begins at once.
    """

    def __init__(self, num_envs, episode, next_step, last):
        self.episode, self.next_step, self.last = episode, next_step, last
        self.at, self.over = [[0, 0] for _ in range(num_envs)], [False] * num_envs

    def observe(self):
        return [self.last if over else self.episode(*at, 0)[0] for over, at in zip(self.over, self.at)]

    def step(self, actions):
        """Observations, rewards, and the ways in which episodes ended."""
        rewards, ends = [0.0] * len(self.at), [""] * len(self.at)
        for n, (e, k) in enumerate(self.at):
            if self.over[n]:
                self.over[n], rewards[n] = False, 1e6
                continue
            _, rewards[n], ends[n] = self.episode(e, k, actions[n])
            self.at[n] = [e + 1, 0] if ends[n] else [e, k + 1]
            self.over[n] = bool(ends[n]) and self.next_step
        return self.observe(), rewards, ends


def flags(ends, *names):
    return np.array([any(name in end for name in names) for end in ends])


def flat(envs):
    """As EnvPool and Gymnasium have tasks with flat observations."""

    def step(actions):
        obs, rewards, ends = envs.step(actions[:, 0])
        return np.float32(obs)[:, None], np.array(rewards), flags(ends, "terminated"), flags(ends, "truncated"), {}

    reset = lambda: (np.float32(envs.observe())[:, None], {})  # noqa: E731
    return SimpleNamespace(reset=reset, step=step, close=lambda: None)


def pictures(envs):
    """As EnvPool has Atari games: the observation is the brightness of the picture, or the picture."""

    def show(obs):
        return np.stack([np.broadcast_to(np.uint8(x), (4, 84, 84)) for x in obs])

    def step(actions):
        obs, rewards, ends = envs.step(actions)
        over = dict(reward=np.float32(rewards), terminated=flags(ends, "terminated").astype(np.int32))
        return show(obs), np.sign(over["reward"]), flags(ends, "terminated", "life"), flags(ends, "truncated"), over

    return SimpleNamespace(reset=lambda: (show(envs.observe()), {}), step=step, close=lambda: None)


def robots(envs):
    """As make_envs of the scripts for robots describes it; critics see half a unit more."""

    def show(obs, rewards):
        obs = torch.tensor(obs)[:, None]
        return obs, {"privileged": obs + 0.5, "logs": {"rewards/pay": torch.tensor(rewards).mean()}}

    def step(actions):
        obs, rewards, ends = envs.step(actions[:, 0].tolist())
        obs, info = show(obs, rewards)
        ends = [torch.from_numpy(flags(ends, name)) for name in ("terminated", "truncated")]
        return obs, torch.tensor(rewards), *ends, info

    calls = dict(reset=lambda **_: show(envs.observe(), [0.0]), step=step, close=lambda: None)
    return SimpleNamespace(**calls, next_step=envs.next_step, privileged_size=1)


def play(script, monkeypatch, episode, next_step=True):
    """Lets the script train on such episodes. The list that this returns receives the key of every simulator made."""
    keys, space = [], gym.spaces.Box(-np.inf, np.inf, (1,))
    adapter = pictures if script in ATARI else robots if script in ROBOTS else flat
    spaces = (
        (gym.spaces.Box(0, 255, (4, 84, 84), np.uint8), gym.spaces.Discrete(3)) if script in ATARI else (space,) * 2
    )

    def make_envs(args, num_envs, key, render=False):
        keys.append(key)
        return adapter(Scripted(num_envs, episode, next_step, 255.0 if script in ATARI else 1000.0)), *spaces

    monkeypatch.setattr(script, "make_envs", make_envs)
    return keys


# --- Gymnasium tasks


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
    NanReward,
    HugeReward,
    NanObservation,
    NanReset,
    HugeObservation,
]
for task in [*TASKS, Sleepy, Dictionary, Image, Choice]:
    gym.register(f"{task.__name__}-v0", entry_point=task, disable_env_checker=True)
