"""What is said at the end of a run about its next start."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rwkv_train.training.finish import next_start, repeated

WITHOUT, WITH = "there is no checkpoint yet: ", ", resume=auto resumes from the checkpoint of step 8"


@pytest.mark.parametrize(
    ("last", "resume", "said"),
    [
        (8, "auto", "the same command resumes from the checkpoint of step 8"),
        (8, "never", f"the same command starts at step 0{WITH}"),
        (8, "runs/a/c", f"the same command starts from runs/a/c again{WITH}"),
        (None, "auto", f"{WITHOUT}the same command starts at step 0"),
        (None, "never", f"{WITHOUT}the same command starts at step 0"),
        (None, "runs/a/c", f"{WITHOUT}the same command starts from runs/a/c again"),
    ],
)
def test_the_next_start_is_that_of_the_command(last: int | None, resume: str, said: str) -> None:
    """Under resume=never and resume=PATH the same command does not go on from the newest checkpoint."""
    assert next_start(saving(last), resume) == said


def test_which_steps_come_again_after_an_unhealthy_ending() -> None:
    assert repeated(saving(8), 8) == ""
    assert "it repeats the steps 9 to 12 with the same data" in repeated(saving(8), 12)
    assert "it repeats the steps 1 to 3 with the same data" in repeated(saving(None), 3)


def saving(last: int | None) -> Any:
    """A CheckpointCallback whose newest checkpoint is of that step."""
    return SimpleNamespace(last=last)
