"""The callbacks of a run: their order, on which the run depends."""

from __future__ import annotations

from pathlib import Path

from rwkv_train.cli import launcher
from rwkv_train.training.run import train
from tests.runs import words_for


def test_the_order_of_the_callbacks(tmp_path: Path) -> None:
    """Rows are written, judged, and only then saved; the watchdog comes after all that wait; the user's are last."""
    spy = ["packages=[tests]", "+callbacks.order._target_=tests.training.spies.Order"]
    words = words_for(
        tmp_path, "run", "budget.steps=2", "profile=true", *spy, f"+callbacks.order.path={tmp_path / 'o'}"
    )
    assert train(launcher.load(words)) == 0
    assert (tmp_path / "o").read_text().split() == [
        "Metrics",  # writes the rows of the steps that have ended
        "BadSteps",  # judges them, and rewinds
        "CheckpointCallback",  # saves what was judged
        "ProgressBar",
        "Profiling",
        "StopAtBudget",
        "StopOnSignal",
        "Watchdog",  # after those that wait for other ranks
        "LambdaCallback",  # the sample before the first step
        "Order",
    ]
