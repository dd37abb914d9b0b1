"""RUN/replay/step_….json, what `replay=FILE` needs to repeat a bad step. Written by callbacks/bad_steps.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rwkv_train.json_files import load_object
from rwkv_train.rundir.directory import PassedOver

_TYPES: dict[str, tuple[type, ...]] = {
    "step": (int,),
    "config": (dict,),
    "samples": (list,),
    "checkpoint": (str, type(None)),
    "kind": (str,),
    "loss": (float, int, type(None)),
}


def load_replay(path: Path) -> dict[str, Any]:
    """The content of a replay file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is none.
    """
    found = {"kind": "", "loss": None, "skipped": [], **load_object(path)}
    for key, types in _TYPES.items():
        if key not in found or type(found[key]) not in types:
            raise ValueError(f"its {key} is missing or of another type")
    if found["step"] < 1:
        raise ValueError("its step is below 1")
    PassedOver.of({"rewinds": 0, "skipped": found["skipped"]})
    return found
