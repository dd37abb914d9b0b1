"""Plants errors in the CUDA kernels, one at a time, and prints which check of the emulator catches each.

    python scripts/kernel_mutants.py            # prints the table of docs/kernels.md, about four minutes
    python scripts/kernel_mutants.py --write    # and writes it there
    python scripts/kernel_mutants.py --one 7    # one of them

Exit code 1 where a mutant survives.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.ops import test_cuda_kernels as proofs  # noqa: E402
from tests.ops.cases import assert_as_good_as  # noqa: E402
from tests.ops.emulator import loader, proof  # noqa: E402

FORK = multiprocessing.get_context("fork")  # torch is imported once
DOCUMENT = ROOT / "docs" / "kernels.md"
ELEMENTWISE = ("elementwise.cu", "sum_rows.cuh")
MARKS = "<!-- mutants -->", "<!-- end of mutants -->"

# What is wrong, the file, the right text, the wrong text.
MUTANTS: list[tuple[str, str, str, str]] = [
    ("no rescaling to the new maximum", "wkv4.cuh", "Weights{e, 1.f, now}", "Weights{1.f, 1.f, now}"),
    ("the smaller exponent as maximum", "wkv4.cuh", "Weights{1.f, e, past}", "Weights{1.f, e, now}"),
    ("decay forgotten between parts", "wkv4.cuh", "weigh(before.p + decay, part.p)", "weigh(before.p, part.p)"),
    ("operands swapped in the scan", "wkv4.cuh", "fmaf(e.past, before.n, e.now * part.n)", "fmaf(e.now, before.n, e.past * part.n)"),
    ("bonus forgotten", "wkv4.cuh", "weigh(s.p, u + k)", "weigh(s.p, k)"),
    ("bonus forgotten in the usual case", "wkv4.cuh", "next.now * u, 0.f}", "next.now, 0.f}"),
    ("the usual case where |u + w| is large", "wkv4.cuh", "all = all && fabsf(u[i] + w[i]) <= NEAR", "all = true"),
    ("the usual case for three steps", "wkv4.cuh", "if (APART && count >= STEPS) {", "if (APART && count >= STEPS - 5) {"),
    ("the summary's steps aged by one more", "wkv4.cuh", "float(STEPS - 1 - j)", "float(STEPS - j)"),
    ("the summary without its maximum", "wkv4.cuh", "__expf(x[j][i] - local[i].p)", "__expf(x[j][i])"),
    ("the usual case with a gradient of new_state", "wkv4_parallel.cuh", "near<V>(w, u, bonus) && !a.gstate", "near<V>(w, u, bonus)"),
    ("a tie goes to one side", "wkv4.cuh", "decayed < k ? 0.f : decayed == k ? 0.5f : 1.f", "decayed <= k ? 0.f : 1.f"),
    ("factors swapped in the gradient's scan", "wkv4.cuh", "fmaf(earlier.factor, later.n, earlier.n)", "fmaf(later.factor, later.n, earlier.n)"),
    ("gradient of the maximum not stopped", "wkv4.cuh", "m.keep * g.q", "g.q"),
    ("a sign in dk", "wkv4.cuh", "fmaf(v, s.d, -s.n)", "fmaf(v, s.d, s.n)"),
    ("the last eight steps counted as more", "wkv4.cuh", "left > STEPS ? STEPS + 1", "left >= STEPS ? STEPS + 1"),
    ("wrong stride of rows", "wkv4.cuh", "++j, row += C)", "++j, ++row)"),
    ("stale state before odd steps", "wkv4.cuh", "if (j % 2) s = step(", "if (j % 2 == 2) s = step("),
    ("a chunk too many", "wkv4.cuh", "return (T + CHUNK - 1) / CHUNK;", "return T / CHUNK + 1;"),
    ("a barrier dropped, forward", "wkv4_parallel.cuh", "    __syncthreads();\n    if (!SUMMARY || warp == WARPS - 1) {", "    if (!SUMMARY || warp == WARPS - 1) {"),
    ("carry in one buffer, forward", "wkv4_parallel.cuh", "float(*to)[WIDTH] = carry[1 - now];", "float(*to)[WIDTH] = carry[now];"),
    ("the first barrier dropped, backward", "wkv4_parallel.cuh", "    __syncthreads();\n#pragma unroll 1\n    for (int other = 0; other < warp; ++other) {", "#pragma unroll 1\n    for (int other = 0; other < warp; ++other) {"),
    ("the second barrier dropped, backward", "wkv4_parallel.cuh", "    __syncthreads();\n    if (!SUMMARY || warp == 0) {", "    if (!SUMMARY || warp == 0) {"),
    ("the barrier before dw dropped", "wkv4_parallel.cuh", "  __syncthreads();\n  if (warp == 0 && at.inside) {\n    const int64_t blocks", "  if (warp == 0 && at.inside) {\n    const int64_t blocks"),
    ("≤ for < over the warps before", "wkv4_parallel.cuh", "other < warp; ++other) {  // the steps", "other <= warp; ++other) {  // the steps"),
    ("saved states one chunk late", "wkv4_parallel.cuh", "(at.b * (a.chunks() - 1) + chunk) * 3", "(at.b * (a.chunks() - 1) + chunk + 1) * 3"),
    ("a stale register of the chunk before", "wkv4_parallel.cuh", "k[j] = next_k[j], v[j] = next_v[j];", "k[j] = next_k[j];"),
    ("a lane left out of the shuffle scan", "wkv4_parallel.cuh", "if (lane >= distance) s = then", "if (lane > distance) s = then"),
    ("earlier and later swapped in the shuffle scan", "wkv4_parallel.cuh", "s = then(before, s, decay), decay += more", "s = then(s, before, decay), decay += more"),
    ("more than 32 segments: carry of the wrong lane", "wkv4_parallel.cuh", "carry = {__shfl_sync(ALL, s.n, LANES - 1)", "carry = {__shfl_sync(ALL, s.n, 0)"),
    ("the segment's gradient from itself", "wkv4_parallel.cuh", "(b * a.segments + segment - 1) * 3 * a.C", "(b * a.segments + segment) * 3 * a.C"),
    ("one channel too many", "wkv4_parallel.cuh", "block / columns % segments), c < C};", "block / columns % segments), c <= C};"),
    ("a barrier in divergent flow", "wkv4_parallel.cuh", "    __syncthreads();\n    if (!SUMMARY || warp == WARPS - 1) {", "    if (at.inside) __syncthreads();\n    if (!SUMMARY || warp == WARPS - 1) {"),
    ("a state saved before the first chunk", "wkv4_sequential.cuh", "if (t > 0 && t % CHUNK == 0) {", "if (t % CHUNK == 0) {"),
    ("an eighth recomputed too short", "wkv4_sequential.cuh", "if (j < STEPS - 2) s[i] = step", "if (j < STEPS - 3) s[i] = step"),
    ("gradient of the new state at the wrong end", "wkv4_sequential.cuh", "if (chunk == a.chunks() - 1) {", "if (chunk == 0) {"),
    ("the barrier of the row sums dropped", "sum_rows.cuh", "  __syncthreads();\n", ""),
    ("a row summed twice", "sum_rows.cuh", "for (int row = 1;", "for (int row = 0;"),
    ("the row before the first", "elementwise.cu", "if (at.t > 0) x[0]", "if (at.t >= 0) x[0]"),
    ("the row after the last", "elementwise.cu", "at.t + j < a.T)) g[j]", "at.t + j <= a.T)) g[j]"),
    ("sums of two mixes in one buffer", "elementwise.cu", "part[which & 1]", "part[0]"),
    ("the tail read as a full vector", "elementwise.cu", "if (at + V <= a.n) {", "if (at < a.n) {"),
]  # fmt: skip


def planted(index: int, folder: Path) -> Path:
    """Puts a copy of cuda/ with one error into `folder`; returns the file to compile.

    Only the file in question, in float32 and two channels a thread, compiles in an eighth of the time.
    """
    _, file, old, new = MUTANTS[index]
    shutil.copytree(loader.CUDA, folder)
    for name, before, after in (
        (file, old, new),
        ("device.cuh", "  if (storage == 1) return body(bf16());\n  return body(fp16());\n", "  return nullptr;\n"),
        ("wkv4.cu", ": forward<S, 1>(a, on)", ": nullptr"),
        ("wkv4.cu", ": backward<S, 1>(a, dw, du, on)", ": nullptr"),
    ):
        text = (folder / name).read_text()
        assert before in text, f"{name} no longer has {before!r}"
        (folder / name).write_text(text.replace(before, after))
    unit = folder / "unit.cpp"
    unit.write_text(f'#include "{"elementwise.cu" if file in ELEMENTWISE else "wkv4.cu"}"\n')
    return unit


def caught(unit: Path) -> str | None:
    """What catches a mutant: shadow memory and values, then the values in three orders; None when nothing does."""
    single, elementwise = torch.float32, "elementwise" in unit.read_text()
    for mode, orders in (("check", proofs.ORDERS[:1]), ("plain", proofs.ORDERS[:3])):
        kernels = loader.Kernels(loader.compiled(mode, unit.parent, unit))
        for order in orders:
            kernels.schedule(*order)
            try:
                (look_at_elements if elementwise else look_at_wkv4)(kernels, single)
            except loader.EmulatorError as error:
                kind = re.search(r"race|unwritten|out of bounds|deadlock|divergent barrier|bad launch", str(error))
                return f"the emulator: {kind[0] if kind else str(error)[:60]}"
            except AssertionError as error:
                ratios = re.findall(r"'(\w+)': ([\d.e+]+|nan|inf)", str(error))
                wrong = [name for name, ratio in ratios if not float(ratio) <= proofs.BOUND]
                return "values: " + (", ".join(wrong) or str(error).split("\n")[0][:60])
    return None


def look_at_wkv4(kernels: loader.Kernels, single: torch.dtype) -> None:
    for shape, cuts in (((1, 64, 6), (0, 1)), ((2, 200, 66), (0, 1, 3)), ((1, 131, 4), (0, 1, 2))):
        for segments in cuts:
            ratios = proofs.error_ratios(kernels, shape, segments, single, with_state=shape[0] == 2)
            assert all(ratio <= proofs.BOUND for ratio in ratios.values()), str(ratios)
    ratios = proofs.error_ratios(kernels, (1, 150, 4), 1, single, with_state=False, decay=12.0)
    assert all(ratio <= proofs.BOUND for ratio in ratios.values()), str(ratios)
    proofs.test_wkv4_with_a_tie_and_without_a_state(kernels)
    inputs, gy, gstate = proofs.wkv4_case(1, 64 * 40, 2, single, decay=-6.0)
    found, other = (proof.wkv4(kernels, inputs, gy, gstate, cut, single) for cut in (40, 1))
    for name, ours in found.items():
        assert (ours - other[name]).norm() <= 1e-4 * other[name].norm(), f"40 segments differ from one in {name}"


def look_at_elements(kernels: loader.Kernels, single: torch.dtype) -> None:
    for shape, first in (((2, 70, 36), True), ((1, 9, 7), False)):
        assert_as_good_as(*proofs.elementwise(kernels, single, shape, first), torch.finfo(single).eps)


def one(index: int) -> tuple[str, str, str | None]:
    """What is wrong, where, and what caught it; in a process of its own, which a mutant may crash."""
    what, file, _, _ = MUTANTS[index]
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=in_a_process, args=(index, sender))
    process.start()
    sender.close()
    try:
        by = receiver.recv()
    except EOFError:
        process.join()
        by = f"the process ended by signal {-(process.exitcode or 0)}"
    process.join()
    print(f"{index} {what}: {by}", flush=True)
    return what, file, by


def in_a_process(index: int, sender: Connection) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        sender.send(caught(planted(index, Path(folder) / "cuda")))


def table(results: list[tuple[str, str, str | None]]) -> str:
    lines = ["| planted error | file | caught by |", "| --- | --- | --- |"]
    lines += [f"| {what} | `{file}` | {by or '**nothing**'} |" for what, file, by in results]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the table into docs/kernels.md")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    parser.add_argument("--one", type=int, metavar="N", help=f"only mutant N of {len(MUTANTS)}, in this process")
    arguments = parser.parse_args()
    if arguments.one is not None:
        one(arguments.one)
        return 0
    with ThreadPoolExecutor(arguments.jobs) as pool:
        results = list(pool.map(one, range(len(MUTANTS))))
    if arguments.write:
        start, end = MARKS
        text = DOCUMENT.read_text()
        before, rest = text.split(start, 1)
        DOCUMENT.write_text(f"{before}{start}\n{table(results)}\n{end}{rest.split(end, 1)[1]}")
    else:
        print(table(results))
    survivors = [what for what, _, by in results if by is None]
    print(f"{len(results)} mutants, {len(survivors)} survive{': ' if survivors else ''}{', '.join(survivors)}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
