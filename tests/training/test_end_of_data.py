"""Runs that read their sources to the last complete step finish, on one rank and two, however much is prefetched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rwkv_train.cli import launcher
from rwkv_train.data import ahead
from rwkv_train.data.arrays import Ints
from rwkv_train.data.batch import Batch
from rwkv_train.data.batches import Batches
from rwkv_train.data.iteration import TrainBatches
from rwkv_train.data.rows import BatchArrays
from rwkv_train.errors import UserError
from rwkv_train.training.run import train
from tests.runs import losses, overrides_for, rows, train_ranks, write_text

STEPS = 11  # what the sources below last for, of four samples; two samples are left over
SHORT = ("checkpoint.every.steps=4", "validation.every.steps=100", "health.spike=alert")


def mixture(folder: Path, name: str, *more: str) -> list[str]:
    """A run on two sources, of which one is read once and the other half."""
    for source, length in (("a", 32 * 31 + 5), ("b", 32 * 33)):
        if not (folder / source).exists():
            (folder / source).mkdir()
            text = write_text(folder / source / "text.txt").read_bytes()
            (folder / source / "text.txt").write_bytes(text[:length])
    sources = ",".join(
        f"{{name:{name},path:{folder / name},weight:1,epochs:{epochs}}}" for name, epochs in (("a", 1.0), ("b", 0.5))
    )
    overrides = overrides_for(folder, name, *SHORT, f"data.sources=[{sources}]", "data.hold_out=0", *more)
    return ["data=mixture", *(each for each in overrides if not each.startswith(("data=", "data.path=")))]


def ended(run: Path) -> list[str]:
    return [row["event"] for row in rows(run, "events.jsonl")][-1:]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the recommended budget, in a single pass."""
    tmp_path = tmp_path_factory.mktemp("whole")
    with pytest.raises(UserError, match=rf"the budget is 500 steps\n  budget.steps={STEPS},"):
        train(launcher.load(mixture(tmp_path, "whole", "budget.steps=500")))
    assert train(launcher.load(mixture(tmp_path, "whole", f"budget.steps={STEPS}"))) == 0
    assert ended(tmp_path / "runs" / "whole") == ["finished"]
    return tmp_path


@pytest.mark.parametrize("prefetched", [0, 1, 100])
def test_exactly_the_recommended_budget(whole: Path, prefetched: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In four passes, without a thread that reads ahead and with one that does, by less and by more than the run."""
    if prefetched:
        monkeypatch.setattr(ahead, "MAX_PINNED_BATCHES", prefetched)
        monkeypatch.setattr(Batch, "pin", lambda batch: batch)
        monkeypatch.setattr(Batches, "training", lambda data: ahead.Ahead(TrainBatches(data)))
    name = f"prefetched_{prefetched}"
    assert train(launcher.load(mixture(whole, name, f"budget.steps={STEPS}", "batch.micro=1"))) == 0
    run = whole / "runs" / name
    assert ended(run) == ["finished"]
    assert losses(run) == pytest.approx(losses(whole / "runs" / "whole"), rel=1e-6)
    meta = json.loads((run / "checkpoints" / "step_000000011-0001" / "meta.json").read_text())
    assert meta["probe_sample"] == STEPS * 4 + 2 - 8, "too near to the end for eight samples of the next step"


def test_exactly_the_recommended_budget_on_two_ranks(whole: Path) -> None:
    train_ranks(mixture(whole, "ranks", f"budget.steps={STEPS}", "batch.micro=1"), 2)
    assert ended(whole / "runs" / "ranks") == ["finished"]
    assert losses(whole / "runs" / "ranks") == pytest.approx(losses(whole / "runs" / "whole"), rel=1e-6)


@pytest.mark.parametrize(("budget", "code"), [(STEPS - 3, 0), (STEPS - 2, 5)])
def test_skipped_data_counts(tmp_path: Path, budget: int, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Rewound from step 7 to step 4, the run lasts three steps less; the last batch is in hand when it is rewound."""
    fault = [
        "packages=[tests]",
        "+callbacks.fault._target_=tests.training.faults.Fault",
        "+callbacks.fault.steps=[5,6,7]",
    ]
    assert train(launcher.load(mixture(tmp_path, "run", *fault, f"budget.steps={budget}"))) == code
    run = tmp_path / "runs" / "run"
    assert [(row["step"], row["reached"]) for row in rows(run, "events.jsonl") if row["event"] == "rewound"] == [(4, 7)]
    assert ended(run) == [{0: "finished", 5: "unhealthy"}[code]]
    if code:
        assert "the data does not last" in capsys.readouterr().out
    else:
        assert len(losses(run)) == budget


def test_no_batch_behind_the_end_of_the_run_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that the vocabulary lacks, in the first step that is not trained, does not concern the run."""
    config = launcher.load(overrides_for(tmp_path, "run", "data.hold_out=0", "budget.steps=3", *SHORT))
    after = Batches(config.data, config.batch, config.seed).offsets(3)[1].tolist()
    read = Batches._read

    def strict(data: Batches, sources: Ints, offsets: Ints, *rows: Any) -> BatchArrays:
        if len(offsets) > 1 and set(offsets.tolist()) & set(after):
            raise UserError("a token outside the vocabulary")
        return read(data, sources, offsets, *rows)

    monkeypatch.setattr(Batches, "_read", strict)
    assert train(launcher.load(overrides_for(tmp_path, "run", "data.hold_out=0", "budget.steps=3", *SHORT))) == 0
    assert ended(tmp_path / "runs" / "run") == ["finished"]
