"""Lightning's ClusterEnvironment, made from our RankInfo.

Lightning is always given one. Left to itself it takes a batch script for a step of srun, or a shell for no job at all,
and its own SLURMEnvironment saves and requeues inside a signal handler, which hangs and writes incomplete checkpoints.
"""

from __future__ import annotations

import os
import threading

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from rwkv_train.cluster.rank_info import PARENT, PARENT_THREAD, RankInfo


class SrunEnvironment(ClusterEnvironment):
    """Ranks that srun has started."""

    def __init__(self, rank_info: RankInfo) -> None:
        self.rank_info = rank_info

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return self.rank_info.address

    @property
    def main_port(self) -> int:
        return self.rank_info.port

    @staticmethod
    def detect() -> bool:
        return False  # it is passed to the trainer, never detected

    def world_size(self) -> int:
        return self.rank_info.ranks

    def set_world_size(self, size: int) -> None:
        """Ignored: srun has set it."""

    def global_rank(self) -> int:
        return self.rank_info.rank

    def set_global_rank(self, rank: int) -> None:
        """Ignored: srun has set it."""

    def local_rank(self) -> int:
        return self.rank_info.local_rank

    def node_rank(self) -> int:
        return self.rank_info.rank // self.rank_info.per_node


class PlainEnvironment(LightningEnvironment):
    """A run that starts its processes itself, on one node or on each of several."""

    def __init__(self, rank_info: RankInfo) -> None:
        super().__init__()
        self.rank_info = rank_info

    @property
    def creates_processes_externally(self) -> bool:
        return self.rank_info.parent is not None

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Lightning calls it before it starts the other processes, which inherit the variable."""
        if not self.creates_processes_externally:
            os.environ[PARENT] = str(os.getpid())
            if threading.current_thread() is threading.main_thread():
                os.environ[PARENT_THREAD] = "1"

    def teardown(self) -> None:
        super().teardown()
        if not self.creates_processes_externally:
            os.environ.pop(PARENT, None)
            os.environ.pop(PARENT_THREAD, None)


def environment(rank_info: RankInfo) -> ClusterEnvironment:
    """The ClusterEnvironment of a process, by who has started it."""
    if rank_info.starter == "srun":
        return SrunEnvironment(rank_info)
    return TorchElasticEnvironment() if rank_info.starter == "torchrun" else PlainEnvironment(rank_info)
