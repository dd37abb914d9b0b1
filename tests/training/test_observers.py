"""The order of a run's callbacks, on which the run depends."""

from __future__ import annotations

from pathlib import Path

from rwkv_train.cli import launcher
from rwkv_train.training.run import train
from tests.runs import overrides_for, rows


def test_the_order_of_the_callbacks(tmp_path: Path) -> None:
    """Rows are written, judged, and only then saved; the watchdog comes after all that wait; the user's are last."""
    spy = ["packages=[tests]", "+callbacks.order._target_=tests.training.spies.Order"]
    overrides = overrides_for(
        tmp_path, "run", "budget.steps=2", "profile=true", *spy, f"+callbacks.order.path={tmp_path / 'o'}"
    )
    assert train(launcher.load(overrides)) == 0
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


def test_the_state_after_a_bad_step_is_not_saved(tmp_path: Path) -> None:
    """A checkpoint is due after the very step that is bad: the run is rewound first."""
    fault = ["packages=[tests]", "+callbacks.fault._target_=tests.training.faults.Fault", "+callbacks.fault.steps=[10]"]
    more = ["budget.steps=12", "checkpoint.every.steps=5", "validation.every.steps=50", "health.nonfinite=rewind"]
    assert train(launcher.load(overrides_for(tmp_path, "run", *fault, *more))) == 0
    events = [(row["event"], row["step"]) for row in rows(tmp_path / "runs" / "run", "events.jsonl")]
    before = events[: events.index(("rewound", 5))]
    assert [step for event, step in before if event == "checkpoint"] == [5]
