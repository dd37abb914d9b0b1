"""Lightning's view of the batches: the only file of this folder that imports Lightning."""

from __future__ import annotations

from collections.abc import Iterable

import lightning as L

from rwkv_train.data.batch import Batch
from rwkv_train.data.batches import Batches


class DataModule(L.LightningDataModule):
    """Hands Lightning the batches of the rank that it runs on.

    Raises:
        RuntimeError: on setup, the trainer has another number of ranks than the batches were split for.
    """

    def __init__(self, batches: Batches) -> None:
        super().__init__()
        self.batches = batches

    def setup(self, stage: str) -> None:
        """Called by Lightning in every process before it asks for batches."""
        trainer = self.trainer
        assert trainer is not None
        mesh = self.batches.split.mesh
        if trainer.world_size != mesh.ranks:
            raise RuntimeError(f"the trainer has {trainer.world_size} ranks, the data was split for {mesh.ranks}")
        self.batches.rank = mesh.data_rank(trainer.global_rank)
        self.batches.pinned = trainer.strategy.root_device.type == "cuda"

    def train_dataloader(self) -> Iterable[Batch]:
        return self.batches.training()

    def val_dataloader(self) -> Iterable[Batch] | list[Iterable[Batch]]:
        loaders: list[Iterable[Batch]] = [self.batches.validation(source) for source in self.batches.validated]
        return loaders[0] if len(loaders) == 1 else loaders
