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


def test_a_peer_measured_between_counts_by_the_mean_around_the_program():
    rates = iter([10, 40, 30, 8, 2])  # peer, ours, peer, ours, peer
    names = []

    def measure(name):
        names.append(name)
        return dict(rate=next(rates), other_seconds=0)

    found = speed.take_turns(["peer", "ours"], "peer", 2, measure, between=True)
    assert names == ["peer", "ours", "peer", "ours", "peer"]
    assert [(run["rate"], beside) for run, beside in found["ours"]] == [(40, 20), (8, 16)]
    assert speed.summarise(found["ours"], "x")["ratio"] == 1.25
    assert speed.summarise(found["peer"], "x")["x"] == 18


def test_metrics_and_table(tmp_path):
    (tmp_path / "run").mkdir()
    rows = [f"{i * 1000},500,{i},{3 * i},{i}" for i in range(1, 5)]
    header = "step,charts/SPS,time/simulation,time/rollout,time/update"
    (tmp_path / "run" / "metrics.csv").write_text("\n".join([header, *rows]) + "\n")
    pair = speed.PAIRS["atari"]
    points, phases = speed.read_metrics(tmp_path, pair)
    assert points == [(0, 0), (1000, 2), (2000, 4), (3000, 6), (4000, 8)]
    assert phases == dict(simulation=3.5, acting=7, update=3.5)
    row = dict(program="x", steps_per_second=500, ratio=2, ratio_min=1, ratio_max=3, other_seconds=4) | phases
    head, _, line = speed.table([row], pair).splitlines()
    assert head == "| program | steps/s | times SB3 (min to max) | simulation | acting | update | start-up and end, s |"
    assert line == "| `x` | 500 | 2.00 (1.00 to 3.00) | 3.50 | 7.00 | 3.50 | 4 |"


def test_extra_flags_may_start_with_dashes():
    words = ["--pair", "continuous", "--extra-flags", "--no-compile --gamma 0.9"]
    assert speed.join_extra_flags(words) == ["--pair", "continuous", "--extra-flags=--no-compile --gamma 0.9"]
