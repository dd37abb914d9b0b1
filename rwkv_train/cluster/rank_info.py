"""RankInfo: rank, node and rendezvous address of a process, from the variables of SLURM or torchrun alone."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from rwkv_train.config import TrainerSettings
from rwkv_train.errors import UserError

_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK")  # torchrun's, and those that Lightning sets for its own children
_PORTS = range(12000, 32000)  # below the ephemeral ports of operating systems


@dataclass(frozen=True)
class RankInfo:
    """One process among those of its run.

    Attributes:
        starter: what started the processes: srun, torchrun, or the run itself (plain).
        rank: of this process, from 0.
        local_rank: rank within its node, from 0.
        ranks: number of processes that were started together; 1 where the run starts them itself.
        node: name of this node.
        nodes: names of all nodes in the order of their ranks; empty unless srun started them.
        machines: number of nodes.
        address: host of the first rank.
        port: on that host, over which the ranks meet.
        agent_store: whether torchrun's agent listens on that port.
        job: SLURM's job ID, for scontrol; None: no job.
        restarts: number of times that the job was requeued, or that torchrun restarted the processes.
        without_srun: (tasks, nodes) of the job, where its batch script started this process without srun; else None.
    """

    starter: Literal["plain", "torchrun", "srun"] = "plain"
    rank: int = 0
    local_rank: int = 0
    ranks: int = 1
    node: str = ""
    nodes: tuple[str, ...] = ()
    machines: int = 1
    address: str = "127.0.0.1"
    port: int = 0
    agent_store: bool = False
    job: str | None = None
    restarts: int = 0
    without_srun: tuple[int, int] | None = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def started_by_rank(self) -> bool:
        """Whether another rank of its node has started this one, and has decided by then that there is a run."""
        return self.starter == "plain" and self.local_rank > 0

    @property
    def per_node(self) -> int:
        """Number of processes on each node."""
        return max(1, self.ranks // self.machines)

    def node_of(self, rank: int) -> str:
        """The name of a rank's node; "?" where it is unknown."""
        number = rank // self.per_node
        return self.nodes[number] if number < len(self.nodes) else "?"


def rank_info_of(environment: Mapping[str, str]) -> RankInfo:
    """The RankInfo of a process with these environment variables.

    torchrun's variables take precedence: inside a SLURM job it is torchrun that has started the process. A step of srun
    with one task is like a shell on that node: the run starts its processes itself.
    """

    def number(name: str, otherwise: int = 0) -> int:
        value = environment.get(name, "")
        return int(value) if value.isdigit() else otherwise

    job, restarts = environment.get("SLURM_JOB_ID"), number("SLURM_RESTART_COUNT")
    node = environment.get("SLURMD_NODENAME") or platform.node()
    array = environment.get("SLURM_ARRAY_JOB_ID")  # one of its tasks has the array's own number as SLURM_JOB_ID
    name = f"{array}_{number('SLURM_ARRAY_TASK_ID')}" if array else job
    if "TORCHELASTIC_RUN_ID" in environment:
        ranks = number("WORLD_SIZE", 1)
        return RankInfo(
            starter="torchrun",
            rank=number("RANK"),
            local_rank=number("LOCAL_RANK"),
            ranks=ranks,
            node=node,
            machines=max(1, ranks // max(1, number("LOCAL_WORLD_SIZE", ranks))),
            address=environment.get("MASTER_ADDR", "127.0.0.1"),
            port=number("MASTER_PORT"),
            agent_store=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            job=name,
            restarts=number("TORCHELASTIC_RESTART_COUNT"),
        )
    if number("SLURM_STEP_NUM_TASKS", 1) > 1 and job is not None:
        nodes = expand_hosts(environment.get("SLURM_STEP_NODELIST", ""))
        key = number("SLURM_JOB_ID") * 31 + restarts * 7919 + number("SLURM_STEP_ID") * 101
        return RankInfo(
            starter="srun",
            rank=number("SLURM_PROCID"),
            local_rank=number("SLURM_LOCALID"),
            ranks=number("SLURM_STEP_NUM_TASKS"),
            node=node,
            nodes=nodes,
            machines=number("SLURM_STEP_NUM_NODES", 1),
            address=environment.get("MASTER_ADDR") or (nodes[0] if nodes else "127.0.0.1"),
            port=number("MASTER_PORT")
            or _PORTS[key % len(_PORTS)],  # another one after a restart: the old may be bound
            job=name,
            restarts=restarts,
        )
    tasks, machines = number("SLURM_NTASKS", 1), number("SLURM_JOB_NUM_NODES", 1)
    left_out = "SLURM_STEP_NUM_TASKS" not in environment and job is not None and (tasks > 1 or machines > 1)
    return RankInfo(
        rank=max(number(name) for name in _RANKS),
        local_rank=number("LOCAL_RANK"),
        node=node,
        job=name,
        restarts=restarts,
        without_srun=(tasks, machines) if left_out else None,
    )


def placement_errors(rank_info: RankInfo, trainer: TrainerSettings) -> Iterator[UserError]:
    """Contradictions between what the config asks for and what the job has."""
    if rank_info.without_srun is not None:
        tasks, machines = rank_info.without_srun
        yield UserError(
            f"job {rank_info.job} has {tasks} tasks on {machines} nodes, and this process was started without srun, "
            "beside them",
            "srun python train.py …, as scripts/slurm/train.sbatch does",
        )
    elif rank_info.ranks > 1:
        if trainer.num_nodes not in ("auto", rank_info.machines):
            where = f" ({', '.join(rank_info.nodes)})" if rank_info.nodes else ""
            option = {"srun": "sbatch --nodes", "torchrun": "torchrun --nnodes"}[rank_info.starter]
            yield UserError(
                f"trainer.num_nodes={trainer.num_nodes}, and the job has {rank_info.machines} nodes{where}",
                f"trainer.num_nodes=auto takes those of the job, {option}={trainer.num_nodes} asks for that many",
            )
        if trainer.devices not in ("auto", rank_info.per_node):
            option = {"srun": "srun --ntasks-per-node", "torchrun": "torchrun --nproc-per-node"}[rank_info.starter]
            yield UserError(
                f"trainer.devices={trainer.devices}, and {rank_info.starter} starts {rank_info.per_node} processes "
                "a node",
                f"trainer.devices={rank_info.per_node}, or {option}={trainer.devices}",
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
