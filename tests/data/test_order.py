"""The order of samples: every window exactly once per epoch, the same for any number of ranks (PAINS 13, 20)."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_train.config.mesh import Mesh
from rwkv_train.data.order import ReferenceOrder, ShuffledOrder, permute, shuffled, split_batch
from rwkv_train.errors import UserError


def keys(seed: int, count: int) -> np.ndarray:
    return np.full(count, seed, np.uint64)


def epoch(order: ShuffledOrder, number: int) -> np.ndarray:
    return order.starts(np.arange(number * order.windows, (number + 1) * order.windows))


@pytest.mark.parametrize("key", [0, 1, 2**63 + 5])
def test_permute_is_a_bijection_of_every_small_range(key: int) -> None:
    for size in range(1, 300):
        assert sorted(permute(np.arange(size), size, keys(key, size))) == list(range(size)), size


@given(st.integers(1, 50_000), st.integers(0, 2**64 - 1))
@settings(max_examples=30, deadline=None)
def test_permute_is_a_bijection_of_any_range(size: int, key: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size, keys(key, size))), np.arange(size))


def test_permute_reaches_far_beyond_32_bits() -> None:
    size, positions = 10**13 + 7, np.arange(10**12, 10**12 + 5_000)
    images = permute(positions, size, keys(3, 5_000))
    assert len(set(images.tolist())) == 5_000
    assert images.min() >= 0
    assert images.max() < size


def chi_square(counts: np.ndarray) -> float:
    """The statistic in standard deviations from what a uniform distribution gives."""
    freedom = counts.size - 1
    expected = counts.mean()
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


def test_positions_are_uniform_and_neighbours_independent() -> None:
    """The images of neighbouring positions, as cells of a 16 × 16 grid, over ranges that are no power of two."""
    for size in (100_003, 1_000_000):
        images = permute(np.arange(size), size, keys(7, size)) * 16 // size
        assert abs(chi_square(np.bincount(images[0 : size - 1 : 2] * 16 + images[1:size:2]))) < 5
        head = images[: size // 10]  # a tenth of an epoch is a fair sample of the complete text
        assert abs(chi_square(np.bincount(head, minlength=16))) < 5


def test_epochs_are_independent_of_each_other() -> None:
    size = 100_003
    first, second = (permute(np.arange(size), size, keys(key, size)) for key in (11, 12))
    assert abs(chi_square(np.bincount((first * 16 // size) * 16 + second * 16 // size))) < 5
    assert (first == second).sum() < 12  # one is expected


@pytest.mark.parametrize("context", [1, 2, 7, 32])
@pytest.mark.parametrize("tokens", [33, 63, 64, 65, 1_000])
def test_every_window_of_an_epoch_comes_once(tokens: int, context: int) -> None:
    order = ShuffledOrder(seed=5, tokens=tokens, context=context)
    offsets = set()
    for number in range(40):
        starts = np.sort(epoch(order, number))
        assert np.array_equal(np.diff(starts), np.full(order.windows - 1, context)), "side by side, without overlap"
        assert starts[0] >= 0
        assert starts[-1] + context < tokens, "the last target is inside"
        offsets.add(int(starts[0]))
    room = tokens - order.windows * context
    assert tokens < 2 * context or context <= room < 2 * context
    assert offsets <= set(range(room))
    assert len(offsets) > min(room, 40) // 3, "each epoch cuts elsewhere"


def test_almost_no_text_is_left_out() -> None:
    order = ShuffledOrder(seed=0, tokens=100_000, context=64)
    seen = np.zeros(100_000, bool)
    for number in range(50):
        for start in epoch(order, number):
            seen[start : start + 64] = True
        assert (~seen).sum() < 2 * 64
    assert (~seen).sum() < 16, "what one epoch's offset leaves out, another's has"


def test_order_differs_between_seeds_and_between_epochs() -> None:
    one, other = ShuffledOrder(1, 10_000, 10), ShuffledOrder(2, 10_000, 10)
    assert not np.array_equal(epoch(one, 0), epoch(other, 0))
    assert not np.array_equal(epoch(one, 0) // 10, epoch(one, 1) // 10)
    assert np.array_equal(epoch(one, 3), epoch(ShuffledOrder(1, 10_000, 10), 3))
    assert len(epoch(ShuffledOrder(-1, 10_000, 10), 0)) == 999, "a negative seed is a seed"


def test_a_batch_across_the_end_of_an_epoch_is_one_of_each() -> None:
    order = ShuffledOrder(seed=1, tokens=101, context=10)
    assert order.windows == 9
    across = order.starts(np.arange(5, 14))
    assert np.array_equal(across, np.concatenate((epoch(order, 0)[5:], epoch(order, 1)[:5])))


def test_the_order_is_pinned() -> None:
    """Checkpoints of earlier versions must resume with the same data: other numbers here break every resume."""
    assert ShuffledOrder(seed=0, tokens=1_000, context=16).starts(np.arange(6)).tolist() == [
        569,
        761,
        809,
        425,
        393,
        521,
    ]


@pytest.mark.parametrize("ranks", range(1, 65))
def test_the_ranks_share_out_exactly_the_global_batch(ranks: int) -> None:
    for micro, accumulation in ((1, 1), (1, 3), (3, 1), (2, 5)):
        split = split_batch(ranks * micro * accumulation * 8, 8, micro, Mesh(ranks))
        assert (split.micro, split.accumulation, split.samples) == (micro, accumulation, ranks * micro * accumulation)
        for step in (0, 7):
            shares = [split.share(step, index, rank) for index in range(accumulation) for rank in range(ranks)]
            assert np.array_equal(np.concatenate(shares), np.arange(step * split.samples, (step + 1) * split.samples))


@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 8), st.integers(1, 64))
def test_a_step_has_the_same_samples_on_any_number_of_ranks(ranks: int, micro: int, passes: int, step: int) -> None:
    tokens = ranks * micro * passes * 4
    many, one = split_batch(tokens, 4, micro, Mesh(ranks)), split_batch(tokens, 4, None, Mesh(1))
    shares = [many.share(step, index, rank) for index in range(many.accumulation) for rank in range(ranks)]
    assert sorted(np.concatenate(shares)) == sorted(one.share(step, 0, 0))


def test_without_micro_a_device_takes_its_share_in_one_pass() -> None:
    assert (split_batch(4096, 128, None, Mesh(4)).micro, split_batch(4096, 128, None, Mesh(4)).accumulation) == (8, 1)


@pytest.mark.parametrize(
    ("tokens", "context", "micro", "ranks", "message"),
    [
        (
            1000,
            128,
            None,
            1,
            "batch.tokens=1000 is not a multiple of 128 (batch.context=128)\n"
            "  nearest: batch.tokens=896, batch.tokens=1024",
        ),
        (
            1024,
            128,
            3,
            2,
            "batch.tokens=1024 is not a multiple of 768 (batch.context=128 × batch.micro=3 × 2 devices)\n"
            "  nearest: batch.tokens=768, batch.tokens=1536",
        ),
        (
            64,
            128,
            None,
            1,
            "batch.tokens=64 is not a multiple of 128 (batch.context=128)\n  nearest: batch.tokens=128",
        ),
    ],
)
def test_a_batch_that_cannot_be_shared_out(
    tokens: int, context: int, micro: int | None, ranks: int, message: str
) -> None:
    with pytest.raises(UserError) as error:
        split_batch(tokens, context, micro, Mesh(ranks))
    assert str(error.value) == message


def test_less_text_than_one_sample() -> None:
    assert ShuffledOrder(0, 65, 64).starts(np.arange(3)).tolist() == [0, 0, 0]
    with pytest.raises(UserError, match=r"has 64 tokens; one sample of batch\.context=64 needs 65\n.*data\.path"):
        ShuffledOrder(0, 64, 64)


def test_the_reference_order_is_rwkv_lms() -> None:
    """Against dataset.py of RWKV-LM, written out: magic_prime is looked up by hand there."""
    tokens, context, magic_prime = 1498226207, 512, 2926181
    order = ReferenceOrder(tokens, context)
    assert order.windows == magic_prime, "the value in RWKV-LM's own comment on this data"
    factor = int(magic_prime * ((5**0.5) - 1) / 2)
    world_size, samples_per_epoch = 4, 40320
    for epoch, idx, rank in ((0, 0, 0), (0, 1, 3), (3, 77, 2), (90, 10079, 1)):
        ii = 1 + epoch * samples_per_epoch + (idx * world_size) + rank
        expected = ((factor * ii * ii * ii) % magic_prime) * context
        assert order.starts(np.array([ii - 1])).tolist() == [expected]


def magic_prime_of_make_data(data_size: int, ctx_len: int) -> int | None:
    """The end of RWKV-LM's RWKV-v5/make_data.py, written out."""

    def is_prime(n: int) -> bool:
        if n <= 1:
            return False
        if n <= 3:
            return True
        if n % 2 == 0 or n % 3 == 0:
            return False
        i = 5
        while i * i <= n:
            if n % i == 0 or n % (i + 2) == 0:
                return False
            i += 6
        return True

    n_chunk = int(data_size // ctx_len) - 1
    for i in range(n_chunk, 0, -1):
        if i % 3 == 2 and is_prime(i):
            return i
    return None


def test_the_prime_is_that_of_make_data() -> None:
    """Every number of windows up to 600, and sizes up to 10^12 tokens; a whole number of windows is no exception."""
    draw = random.Random(3)
    sizes = [(windows * 16 + rest, 16) for windows in range(3, 600) for rest in (0, 1, 15)]
    sizes += [(draw.randrange(10**6, 10 ** draw.randint(7, 12)), draw.choice([512, 1024, 4096])) for _ in range(300)]
    for tokens, context in sizes:
        assert ReferenceOrder(tokens, context).windows == magic_prime_of_make_data(tokens, context), (tokens, context)
    assert ReferenceOrder(802_997_237, 4096).windows == magic_prime_of_make_data(802_997_237, 4096) == 196_043


@pytest.mark.parametrize("tokens", [21, 22, 40, 41, 333, 1000, 12345])
def test_the_reference_order_visits_every_window_once(tokens: int) -> None:
    order = ReferenceOrder(tokens, 7)
    starts = order.starts(np.arange(order.windows))
    assert sorted(starts.tolist()) == [7 * window for window in range(order.windows)]
    assert max(starts) + 7 < tokens, "the last target is inside"
    assert np.array_equal(order.starts(np.arange(order.windows, 2 * order.windows)), starts)


def test_the_reference_order_of_too_little_text() -> None:
    with pytest.raises(UserError, match=r"needs three windows of batch.context=8: 24 tokens, not 20"):
        ReferenceOrder(20, 8)


@pytest.mark.parametrize("size", [1, 2, 3, 100, 1023])
def test_shuffled_things_come_once_an_epoch_in_another_order(size: int) -> None:
    first, second = (shuffled(np.arange(epoch * size, (epoch + 1) * size), size, seed=5) for epoch in (0, 1))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(size))
    assert size < 4 or not np.array_equal(first, second)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7, 8, 16, 31, 32, 48, 64])
@pytest.mark.parametrize("micro", [1, 3, None])
def test_shares_of_any_number_of_ranks_are_the_batch(ranks: int, micro: int | None) -> None:
    samples = ranks * (micro or 1) * 4
    split = split_batch(samples * 16, 16, micro, Mesh(ranks))
    for step in (0, 1, 10**6):
        shares = [split.share(step, index, rank) for index in range(split.accumulation) for rank in range(ranks)]
        assert np.concatenate(shares).tolist() == list(range(step * samples, (step + 1) * samples))
