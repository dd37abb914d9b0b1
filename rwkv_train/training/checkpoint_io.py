"""Lightning's door to checkpoint.py: its ckpt_path flow reads and writes our directories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.plugins import CheckpointIO

from rwkv_train.training.checkpoint import LocalStorage, Storage, load, save


class DirectoryCheckpointIO(CheckpointIO):
    """The dict that RWKVModule.on_save_checkpoint made ↔ a checkpoint directory. Rank 0 writes, every rank reads."""

    def __init__(self, storage: Storage | None = None) -> None:
        self.storage: Storage = storage or LocalStorage()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        save(checkpoint, Path(path), self.storage)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return load(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        self.storage.delete(Path(path))
