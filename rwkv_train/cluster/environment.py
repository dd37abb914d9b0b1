"""A place in a job, as Lightning asks for it.

Always given: left to itself Lightning takes a batch script for a step of srun's, or a shell for none, and with its own
SLURMEnvironment it saves and requeues inside of a signal handler, which hangs and writes half checkpoints.
"""

from __future__ import annotations

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from rwkv_train.cluster.rank_info import RankInfo


class Started(ClusterEnvironment):
    """Processes that srun has started."""

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
        return False  # it is given, never found

    def world_size(self) -> int:
        return self.rank_info.ranks

    def set_world_size(self, size: int) -> None:
        """Nothing: it is what it is."""

    def global_rank(self) -> int:
        return self.rank_info.rank

    def set_global_rank(self, rank: int) -> None:
        """Nothing: it is what it is."""

    def local_rank(self) -> int:
        return self.rank_info.local_rank

    def node_rank(self) -> int:
        return self.rank_info.rank // self.rank_info.per_node


def environment(rank_info: RankInfo) -> ClusterEnvironment:
    """Lightning's view of a process's rank."""
    if rank_info.starter == "srun":
        return Started(rank_info)
    return TorchElasticEnvironment() if rank_info.starter == "torchrun" else LightningEnvironment()
