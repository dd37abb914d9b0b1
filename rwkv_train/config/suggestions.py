"""The nearest valid spelling of a name that does not exist, and the error message for one."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from rwkv_train.config.values import show
from rwkv_train.errors import UserError

# Names that users of Lightning and of its Hydra template look for, and the settings that they mean.
EQUIVALENT_SETTINGS = {
    "ckpt_path": "resume",
    "trainer.accumulate_grad_batches": "batch.micro (accumulation is derived from batch.tokens)",
    "trainer.gradient_clip_val": "optim.clip",
    "trainer.max_epochs": "budget.steps or budget.tokens",
    "trainer.max_steps": "budget.steps",
    "trainer.strategy": "strategy",
    "trainer.val_check_interval": "validation.every.steps",
}


def nearest(name: str, known: Sequence[str]) -> str | None:
    """The most similar of the known names; names with the same last part are preferred, whatever their group."""
    last = name.rsplit(".")[-1]
    same = [other for other in known if other.rsplit(".")[-1] == last]
    close = difflib.get_close_matches(name, same or known, 1, 0.0 if same else 0.6)
    if not close:
        by_last = {other.rsplit(".")[-1]: other for other in known}
        close = [by_last[other] for other in difflib.get_close_matches(last, by_last, 1, 0.75)]
    return close[0] if close else None


def suggestion(name: str, known: Sequence[str]) -> str:
    """The remedy for a name that is none of the known ones: the nearest of them, and all of them."""
    near = nearest(name, known)
    return (f"nearest: {near}; " if near else "") + f"valid: {', '.join(known) or 'none'}"


def unknown(name: str, value: object, known: Sequence[str]) -> UserError:
    """The error for a setting that does not exist."""
    inside = [other for other in known if other.startswith(f"{name}.")]
    if inside:
        return UserError(f"{name}={show(value)}: {name} is a group of settings", f"valid: {', '.join(inside)}")
    groups = {other.split(".")[0] for other in known} | {"experiment", "debug"}
    near = EQUIVALENT_SETTINGS.get(name) or nearest(name, [*known, *sorted(groups)])
    section = [other for other in known if other.startswith(f"{name.split('.')[0]}.") and other != "model.size"]
    valid = f"valid: {', '.join(section)}" if section else "`python train.py --help` lists all settings"
    return UserError(f"{name}={show(value)}: there is no {name}", f"nearest: {near}; {valid}" if near else valid)
