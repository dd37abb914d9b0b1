"""The tests and benchmarks that need a GPU: `make gpu`, at most 12 minutes; `make gpu ARGS=--quick`, 3.

Each part runs in a process of its own, with a time limit, and the next one runs whether it failed or not. Results are
written to benchmarks/results/<GPU>.json and printed as tables. Exit code 1 where a part failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

RESULTS = ROOT / "benchmarks" / "results"


def correctness(quick: bool) -> dict[str, Any]:
    """Every kernel on the GPU against the definition in float64, eager, compiled and in a CUDA graph."""
    import torch

    from rwkv_train import ops
    from rwkv_train.ops import reference
    from rwkv_train.ops.families import cuda_engines
    from tests.ops.cases import assert_as_good_as, value_and_gradients, wkv4_inputs

    for engine in cuda_engines().values():
        assert engine.load(), engine.error
    worst, cases = 0.0, 0
    dtypes = (torch.float32, torch.bfloat16, torch.float16)

    def in_segments(segments: int) -> Any:
        """The kernels with the cut given, which the operator chooses by size; inputs and results are on the CPU."""

        def run(*x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            y, state, _ = torch.ops.rwkv_train.wkv4_in_segments(*(tensor.cuda() for tensor in x), segments)
            return y.cpu(), state.cpu()

        return run

    shapes = [(2, 17, 3), (1, 130, 66)] if quick else [(1, 1, 1), (2, 15, 3), (2, 63, 64), (1, 130, 66), (3, 1000, 130)]
    for dtype in dtypes:
        for shape in shapes:
            inputs = [x.float().double() for x in wkv4_inputs(*shape)]
            inputs[2:4] = [x.to(dtype).double() for x in inputs[2:4]]
            kinds = [torch.float32, torch.float32, dtype, dtype, torch.float32]
            truth = value_and_gradients(reference.wkv4, inputs, [torch.float64] * 5)
            plain = value_and_gradients(reference.wkv4, inputs, kinds)
            for segments in (0, 1, 2, -(-shape[1] // 64)):
                if segments > -(-shape[1] // 64):
                    continue
                ours = value_and_gradients(in_segments(segments), inputs, kinds)
                assert_as_good_as(ours, plain, truth, 2, torch.finfo(torch.float32).eps)
                worst = max(
                    worst, *(((a - b).norm() / (b.norm() + 1e-30)).item() for a, b in zip(ours, truth, strict=True))
                )
                cases += 1
            x, r = (torch.randn(shape, dtype=torch.float64).to(dtype).double() for _ in range(2))
            mixes = [torch.rand(shape[2]).double() for _ in range(3)]

            def by_ops(x: torch.Tensor, r: torch.Tensor, *mixes: torch.Tensor) -> tuple[torch.Tensor, ...]:
                x, r, *mixes = (value.cuda() for value in (x, r, *mixes))
                return (
                    *(y.cpu() for y in ops.shift_mix(x, r[:, 0], *mixes)),
                    ops.relu_squared(x).cpu(),
                    ops.sigmoid_gate(r, x).cpu(),
                )

            def by_definition(x: torch.Tensor, r: torch.Tensor, *mixes: torch.Tensor) -> tuple[torch.Tensor, ...]:
                mixed = reference.shift_mix(x, r[:, 0], mixes)
                return *mixed, reference.relu_squared(x), reference.sigmoid_gate(r, x)

            kinds = [dtype, dtype, *[torch.float32] * 3]
            runs = [value_and_gradients(f, [x, r, *mixes], kinds) for f in (by_ops, by_definition)]
            exact = value_and_gradients(by_definition, [x, r, *mixes], [torch.float64] * 5)
            assert_as_good_as(*runs, exact, 5, torch.finfo(dtype).eps)
            cases += 1
    for T in () if quick else (65535, 65537, 262145):  # lengths at which others fail: one cut against another
        w, u, k, v, state = (x.float().cuda() for x in wkv4_inputs(1, T, 8, decay=-4.0))
        y = [torch.ops.rwkv_train.wkv4_in_segments(w, u, k, v, state, cut)[0] for cut in (0, 1, T // 1024)]
        assert all((other - y[0]).norm() <= 2e-5 * y[0].norm() for other in y[1:]), T
        cases += 1
    w, u, k, v, state = (x.float().cuda().requires_grad_() for x in wkv4_inputs(2, 130, 32))
    loss = lambda *x: ops.wkv4(*x)[0].square().sum()  # noqa: E731
    eager = torch.autograd.grad(loss(w, u, k, v, state), (w, u, k, v, state))
    whole = torch.autograd.grad(torch.compile(loss, fullgraph=True)(w, u, k, v, state), (w, u, k, v, state))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(eager, whole, strict=True)), "torch.compile"
    with torch.no_grad():
        expected = ops.wkv4(w, u, k, v, state)[0]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = ops.wkv4(w, u, k, v, state)[0]
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, expected), "a CUDA graph"
    again = torch.autograd.grad(loss(w, u, k, v, state), (w, u, k, v, state))
    assert all(torch.equal(a, b) for a, b in zip(eager, again, strict=True)), "two runs differ"
    return {"cases": cases, "worst_relative_error": worst, "compile": "ok", "cuda_graph": "ok", "reproducible": "ok"}


def sanitized(quick: bool) -> dict[str, Any]:
    """What compute-sanitizer runs: each kernel once, small."""
    import torch

    from rwkv_train import ops
    from rwkv_train.ops.families import cuda_engines
    from tests.ops.cases import wkv4_inputs

    engine = cuda_engines()["wkv4"]
    assert engine.load(), engine.error  # wkv4_in_segments does not load it
    for dtype in (torch.float32, torch.bfloat16):
        w, u, k, v, state = (x.float().cuda() for x in wkv4_inputs(1, 200, 66))
        k, v = k.to(dtype), v.to(dtype)
        for cut in (0, 1, 3):
            _, _, saved = torch.ops.rwkv_train.wkv4_in_segments(w, u, k, v, state, cut)
            torch.ops.rwkv_train.wkv4_in_segments_backward(w, u, k, v, state, saved, k, state, cut)
        x = k.detach().requires_grad_()
        mixed = ops.shift_mix(x, x[:, 0], w.exp(), u)
        (ops.sigmoid_gate(mixed[0], ops.relu_squared(mixed[1]))).sum().backward()
    torch.cuda.synchronize()
    return {"launched": "every kernel"}


IN_PROCESS = {"correctness": correctness, "sanitized": sanitized}


def parts(quick: bool) -> dict[str, tuple[list[str], int]]:
    """Commands, each with its limit in seconds; the last line of their output is one JSON object, or empty."""
    python, own = sys.executable, [sys.executable, __file__, *(["--quick"] if quick else [])]
    flags, limit = ["--quick"] if quick else [], (lambda long, short: short if quick else long)
    found: dict[str, tuple[list[str], int]] = {"correctness": ([*own, "--part", "correctness"], limit(150, 60))}
    if sanitizer := shutil.which("compute-sanitizer"):
        for tool in ("memcheck", "racecheck") if not quick else ("memcheck",):
            command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *own, "--part", "sanitized"]
            found[f"compute-sanitizer {tool}"] = (command, limit(90, 30))
    found["wkv4"] = ([python, "benchmarks/wkv_gpu.py", *flags], limit(120, 40))
    found["steps"] = ([python, "benchmarks/gpu_step.py", *flags], limit(180, 40))
    if not quick and importlib.util.find_spec("deepspeed") and importlib.util.find_spec("lightning"):
        for strategy in ("fsdp", "deepspeed_2"):
            if (ROOT / "conf" / "strategy" / f"{strategy}.yaml").exists():
                settings = f"model=tiny strategy={strategy} budget.steps=2 trainer.accelerator=gpu trainer.devices=1"
                settings += f" resume=never run.root=runs/gpu run.name={strategy}"
                found[f"one step of {strategy}"] = ([python, "train.py", *settings.split()], 45)
    return found


def run(name: str, command: list[str], seconds: int) -> dict[str, Any]:
    start = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds
        )
        output, failed = done.stdout, f"exit code {done.returncode}" if done.returncode else None
    except subprocess.TimeoutExpired as error:
        output, failed = (error.stdout or b"").decode(errors="replace"), f"longer than {seconds} s"
    print(
        f"\n== {name} ({time.monotonic() - start:.0f} s{', FAILED: ' + failed if failed else ''})\n{output}", flush=True
    )
    lines = output.strip().splitlines() or [""]
    try:
        result = json.loads(lines[-1]) if lines[-1].startswith("{") else {}
    except ValueError:
        result = {}
    if failed:
        result |= {"failed": failed, "last_words": lines[-1][-300:]}
    return result


def facts() -> dict[str, Any]:
    """The GPU, and the versions of the software."""
    import torch

    from rwkv_train.ops import build_cuda
    from rwkv_train.ops.build import BuildError

    properties = torch.cuda.get_device_properties(0)
    try:
        nvcc = ".".join(map(str, build_cuda.toolkit_version(build_cuda.find_nvcc())))
    except BuildError as error:
        nvcc = error.why
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "card": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_GiB": round(properties.total_memory / 2**30),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nvcc": nvcc,
        "commit": commit.stdout.strip(),
    }


def table(results: dict[str, Any]) -> str:
    """The operator's rows as Markdown, for the README."""
    lines = [
        "| B, T, C | kernel | µs | of the copy floor | predicted | one thread a channel, µs | fla, µs |",
        "|" + " --- |" * 7,
    ]
    for row in results.get("wkv4", {}).get("wkv4", []):
        cells = [
            f"{row['B']}, {row['T']}, {row['C']}",
            row["kernel"],
            row.get("us", row.get("failed", "")),
            row.get("ratio", ""),
        ]
        cells += [row["predicted_ratio"], row.get("us_one_thread_a_channel", ""), row.get("us_fla", "")]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="at most three minutes")
    parser.add_argument("--part", choices=IN_PROCESS, help="one part in this process")
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(IN_PROCESS[arguments.part](arguments.quick)))
        return 0
    try:
        import torch
    except ImportError:
        print("torch is missing: pip install torch (a build with CUDA)")
        return 2
    if not torch.cuda.is_available():
        why = "this torch was built without CUDA" if torch.version.cuda is None else "torch finds no GPU"
        print(f"make gpu needs a GPU: {why}\n  the checks that need no GPU: make test-kernels")
        return 2
    results = facts()
    print(results)
    for name, (command, seconds) in parts(arguments.quick).items():
        results[name] = run(name, command, seconds)
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / (re.sub(r"[^a-z0-9]+", "_", results["card"].lower()).strip("_") + ".json")
    file.write_text(json.dumps(results, indent=1) + "\n")
    failed = [name for name, value in results.items() if isinstance(value, dict) and "failed" in value]
    print(f"\n{table(results)}\n\nwritten: {file.relative_to(ROOT)}")
    print(f"failed: {', '.join(failed)}" if failed else "every part succeeded")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
