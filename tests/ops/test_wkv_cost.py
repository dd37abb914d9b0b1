"""The cost model of the CUDA kernels of wkv4 in benchmarks/, and the scripts that need a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import wkv_cost as cost

ROOT = Path(__file__).resolve().parents[2]
SHAPES = [(B, T, C) for B in (1, 2, 8, 32) for T in (64, 1024, 4096, 65536) for C in (64, 768, 1024, 2048, 5120)]


@pytest.mark.parametrize("gpu", [cost.A100, cost.H100])
def test_the_choice_is_near_the_best_that_the_model_knows(gpu: cost.Gpu) -> None:
    for shape in SHAPES:
        limit = max(1, shape[1] // 1024)
        others = [cost.predict(gpu, *shape, segments).seconds for segments in (0, *range(1, min(limit, 40) + 1))]
        assert cost.predict(gpu, *shape).seconds <= 1.35 * min(others), shape


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
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--quick"]
    environment = {"CUDA_VISIBLE_DEVICES": "", "PATH": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
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
