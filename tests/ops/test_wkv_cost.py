"""Which CUDA kernel of wkv4 is chosen, and what the cost model in benchmarks/ predicts for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import wkv_cost as cost
from rwkv_train.ops.registration.wkv4 import CHUNK, segments_on

ROOT = Path(__file__).resolve().parents[2]
SHAPES = [(B, T, C) for B in (1, 2, 8, 32) for T in (64, 1024, 4096, 65536) for C in (64, 768, 1024, 2048, 5120)]


def test_which_kernel() -> None:
    assert segments_on(64, 1024, 4096, 132) == 0  # its channels fill the GPU
    assert segments_on(8, 1024, 2048, 132) == 1  # 256 blocks for 132 multiprocessors
    assert segments_on(1, 16384, 1024, 132) == 16  # 16 columns: two blocks each
    assert segments_on(1, 1023, 64, 132) == 1  # too short to cut
    assert segments_on(1, 262145, 64, 132) == 256  # no segment is shorter than 16 chunks


@pytest.mark.parametrize("gpu", [cost.A100, cost.H100])
def test_the_choice_is_near_the_best_that_the_model_knows(gpu: cost.Gpu) -> None:
    for shape in SHAPES:
        limit = max(1, shape[1] // 1024)
        others = [cost.predict(gpu, *shape, segments).seconds for segments in (0, *range(1, min(limit, 40) + 1))]
        assert cost.predict(gpu, *shape).seconds <= 1.35 * min(others), shape


def test_segments_cost_little_memory() -> None:
    """Saved states and scratch of the backward pass, in (B, T, C) float32 tensors: at most a sixteenth."""
    for B, T, C in SHAPES:
        segments = segments_on(B, T, C, 132)
        saved, scratch = 3 * ((T - 1) // CHUNK), 10 * segments if segments > 1 else 2
        assert (saved + scratch) / T <= 1 / 16, (B, T, C)


def test_cutting_time_pays() -> None:
    alone, cut = (cost.predict(cost.H100, 1, 16384, 1024, segments) for segments in (0, None))
    assert alone.seconds >= 5 * cut.seconds


def test_a_training_shape_is_near_the_bandwidth_floor() -> None:
    prediction = cost.predict(cost.H100, 8, 1024, 2048)
    assert prediction.seconds <= 1.6 * prediction.floor


def test_the_floor_and_what_bounds_it() -> None:
    for gpu in (cost.A100, cost.H100):
        for shape in SHAPES:
            prediction = cost.predict(gpu, *shape)
            assert prediction.seconds > prediction.floor
        double = cost.predict(gpu, 8, 65536, 4096).seconds / cost.predict(gpu, 8, 32768, 4096).seconds
        assert double == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("script", ["wkv_gpu.py", "gpu_step.py"])
def test_the_benchmarks_run_without_a_gpu(script: str) -> None:
    command = [sys.executable, ROOT / "benchmarks" / script, "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, env={"CUDA_VISIBLE_DEVICES": "", "PATH": ""})
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert "no GPU" in done.stdout.splitlines()[0]
    if script == "wkv_gpu.py":
        assert {row["card"] for row in last["wkv4"]} == {"A100 80GB", "H100 SXM"}
        assert all(row["predicted_ratio"] > 1 for row in last["wkv4"])


def test_make_gpu_names_what_is_missing() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "gpu.py"], capture_output=True, text=True, env={"CUDA_VISIBLE_DEVICES": ""}
    )
    assert done.returncode == 2
    assert done.stdout.startswith("make gpu needs a GPU: ")
    assert "make test-kernels" in done.stdout
