"""Stable-Baselines3's PPO for benchmark/speed.py: prints (steps, time) at the start and after each iteration."""

import json
import sys
import time

import gymnasium as gym
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.vec_env import VecFrameStack

case, points = json.loads(sys.argv[1]), []
gym.logger.min_level = gym.logger.ERROR  # old task versions are asked for on purpose
torch.set_num_threads(case["cores"])


class Clock(BaseCallback):
    def _on_step(self):
        return True

    def _on_rollout_start(self):
        points.append((self.num_timesteps, time.perf_counter()))

    _on_training_end = _on_rollout_start


if "hidden_size" in case:
    widths = [case["hidden_size"]] * 2
    policy, envs = "MlpPolicy", make_vec_env(case["env_id"], n_envs=4)
    settings = dict(n_steps=512, n_epochs=10, batch_size=case["minibatch_size"])
    settings["policy_kwargs"] = dict(net_arch=dict(pi=widths, vf=widths))
else:
    import ale_py  # noqa: F401 (registers the games)

    name = case["env_id"].replace("-v5", "NoFrameskip-v4")
    policy, envs = "CnnPolicy", VecFrameStack(make_atari_env(name, n_envs=8, seed=1), 4)
    settings = dict(n_steps=128, n_epochs=4, batch_size=256, gamma=0.98, learning_rate=2.5e-4, ent_coef=0.01)
steps = case["iterations"] * settings["n_steps"] * envs.num_envs
PPO(policy, envs, device="cpu", **settings).learn(steps, callback=Clock())
print(json.dumps(points))
