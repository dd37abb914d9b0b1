"""RankInfo: rank, node and rendezvous address of a process, from the variables of SLURM or torchrun alone."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rwkv_train.config import TrainerSettings
from rwkv_train.errors import UserError

PARENT = "RWKV_PARENT"  # set for the ranks that a run starts itself: the process ID of the one that has started them
PARENT_THREAD = "RWKV_PARENT_THREAD"  # set for them where that one's main thread has started them
_NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
_TORCHRUN = (*_NUMBERS, "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets, and whatever starts every rank as it does
_NODE = ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT")  # what a user sets who starts one process on each node
_LEFT_OVER = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK")  # without the rest they name a rank that nobody starts
_PORTS = range(12000, 32000)  # below the ephemeral ports of operating systems


@dataclass(frozen=True)
class RankInfo:
    """One process among those of its run.

    Attributes:
        starter: what started the processes: srun, torchrun (or something that sets the same variables), or the run
            itself (plain).
        rank: of this process, from 0.
        local_rank: rank within its node, from 0.
        ranks: number of processes that were started together; 1 where the run starts them itself.
        node: name of this node.
        nodes: number of nodes.
        node_names: of all nodes in the order of their ranks; empty unless srun started them.
        address: host of rank 0.
        port: on that host, over which the ranks meet.
        agent_store: whether torchrun's agent listens on that port.
        job: SLURM's job ID, for scontrol; None: no job.
        restarts: number of times that the job was requeued, or that torchrun restarted the processes.
        without_srun: (tasks, nodes) of the job, where its batch script started this process without srun; else None.
        parent: process ID of the rank that has started this one; None: no rank has.
        node_rank: number of this node, from 0, where the user starts one process on each; None: not given.
        unusable: why the variables that name a rank are no complete and consistent set; None: they are, or are not set.
    """

    starter: Literal["plain", "torchrun", "srun"] = "plain"
    rank: int = 0
    local_rank: int = 0
    ranks: int = 1
    node: str = ""
    nodes: int = 1
    node_names: tuple[str, ...] = ()
    address: str = "127.0.0.1"
    port: int = 0
    agent_store: bool = False
    job: str | None = None
    restarts: int = 0
    without_srun: tuple[int, int] | None = None
    parent: int | None = None
    node_rank: int | None = None
    unusable: str | None = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def per_node(self) -> int:
        """Number of processes on each node."""
        return max(1, self.ranks // self.nodes)

    def node_of(self, rank: int) -> str:
        """The name of a rank's node; "?" where it is unknown."""
        number = rank // self.per_node
        return self.node_names[number] if number < len(self.node_names) else "?"


def rank_info_of(environment: Mapping[str, str], parent: int = 0) -> RankInfo:
    """The RankInfo of a process.

    torchrun's variables take precedence: inside a SLURM job it is torchrun that has started the process. A step of srun
    with one task is like a shell on that node: the run starts its processes itself.

    Args:
        environment: its environment variables.
        parent: process ID of its parent, by which a rank that the run has started differs from a shell in which the
            variables of another run are left over.
    """
    base = RankInfo(
        node=environment.get("SLURMD_NODENAME") or platform.node(),
        job=_job(environment),
        restarts=_number(environment, "SLURM_RESTART_COUNT"),
    )
    if "TORCHELASTIC_RUN_ID" in environment or all(name in environment for name in _TORCHRUN):
        return _of_torchrun(environment, base)
    if _number(environment, "SLURM_STEP_NUM_TASKS", 1) > 1 and base.job is not None:
        return _of_srun(environment, base)
    return _of_plain_start(environment, base, parent)


def _number(environment: Mapping[str, str], name: str, otherwise: int = 0) -> int:
    value = environment.get(name, "")
    return int(value) if value.isdecimal() else otherwise


def _job(environment: Mapping[str, str]) -> str | None:
    array = environment.get("SLURM_ARRAY_JOB_ID")  # one of its tasks has the array's own number as SLURM_JOB_ID
    return f"{array}_{_number(environment, 'SLURM_ARRAY_TASK_ID')}" if array else environment.get("SLURM_JOB_ID")


def _of_torchrun(environment: Mapping[str, str], base: RankInfo) -> RankInfo:
    rank, local_rank, ranks, per_node = (_number(environment, name, -1) for name in _NUMBERS)
    missing = [name for name in _TORCHRUN if name not in environment]
    if missing or not (0 <= rank < ranks and 0 <= local_rank < per_node <= ranks and ranks % per_node == 0):
        return replace(base, unusable=_contradiction(environment, _TORCHRUN))
    return replace(
        base,
        starter="torchrun",
        rank=rank,
        local_rank=local_rank,
        ranks=ranks,
        nodes=ranks // per_node,
        address=environment["MASTER_ADDR"],
        port=_number(environment, "MASTER_PORT"),
        agent_store=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        restarts=_number(environment, "TORCHELASTIC_RESTART_COUNT"),
    )


def _of_srun(environment: Mapping[str, str], base: RankInfo) -> RankInfo:
    names = expand_hosts(environment.get("SLURM_STEP_NODELIST", ""))
    job, step = _number(environment, "SLURM_JOB_ID"), _number(environment, "SLURM_STEP_ID")
    key = job * 31 + base.restarts * 7919 + step * 101  # another port after a restart: the old one may be bound
    return replace(
        base,
        starter="srun",
        rank=_number(environment, "SLURM_PROCID"),
        local_rank=_number(environment, "SLURM_LOCALID"),
        ranks=_number(environment, "SLURM_STEP_NUM_TASKS"),
        node_names=names,
        nodes=_number(environment, "SLURM_STEP_NUM_NODES", 1),
        address=environment.get("MASTER_ADDR") or (names[0] if names else "127.0.0.1"),
        port=_number(environment, "MASTER_PORT") or _PORTS[key % len(_PORTS)],
    )


def _of_plain_start(environment: Mapping[str, str], base: RankInfo, parent: int) -> RankInfo:
    if parent and environment.get(PARENT) == str(parent):
        local_rank, node_rank = _number(environment, "LOCAL_RANK"), _number(environment, "NODE_RANK")
        return replace(base, rank=max(local_rank, node_rank), local_rank=local_rank, parent=parent)
    tasks, nodes = _number(environment, "SLURM_NTASKS", 1), _number(environment, "SLURM_JOB_NUM_NODES", 1)
    left_out = "SLURM_STEP_NUM_TASKS" not in environment and base.job is not None and (tasks > 1 or nodes > 1)
    found = replace(base, without_srun=(tasks, nodes) if left_out else None)
    left_over = [name for name in _LEFT_OVER if name in environment]
    if not left_over:
        return found
    if left_over == ["NODE_RANK"] and all(environment.get(name) for name in _NODE):
        node_rank = _number(environment, "NODE_RANK", -1)
        if node_rank >= 0:
            return replace(found, rank=node_rank, node_rank=node_rank)
    return replace(found, unusable=_contradiction(environment, _NODE if left_over == ["NODE_RANK"] else _TORCHRUN))


def _contradiction(environment: Mapping[str, str], needed: Sequence[str]) -> str:
    """Which of the variables that name a rank are set, to what, and which are missing."""
    given = ", ".join(f"{name}={environment[name]}" for name in sorted({*needed, *_LEFT_OVER}) if name in environment)
    missing = [name for name in needed if name not in environment]
    return given + (f" set without {', '.join(missing)}" if missing else " contradict each other")


def placement_errors(rank_info: RankInfo, trainer: TrainerSettings, submits: bool = False) -> Iterator[UserError]:
    """Contradictions between what the config asks for and what the environment has.

    Args:
        rank_info: of this process.
        trainer: nodes and devices of the config.
        submits: whether this process does not train, but submits a job that does.
    """
    starter, ranks = rank_info.starter, rank_info.ranks
    if rank_info.unusable is not None:
        unset = " ".join(f"-u {name}" for name in (*_LEFT_OVER, "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        yield UserError(
            f"the environment has {rank_info.unusable}: it would be a rank of a run that nobody starts",
            f"env {unset} python train.py …, or torchrun, which sets all of them",
        )
    elif rank_info.without_srun is not None:
        tasks, nodes = rank_info.without_srun
        yield UserError(
            f"job {rank_info.job} has {tasks} tasks on {nodes} nodes, and this process was started without srun, "
            "beside them",
            "srun python train.py …, as scripts/slurm/train.sbatch does",
        )
    elif starter == "plain":
        yield from () if submits or rank_info.parent else _errors_of_plain_start(rank_info, trainer)
    else:
        if trainer.num_nodes not in ("auto", rank_info.nodes):
            where = f" ({', '.join(rank_info.node_names)})" if rank_info.node_names else ""
            option = {"srun": "sbatch --nodes", "torchrun": "torchrun --nnodes"}[starter]
            yield UserError(
                f"trainer.num_nodes={trainer.num_nodes}, and the job has {rank_info.nodes} nodes{where}",
                f"trainer.num_nodes=auto takes those of the job, {option}={trainer.num_nodes} asks for that many",
            )
        if trainer.devices not in ("auto", rank_info.per_node):
            option = {"srun": "srun --ntasks-per-node", "torchrun": "torchrun --nproc-per-node"}[starter]
            yield UserError(
                f"trainer.devices={trainer.devices}, and {starter} starts {rank_info.per_node} processes a node"
                + (f" (WORLD_SIZE={ranks})" if starter == "torchrun" else ""),
                f"trainer.devices={rank_info.per_node}, or {option}={trainer.devices}",
            )


def _errors_of_plain_start(rank_info: RankInfo, trainer: TrainerSettings) -> Iterator[UserError]:
    nodes, node_rank = trainer.node_count, rank_info.node_rank
    if node_rank is None and nodes > 1:
        yield UserError(
            f"trainer.num_nodes={nodes}, but this process was started alone: nothing starts the other nodes",
            f"sbatch scripts/slurm/train.sbatch …, torchrun --nnodes={nodes} …, or the same command on every node "
            "with NODE_RANK=0, 1, … and MASTER_ADDR, MASTER_PORT of the first one",
        )
    elif node_rank is not None and node_rank >= nodes:
        yield UserError(
            f"NODE_RANK={node_rank}, and trainer.num_nodes={nodes} has no such node",
            f"trainer.num_nodes={node_rank + 1} or more, or env -u NODE_RANK python train.py …",
        )


def another_has_ended(error: BaseException) -> bool:
    """Whether a collective has failed because another rank has ended; torch has no exception type for it."""
    message = str(error) if isinstance(error, RuntimeError) else ""
    return bool(re.search("connection (closed|reset)|broken pipe", message, re.IGNORECASE))


def expand_hosts(text: str) -> tuple[str, ...]:
    """Expands SLURM's notation for lists of hosts: "n[01-03,7],login" → n01, n02, n03, n7, login."""
    names: list[str] = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        grown = [""]
        for plain, ranges in re.findall(r"([^\[]+)|\[([^\]]*)\]", part):
            endings = [plain] if plain else [one for piece in ranges.split(",") for one in _numbers(piece)]
            grown = [before + ending for before in grown for ending in endings]
        names += grown
    return tuple(names)


def _numbers(piece: str) -> list[str]:
    first, _, last = piece.partition("-")
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last or first) + 1)]
