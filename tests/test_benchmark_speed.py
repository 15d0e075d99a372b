"""The arithmetic of benchmark/speed.py on made-up measurements."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmark"))
import speed


def test_the_steady_rate_leaves_out_the_warm_up():
    points = [(0, 100), (10, 150), (20, 152), (40, 156)]  # the first iteration compiles for 48 seconds
    assert speed.steady_rate(points, 1) == 5 and speed.steady_rate(points, 2) == 5
    assert speed.steady_rate(points, 0) == pytest.approx(40 / 56)


def test_ratios_are_to_the_peer_of_the_same_round():
    rates = iter([30, 10, 60, 30, 10, 2])  # a twice as slow machine must not count
    found = speed.take_turns(["ours", "peer"], "peer", 3, lambda _: dict(rate=next(rates), other_seconds=1))
    row = speed.summarise(found["ours"], "steps_per_second")
    assert row == dict(steps_per_second=30, ratio=3, ratio_min=2, ratio_max=5, other_seconds=1)
    assert speed.summarise(found["peer"], "x")["ratio_max"] == 1


def test_metrics_and_table(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.csv").write_text("step,charts/SPS\n1000,500\n2000,500\n3000,500\n4000,500\n")
    pair = speed.PAIRS["atari"]
    assert speed.read_metrics(tmp_path, pair) == [(0, 0), (1000, 2), (2000, 4), (3000, 6), (4000, 8)]
    row = dict(env_id="Pong-v5", cores=1, program="x", steps_per_second=500, ratio=2, ratio_min=1, ratio_max=3)
    row["other_seconds"] = 4
    head, _, line = speed.table([row], pair).splitlines()
    assert head == "| env_id | cores | program | steps/s | times SB3 (min to max) | start-up and end, s |"
    assert line == "| Pong-v5 | 1 | `x` | 500 | 2.00 (1.00 to 3.00) | 4 |"
