"""A place in a job, as Lightning asks for it.

Always given: left to itself Lightning takes a batch script for a step of srun's, or a shell for none, and with its own
SLURMEnvironment it saves and requeues inside of a signal handler, which hangs and writes half checkpoints.
"""

from __future__ import annotations

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from rwkv_train.cluster.rank_info import Place


class Started(ClusterEnvironment):
    """Processes that srun has started."""

    def __init__(self, place: Place) -> None:
        self.place = place

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return self.place.address

    @property
    def main_port(self) -> int:
        return self.place.port

    @staticmethod
    def detect() -> bool:
        return False  # it is given, never found

    def world_size(self) -> int:
        return self.place.ranks

    def set_world_size(self, size: int) -> None:
        """Nothing: it is what it is."""

    def global_rank(self) -> int:
        return self.place.rank

    def set_global_rank(self, rank: int) -> None:
        """Nothing: it is what it is."""

    def local_rank(self) -> int:
        return self.place.local_rank

    def node_rank(self) -> int:
        return self.place.rank // self.place.per_node


def environment(place: Place) -> ClusterEnvironment:
    """Lightning's view of a place."""
    if place.starter == "srun":
        return Started(place)
    return TorchElasticEnvironment() if place.starter == "torchrun" else LightningEnvironment()
