"""The samples of each step: consecutive ones without those passed over, also where a resume has changed the batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_train.config import BatchSettings, DataSettings, SourceSettings, StageSettings
from rwkv_train.data.batches import Batches
from rwkv_train.data.course import Course
from rwkv_train.errors import UserError
from rwkv_train.training.attempt import continue_data, is_same_data, skipped_samples
from tests.checkpoint.metas import meta_of

bounds = st.lists(st.integers(0, 60), max_size=6, unique=True).map(sorted)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(bounds=bounds, step=st.integers(0, 5), first=st.integers(0, 50), each=st.integers(1, 7), at=st.integers(0, 9))
def test_it_is_the_samples_that_are_not_passed_over(
    bounds: list[int], step: int, first: int, each: int, at: int
) -> None:
    skips = tuple(zip(bounds[::2], bounds[1::2], strict=False))
    passed_over = {number for begin, end in skips for number in range(begin, end)}
    kept = [number for number in range(first, first + 200) if number not in passed_over]
    course = Course(step, first, each, skips)
    assert course.samples(step + at, 2).tolist() == kept[at * each : (at + 2) * each]
    assert course.number(step + at) == kept[at * each]
    assert course.end(step + at) == (kept[at * each - 1] + 1 if at else first)
    read = [number for begin, end in course.ranges(step + at) for number in range(begin, end)]
    assert read == kept[: at * each]


def mixture(folder: Path, tokens: int, context: int = 8, epochs: float | None = None, b: float = 0.25) -> Batches:
    for name, byte in (("a", b"a"), ("b", b"b")):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "text.txt").write_bytes(byte * 800)
    sources = tuple(SourceSettings(n, str(folder / n), w, epochs) for n, w in (("a", 1 - b), ("b", b)))
    stages = (StageSettings(100, {"a": 1.0, "b": 3.0}),)
    data = DataSettings("mixture", None, "bytes", 0.0, sources=sources, curriculum=stages)
    return Batches(data, BatchSettings(tokens, context, None), seed=1)


def test_another_batch_neither_repeats_nor_skips_a_sample(tmp_path: Path) -> None:
    """5 steps of 4 samples, then steps of 8: a mixture with an earlier stage, and with data that is passed over."""
    before, after = mixture(tmp_path, 32), mixture(tmp_path, 64)
    skips = ((6, 10), (28, 31))
    before.begin(0, None, Course(0, 0, 4, skips))
    meta = meta_of(
        step=5,
        batches=((0, 32),),
        data_tokens=before.course.end(5) * 8,
        tokens_by_source=before.tokens_by_source(5),
        data=before.digest,
    )
    continue_data(after, meta, skips)
    expected = [each for step in range(5, 15) for each in zip(*before.offsets(step), strict=True)]
    found = [each for step in range(5, 10) for each in zip(*after.offsets(step), strict=True)]
    assert found == expected
    assert after.tokens_by_source(10) == before.tokens_by_source(15)
    assert sum(after.tokens_by_source(10).values()) == 15 * 32


def test_the_tokens_of_each_source_are_counted_on_when_their_weights_change(tmp_path: Path) -> None:
    after = mixture(tmp_path, 32, b=0.5)
    counted = {"a": 96, "b": 32}
    continue_data(after, meta_of(step=4, batches=((0, 32),), data_tokens=128, tokens_by_source=counted), ())
    assert after.tokens_by_source(4) == counted
    assert after.tokens_by_source(5) == {"a": 96 + 8, "b": 32 + 24}


@pytest.mark.parametrize(("context", "first"), [(4, 10), (8, 5), (16, 3)])
def test_another_context_enters_its_order_behind_as_many_tokens(tmp_path: Path, context: int, first: int) -> None:
    data = mixture(tmp_path, 32, context)
    continue_data(data, meta_of(step=3, batches=((0, 32),), data_tokens=40), skipped_samples([[8, 16]], context))
    assert (data.course.step, data.course.first, data.course.each) == (3, first, 32 // context)
    assert data.skipped == {4: [(8, 16)], 8: [(8, 16)], 16: [(0, 32)]}[context]
    assert np.array_equal(data.course.samples(3), first + np.arange(32 // context))


def test_the_budget_of_a_resumed_run_counts_what_is_left(tmp_path: Path) -> None:
    data = mixture(tmp_path, 64, epochs=1.0)
    assert data.mixture.samples == 198
    data.refuse_budget(24)
    with pytest.raises(UserError, match=r"for 24 steps \(1,536 tokens\), the budget is 25 steps\n  budget.steps=24,"):
        data.refuse_budget(25)
    continue_data(data, meta_of(step=20, batches=((0, 16),), data_tokens=20 * 16), ())
    data.refuse_budget(39)
    message = r"for 19 more steps \(1,216 tokens\), the budget is without end\n  budget.steps=39,"
    with pytest.raises(UserError, match=message):
        data.refuse_budget(None)
    assert [data.steps_left(step, 100) for step in (20, 38, 39, 45)] == [19, 1, 0, 0]


def test_which_changes_leave_the_samples_as_they_are() -> None:
    assert is_same_data(["batch.tokens: 1 → 2", "optim.lr: 1 → 2", "batch.micro: 1 → 2", "validation.batches: 1 → 2"])
    for change in (
        "seed: 1 → 2",
        "batch.context: 8 → 16",
        "data.hold_out: 0 → 1",
        "the data itself: content hash a → b",
    ):
        assert not is_same_data(["optim.lr: 1 → 2", change])
