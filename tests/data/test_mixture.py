"""Mixtures: shares exact to within one sample, limited epochs, curricula, samples located by number alone."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_train.data.mixture import MAX_PATTERN_SAMPLES, Mixture, SourceShare, interleave, pattern_shares
from rwkv_train.errors import UserError


@settings(max_examples=60, deadline=None, derandomize=True)
@given(shares=st.lists(st.integers(0, 60), min_size=1, max_size=12).filter(any))
def test_every_prefix_has_its_share_to_within_one_sample(shares: list[int]) -> None:
    pattern, offsets = interleave(shares)
    taken = np.zeros(len(shares), np.int64)
    for position, (source, before) in enumerate(zip(pattern, offsets, strict=True)):
        assert taken[source] == before
        taken[source] += 1
        errors = taken - (position + 1) * np.array(shares) / sum(shares)
        assert np.abs(errors).max() < 1
    assert taken.tolist() == shares


def test_weights_are_exact_where_the_pattern_is_short() -> None:
    assert pattern_shares([Fraction("0.7"), Fraction("0.2"), Fraction("0.1")]).tolist() == [7, 2, 1]
    assert pattern_shares([Fraction(3), 0, Fraction(1)]).tolist() == [3, 0, 1]


def test_other_weights_are_rounded_and_none_is_lost() -> None:
    weights = [Fraction(n) for n in (10**12 + 39, 10**9 + 7, 3)]
    shares = pattern_shares(weights)
    assert abs(int(shares.sum()) - MAX_PATTERN_SAMPLES) <= 1
    assert shares[2] == 1
    assert abs(shares[1] / shares.sum() - float(weights[1] / sum(weights))) < 2 / MAX_PATTERN_SAMPLES


def locate_first(mixture: Mixture, samples: int) -> tuple[np.ndarray, np.ndarray]:
    return mixture.locate(np.arange(samples))


def test_any_sample_is_found_alone_and_each_of_a_source_comes_once() -> None:
    mixture = Mixture(
        [SourceShare("a", 0.7, 100, 2), SourceShare("b", 0.2, 50, 1.5), SourceShare("c", 0.1, 7)],
        [(150, {"a": 0.1, "b": 0.5, "c": 0.4}), (400, {"b": 1, "c": 2})],
    )
    sources, numbers = locate_first(mixture, 2000)
    for source in range(3):
        mine = numbers[sources == source]
        assert mine.tolist() == list(range(len(mine)))
    for sample in (0, 1, 149, 150, 151, 399, 400, 1234):
        origin, number = mixture.locate(np.array([sample]))
        assert (origin[0], number[0]) == (sources[sample], numbers[sample])
        assert mixture.counts(sample).tolist() == [int((sources[:sample] == n).sum()) for n in range(3)]
    assert int((sources == 1).sum()) == 75, "one and a half epochs, and no more"
    assert not (sources[400:] == 0).any()
    assert mixture.samples is None


def test_a_stage_keeps_its_shares() -> None:
    mixture = Mixture([SourceShare("a", 1, 10), SourceShare("b", 1, 10)], [(1001, {"a": 0.9, "b": 0.1})])
    sources, _ = locate_first(mixture, 5000)
    for first, last, weight in ((0, 1001, 0.5), (1001, 5000, 0.9)):
        taken = np.cumsum(sources[first:last] == 0)
        ideal = weight * np.arange(1, last - first + 1)
        assert np.abs(taken - ideal).max() <= 1
    assert mixture.weights(2000) == {"a": 0.9, "b": 0.1}


def test_a_mixture_ends_with_the_last_epoch_of_all_sources() -> None:
    mixture = Mixture([SourceShare("a", 3, 10, 1), SourceShare("b", 1, 20, 2)])
    assert mixture.samples == 50
    sources, numbers = locate_first(mixture, 50)
    assert sorted(zip(sources, numbers, strict=True)) == [(0, n) for n in range(10)] + [(1, n) for n in range(40)]
    with pytest.raises(UserError, match=r"ends after 50 samples\n.*more epochs"):
        mixture.locate(np.array([50]))


def test_a_distant_sample_is_located_at_once() -> None:
    mixture = Mixture([SourceShare("a", 2, 10**9), SourceShare("b", 1, 10**9)])
    source, number = mixture.locate(np.array([3 * 10**15, 3 * 10**15 + 1]))
    assert sorted(number.tolist()) in ([10**15, 2 * 10**15], [2 * 10**15, 2 * 10**15 + 1])
    assert set(source.tolist()) <= {0, 1}


def test_error_messages() -> None:
    shares = [SourceShare("a", 1, 10), SourceShare("b", 1, 10)]
    with pytest.raises(UserError, match=r"data.curriculum names the unknown source c\n.*known sources: a, b"):
        Mixture(shares, [(5, {"c": 1})])
    with pytest.raises(UserError, match="no source has a weight above 0 from sample 5 on"):
        Mixture(shares, [(5, {"a": 0})])
