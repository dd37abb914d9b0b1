"""The preflight names the nodes that differ and those that do not answer, and checks the sum over all nodes."""

from __future__ import annotations

import multiprocessing
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from rich.console import Console

from rwkv_train.cluster.preflight import Report, compare, forward_error, run_preflight
from rwkv_train.cluster.rank_info import RankInfo
from rwkv_train.errors import UserError
from rwkv_train.exit_codes import ExitCode
from tests import PRELOAD

FACTS = {"code": "c1", "torch": "2.13.0", "data": "d1"}


def report(rank: int, node: str, free: int = 10**12, clock_lag: float = 0.0, **facts: str) -> Report:
    return Report(rank, node, {**FACTS, **facts}, free, True, clock_lag)


def problems(*reports: Report, needed: int = 0) -> list[str]:
    return [str(problem).split("\n")[0] for problem in compare(reports, needed)]


def test_nothing_differs() -> None:
    assert problems(*(report(rank, f"n{rank // 2}") for rank in range(8)), needed=10**12) == []


def test_what_differs_is_named_by_node() -> None:
    reports = [report(rank, f"n{rank // 2 + 1}") for rank in range(8)]
    for rank in (2, 3):
        reports[rank] = report(rank, "n2", torch="2.12.0")
    reports[7] = report(7, "n4", data="d2")
    assert problems(*reports) == [
        "torch differs: 2.12.0 on node n2, 2.13.0 on the other nodes",
        "data differs: d2 on node n4, d1 on the other nodes",
    ]
    assert problems(report(0, "n1"), report(1, "n2", code="c2")) == [
        "code differs: c2 on node n2, c1 on the other nodes"
    ]


def test_a_package_or_card_that_only_some_have() -> None:
    reports = [
        report(0, "n1", GPUs="8 × A"),
        report(1, "n2", GPUs="7 × A"),
        report(2, "n3", GPUs="8 × A"),
        report(3, "n4"),
    ]
    assert problems(*reports) == [
        "GPUs differs: 7 × A on node n2, 8 × A on the other nodes",
        "GPUs differs: none on node n4, 8 × A on the other nodes",
    ]


def test_disk_and_clocks() -> None:
    reports = [
        report(0, "n1"),
        report(1, "n2", free=3 * 10**9),
        report(2, "n3", clock_lag=7.0),
        report(3, "n4", clock_lag=-9.2),
    ]
    assert problems(*reports, needed=4 * 10**9) == [
        "the disk of the run directory has 3.0 GB free on node n2, two checkpoints take 4.0",
        "the clock of n3 is 7 s behind the first node's",
        "the clock of n4 is 9 s ahead of the first node's",
    ]


def test_an_error_that_only_some_have() -> None:
    error = "data.path=x: there is no such file or directory"
    reports = [report(0, "n1"), *(Report(rank, "n2", error=error) for rank in (1, 2))]
    assert problems(*reports) == [f"on node n2: {error}"]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def one_rank(
    rank_info: RankInfo, directory: Path, facts: dict[str, str], seconds: float, out: Path, error: str
) -> None:
    """Ends with the exit code of a process of a run."""
    sys.stdout = sys.stderr = open(out, "w", buffering=1)  # noqa: SIM115
    try:
        if error:
            forward_error(rank_info, UserError(error))
            sys.exit(2)
        if rank_info.first:
            time.sleep(0.5)  # the other ranks wait before it makes the directory
            directory.mkdir(exist_ok=True)
        run_preflight(
            rank_info, False, facts, directory, 1000, seconds, Console(quiet=not rank_info.first, soft_wrap=True)
        )
        dist.barrier()
        dist.destroy_process_group()
    except UserError as refusal:
        print(refusal)
        sys.exit(2)


@pytest.fixture
def ranks(tmp_path: Path) -> Callable[..., tuple[list[int | None], str]]:
    """Runs the pre-flight in processes; their exit codes, and what all of them have printed."""

    def run(*changes: dict[str, Any], seconds: float = 60) -> tuple[list[int | None], str]:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        rank_info = RankInfo(starter="srun", ranks=len(changes), node_names=("n1", "n2"), nodes=2, port=free_port())
        started = []
        for rank, change in enumerate(changes):
            here = replace(rank_info, rank=rank, node=f"n{rank + 1}", **change.get("rank_info", {}))
            directory = change.get("directory", tmp_path / "run")
            facts = {**FACTS, **change.get("facts", {})}
            arguments = (here, directory, facts, seconds, tmp_path / f"{rank}.out", change.get("error", ""))
            if not change.get("absent"):
                started.append(context.Process(target=one_rank, args=arguments))
                started[-1].start()
        try:
            for process in started:
                process.join(100)
            return [p.exitcode for p in started], "".join(f.read_text() for f in sorted(tmp_path.glob("?.out")))
        finally:
            for process in started:
                process.kill()
                process.join()

    return run


def test_two_that_agree(ranks: Callable[..., Any], tmp_path: Path) -> None:
    codes, printed = ranks({}, {})
    assert codes == [0, 0], printed
    assert "nodes   2 nodes, 2 processes agree; all-reduce of 16 MiB in " in printed
    assert " GB/s; " in printed
    assert not (tmp_path / "run" / ".preflight").exists()


def test_two_that_do_not(ranks: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    codes, printed = ranks({}, {"facts": {"code": "c2"}, "directory": tmp_path / "elsewhere"})
    assert codes == [2, 2], printed
    assert printed.count("code differs: c2 on node n2, c1 on the other nodes") == 1
    assert "the run directory is not shared: node n2 does not see what the first node writes there\n" in printed
    assert "run.root=DIR on a file system that all nodes share" in printed


def test_the_first_one_speaks_for_all(ranks: Callable[..., Any]) -> None:
    codes, printed = ranks({}, {"error": "data.path=x: there is no such file"})
    assert codes == [2, 2], printed
    assert printed.count("on node n2: data.path=x: there is no such file") == 1


@pytest.mark.parametrize("absent", [0, 1])
def test_one_that_does_not_answer(ranks: Callable[..., Any], absent: int) -> None:
    began = time.monotonic()
    codes, printed = ranks(*({"absent": rank == absent} for rank in range(2)), seconds=4)
    assert codes == [ExitCode.FAILED]
    assert time.monotonic() - began < 40
    if absent:
        assert "error: 1 of 2 processes did not answer, on n2: ranks 1\n" in printed
    else:
        assert "error: preflight: after 4 s rank 0 on n1 (127.0.0.1:" in printed
