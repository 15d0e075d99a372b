"""EnvPool's bare simulator for benchmark/speed.py: prints (steps, time) at the start and after each iteration.

Random actions have the scripts' initial deviation; steps that only reset a robot are not counted.
"""

import json
import sys
import time

import envpool
import numpy as np

case = json.loads(sys.argv[1])
sizes = dict(num_envs=case["num_envs"], num_threads=case["cores"])
envs = envpool.make(case["env_id"], env_type="gymnasium", seed=1, **sizes)
actions = np.random.default_rng(1).normal(0, 0.35, (24, case["num_envs"], envs.action_space.shape[0])).clip(-1, 1)
envs.reset()
steps, points = 0, [(0, time.perf_counter())]
for _ in range(case["iterations"]):
    for action in actions:
        *_, info = envs.step(action)
        steps += int((info["elapsed_step"] > 0).sum())
    points.append((steps, time.perf_counter()))
print(json.dumps(points))
