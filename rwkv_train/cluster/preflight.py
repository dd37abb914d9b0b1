"""Preflight: before a run on several nodes begins, checks that every rank answers and has the same software and data.

Each rank reports its facts to a key-value store on rank 0's node. Rank 0 compares them, reports what
differs and on which nodes, and releases or ends the others. Then the ranks make the process group that training uses,
and all-reduce a tensor whose result is known. A deadline covers all of it: a rank that waits longer ends.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch
import torch.distributed as dist
from packaging.requirements import Requirement
from rich.console import Console
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from rwkv_train.cluster.rank_info import RankInfo
from rwkv_train.errors import UserError, UserErrors
from rwkv_train.exit_codes import ExitCode
from rwkv_train.json_files import parse_json

MAX_CLOCK_LAG = 2.0  # seconds that the nodes' clocks may differ
_ELEMENTS = 2**22  # float32 elements of the all-reduce, 16 MiB
_VISIBLE_SECONDS = 5.0  # seconds until all nodes must see a file that rank 0 has written: network file systems are slow
_FORWARD_SECONDS = 20.0  # seconds that a rank with an error waits for rank 0 to print it


@dataclass(frozen=True)
class Report:
    """What one rank reports.

    Attributes:
        rank: of the process.
        node: its name.
        facts: name → value, which must be equal on all ranks.
        free: free bytes on the disk of the run directory.
        sees: whether it sees a file there that rank 0 has written.
        clock_lag: seconds by which its clock is behind rank 0's.
        error: what keeps it from beginning; None: it can begin.
    """

    rank: int
    node: str
    facts: Mapping[str, str] = field(default_factory=dict)
    free: int = 0
    sees: bool = True
    clock_lag: float = 0.0
    error: str | None = None


def compare(reports: Sequence[Report], needed: int = 0) -> list[UserError]:
    """The problems that keep a run from beginning, each once, with the nodes that have it.

    Args:
        reports: of all ranks.
        needed: bytes that the run will write at least.
    """
    problems = []
    for error in dict.fromkeys(report.error for report in reports if report.error):
        problems.append(UserError(f"on {_nodes(r for r in reports if r.error == error)}: {error}"))
    found = [report for report in reports if report.error is None]
    for name in dict.fromkeys(name for report in found for name in report.facts):
        values = {report.rank: report.facts.get(name, "none") for report in found}
        if len(set(values.values())) == 1:
            continue
        usual = Counter(values.values()).most_common(1)[0][0]  # of rank 0 where it is a draw
        for value in sorted(set(values.values()) - {usual}):
            there = _nodes(report for report in found if values[report.rank] == value)
            problems.append(
                UserError(
                    f"{name} differs: {value} on {there}, {usual} on the other nodes", _REMEDIES.get(name, _REMEDY)
                )
            )
    not_shared = [report for report in found if not report.sees]
    if not_shared:
        what = f"the run directory is not shared: {_nodes(not_shared)} does not see what the first node writes there"
        problems.append(UserError(what, "run.root=DIR on a file system that all nodes share"))
    low_on_space = [report for report in found if report.sees and report.free < needed]
    if low_on_space:
        have = min(report.free for report in low_on_space) / 1e9
        problems.append(
            UserError(
                f"the disk of the run directory has {have:.1f} GB free on {_nodes(low_on_space)}, two checkpoints "
                f"take {needed / 1e9:.1f}",
                "make room, or run.root=DIR on another disk",
            )
        )
    for report in found:
        if abs(report.clock_lag) > MAX_CLOCK_LAG and not any(
            r.node == report.node and r.rank < report.rank for r in found
        ):
            way = "behind" if report.clock_lag > 0 else "ahead of"
            problems.append(
                UserError(
                    f"the clock of {report.node} is {abs(report.clock_lag):.0f} s {way} the first node's",
                    "set it by NTP: times in the records would contradict each other",
                )
            )
    return problems


_PROBE_FILE = ".preflight"  # in the run directory: rank 0 writes it, the others look for it
_REMEDY = "install the same on all nodes, or take the one out: sbatch --exclude=NODE"
_REMEDIES = {
    "data": "the same files on all nodes: data.path=… on a file system that all nodes share",
    "config": "the same conf/ and the same command on all nodes",
}


def _nodes(reports: Iterator[Report] | Sequence[Report]) -> str:
    return ", ".join(dict.fromkeys(f"node {report.node}" for report in reports))


def run_preflight(
    rank_info: RankInfo,
    gpu: bool,
    facts: Mapping[str, str],
    directory: Path,
    needed: int,
    seconds: float,
    console: Console,
) -> None:
    """Runs the preflight; every rank calls it when its data are open and before the model has values.

    Afterwards torch.distributed has the process group of all ranks.

    Args:
        rank_info: of this rank.
        gpu: whether the run's devices are GPUs.
        facts: that must be equal on all ranks, beside package versions and GPUs.
        directory: of the run; rank 0 has made it.
        needed: bytes that the run will write there at least.
        seconds: the deadline for all of it.
        console: prints on rank 0.

    Raises:
        UserErrors: what `compare` finds, on rank 0; the others raise SystemExit with the same exit code.
    """
    began = time.monotonic()
    with _deadline(rank_info, seconds) as phase:
        store = _store(rank_info, seconds)
        sees = _sees(store, rank_info, directory)  # by then rank 0 has made it
        free = shutil.disk_usage(directory).free if sees else 0
        own = Report(rank_info.rank, rank_info.node, {**facts, **_machine(gpu)}, free, sees)
        if rank_info.first:
            reports = _gather(store, rank_info, own, began + seconds)
            (directory / _PROBE_FILE).unlink(missing_ok=True)
            problems = compare(reports, needed)
            store.set("verdict", "errors" if problems else "go")
            if problems:
                _await_readers(store, rank_info)
                raise UserErrors(problems)
        else:
            store.set(f"report/{rank_info.rank}", json.dumps(asdict(own)))
            store.get("clock")
            store.set(f"clock/{rank_info.rank}", str(time.time()))
            verdict = store.get("verdict")
            if verdict != b"go":
                store.set(f"verdict_read/{rank_info.rank}", "")
                raise SystemExit(ExitCode.USER_ERROR)
        phase.append("the processes do not reach each other (GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names a network)")
        rate, took = _all_reduce(store, rank_info, gpu)
    console.print(
        f"nodes   {rank_info.nodes} nodes, {rank_info.ranks} processes agree; "
        f"all-reduce of {_ELEMENTS * 4 >> 20} MiB in {took * 1e3:.0f} ms, {rate / 1e9:.2f} GB/s; "
        f"{time.monotonic() - began:.1f} s"
    )


def forward_error(rank_info: RankInfo, error: UserError) -> None:
    """Forwards an error of this rank to rank 0, which prints the errors of all ranks.

    It keeps this process alive until rank 0 has had time to report: srun ends all processes when one has ended.
    """
    if rank_info.first or rank_info.ranks == 1:
        return
    end = time.monotonic() + _FORWARD_SECONDS
    with suppress(Exception), _deadline(rank_info, _FORWARD_SECONDS):  # rank 0 has ended, with the same error
        store = _store(rank_info, _FORWARD_SECONDS)
        store.set(
            f"report/{rank_info.rank}", json.dumps(asdict(Report(rank_info.rank, rank_info.node, error=str(error))))
        )
        store.wait(["verdict"], timedelta(seconds=max(1.0, end - time.monotonic())))
        store.set(f"verdict_read/{rank_info.rank}", "")


def _store(rank_info: RankInfo, seconds: float) -> PrefixStore:
    server = rank_info.first and not rank_info.agent_store
    timeout = timedelta(seconds=seconds + 5)  # the deadline comes first
    store = TCPStore(rank_info.address, rank_info.port, None, server, timeout, wait_for_workers=False)
    store.set_timeout(timeout)
    return PrefixStore(f"preflight/{rank_info.job or ''}/{rank_info.restarts}", store)


def _gather(store: PrefixStore, rank_info: RankInfo, own: Report, end: float) -> list[Report]:
    """The reports of all ranks, with their clocks; ends the process after naming the ranks that have not answered."""
    keys = [f"report/{rank}" for rank in range(1, rank_info.ranks)]
    while missing := [key for key in keys if not store.check([key])]:
        if time.monotonic() > end - 2:  # before the deadline of the others
            ranks = [int(key.split("/")[1]) for key in missing]
            nodes = ", ".join(dict.fromkeys(rank_info.node_of(rank) for rank in ranks))
            print(
                f"error: {len(ranks)} of {rank_info.ranks} processes did not answer, on {nodes}: ranks "
                f"{', '.join(map(str, ranks[:8]))}{' …' if len(ranks) > 8 else ''}\n"
                "  does the job start one process for each device, and do the nodes reach each other?",
                file=sys.stderr,
                flush=True,
            )
            os._exit(ExitCode.FAILED)
        time.sleep(0.05)
    now = time.time()
    reports = [own, *(Report(**parse_json(store.get(key))) for key in keys)]
    store.set("clock", "")
    able = [report for report in reports[1:] if report.error is None]
    clocks = {report.rank: now - float(store.get(f"clock/{report.rank}")) for report in able}
    return [Report(**{**asdict(report), "clock_lag": clocks.get(report.rank, 0.0)}) for report in reports]


def _await_readers(store: PrefixStore, rank_info: RankInfo) -> None:
    """Waits until the other ranks have read the verdict: the store ends with this process."""
    with suppress(Exception):
        store.wait([f"verdict_read/{rank}" for rank in range(1, rank_info.ranks)], timedelta(seconds=5))


def _sees(store: PrefixStore, rank_info: RankInfo, directory: Path) -> bool:
    """Whether this rank sees a file that rank 0 has just written into the run directory."""
    probe = directory / _PROBE_FILE
    if rank_info.first:
        content = f"{os.getpid()} {time.time_ns()}"
        probe.write_text(content, encoding="utf-8")
        store.set("probe", content)
        return True
    content = store.get("probe").decode()
    end = time.monotonic() + _VISIBLE_SECONDS
    while time.monotonic() < end:
        with suppress(OSError):
            if probe.read_text(encoding="utf-8") == content:
                return True
        time.sleep(0.1)
    return False


def _machine(gpu: bool) -> dict[str, str]:
    """Package versions and GPUs of this node."""
    facts = {"Python": ".".join(map(str, sys.version_info[:3]))}
    for line in requires("rwkv-train") or ():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate():
            with suppress(PackageNotFoundError):
                facts[requirement.name] = version(requirement.name)
    if gpu:
        cards = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
        names = Counter(f"{card.name} {round(card.total_memory / 2**30)} GiB" for card in cards)
        facts["GPUs"] = ", ".join(f"{count} × {name}" for name, count in names.items())
    return facts


def _all_reduce(store: PrefixStore, rank_info: RankInfo, gpu: bool) -> tuple[float, float]:
    """Makes the process group and all-reduces a tensor: (bytes per second of a link, seconds of one all-reduce)."""
    device = torch.device("cuda", rank_info.local_rank) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    group = PrefixStore("group", store)
    dist.init_process_group("nccl" if gpu else "gloo", store=group, rank=rank_info.rank, world_size=rank_info.ranks)
    times = []
    for _ in range(3):  # the first one opens the connections
        values = torch.arange(1.0, 5.0, device=device).repeat(_ELEMENTS // 4) * (rank_info.rank + 1)
        began = time.perf_counter()
        dist.all_reduce(values)
        found = values[:4].tolist()  # waits for the device
        times.append(time.perf_counter() - began)
        wanted = [float(number * rank_info.ranks * (rank_info.ranks + 1) // 2) for number in range(1, 5)]
        if found != wanted or values[-4:].tolist() != wanted:
            raise UserError(
                f"an all-reduce over {rank_info.ranks} processes gives {found} on node {rank_info.node}, not {wanted}",
                "the network or a device of that node is broken: sbatch --exclude=NODE",
            )
    took = min(times)
    return 2 * (rank_info.ranks - 1) / rank_info.ranks * _ELEMENTS * 4 / took, took


@contextmanager
def _deadline(rank_info: RankInfo, seconds: float) -> Iterator[list[str]]:
    """Ends this process if the block takes longer; collectives and connections would wait for many minutes.

    Yields:
        what the process waits for; the last entry is printed at the deadline.
    """
    phase = [f"rank 0 on {rank_info.node_of(0)} ({rank_info.address}:{rank_info.port}) does not answer"]
    prints = rank_info.rank <= 1  # where rank 0 does not answer, rank 1 reports it

    def give_up() -> None:
        if prints:
            print(f"error: preflight: after {seconds:g} s {phase[-1]}", file=sys.stderr, flush=True)
        os._exit(ExitCode.FAILED)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield phase
    finally:
        timer.cancel()
