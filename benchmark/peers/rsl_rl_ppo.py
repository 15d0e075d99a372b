"""RSL-RL's PPO for benchmark/speed.py, with mjlab's settings for the task, but for the hidden layers and 24 steps.

Prints (steps, time) at the start of each iteration of the warm-up, all alike, after it, and at the end.
"""

import dataclasses
import json
import sys
import time

import mjlab.tasks  # noqa: F401 (registers the tasks)
from mjlab.envs import ManagerBasedRlEnv
from mjlab.rl import RslRlVecEnvWrapper
from mjlab.rl.runner import MjlabOnPolicyRunner
from mjlab.tasks.registry import load_env_cfg, load_rl_cfg
from mjlab.utils.torch import configure_torch_backends

case = json.loads(sys.argv[1])
configure_torch_backends()
env_cfg = load_env_cfg(case["env_id"])
env_cfg.scene.num_envs = case["num_envs"]
envs = RslRlVecEnvWrapper(ManagerBasedRlEnv(env_cfg, case["device"]))
cfg = load_rl_cfg(case["env_id"])
cfg.num_steps_per_env = 24
cfg.actor.hidden_dims = cfg.critic.hidden_dims = case["hidden_sizes"]
# Ours look for NaN once per iteration; RSL-RL would in every step, and wait for a GPU each time.
cfg = dataclasses.asdict(cfg) | {"check_for_nan": False}
runner = MjlabOnPolicyRunner(envs, cfg, None, case["device"])
warm_up, size = case["warm_up"], 24 * case["num_envs"]
runner.learn(warm_up, init_at_random_ep_len=True)
start = time.perf_counter()
runner.learn(case["iterations"] - warm_up)  # ends with the losses on the CPU
points = [(warm_up * size, start)] * (warm_up + 1) + [(case["iterations"] * size, time.perf_counter())]
print(json.dumps(points))
