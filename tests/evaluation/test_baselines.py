"""The n-gram and lzma baselines: against the definition written out byte by byte, and on texts with known entropy."""

from __future__ import annotations

import lzma
import math
from collections import Counter

import numpy as np
import pytest

from rwkv_train.evaluation import baselines
from rwkv_train.evaluation.baselines import ngram_losses


def text(*words: str) -> np.ndarray:
    return np.frombuffer(" ".join(words).encode(), np.uint8)


def written_out(train: bytes, held_out: bytes, order: int) -> float:
    """Witten-Bell interpolation by its formula, with dictionaries."""
    padded = bytes(order) + train + held_out
    pairs: list[Counter[bytes]] = []  # by order: counts of context + byte
    for n in range(order + 1):
        pairs.append(Counter(padded[i - n : i + 1] for i in range(order, order + len(train))))

    def probability(context: bytes, byte: bytes) -> float:
        after = {pair[-1:]: count for pair, count in pairs[len(context)].items() if pair[:-1] == context}
        lower = probability(context[1:], byte) if context else 1 / 256
        if not after:
            return lower
        return (after.get(byte, 0) + len(after) * lower) / (sum(after.values()) + len(after))

    start = order + len(train)
    return -sum(
        math.log(probability(padded[i - order : i], padded[i : i + 1])) for i in range(start, len(padded))
    ) / len(held_out)


def test_ngrams_are_witten_bell() -> None:
    train, held_out = text("the cat sat on the mat", "the dog sat on the log"), text("the cog sat on zhe", "cat")
    losses = ngram_losses(train, held_out, (0, 1, 2, 3, 4, 6))
    expected = [written_out(train.tobytes(), held_out.tobytes(), order) for order in (0, 1, 2, 3, 4, 6)]
    assert losses == pytest.approx(expected, rel=1e-12)


def test_probabilities_sum_to_one() -> None:
    train, context = text("the cat sat on the mat"), text("the ca")
    for order in (0, 2, 4):
        losses = []
        for byte in range(256):
            more = np.append(context, np.uint8(byte))
            before, after = ngram_losses(train, context, (order,))[0], ngram_losses(train, more, (order,))[0]
            losses.append(after * len(more) - before * len(context))
        assert np.exp(-np.array(losses)).sum() == pytest.approx(1, rel=1e-9)


def test_a_repeated_text_costs_next_to_nothing_and_noise_all_of_it() -> None:
    noise = np.random.default_rng(0).integers(0, 256, 60_000, dtype=np.uint8)
    known = baselines(noise[:50_000], noise[:10_000])
    assert list(known) == ["2-gram", "3-gram", "4-gram", "lzma"]
    assert known["lzma"] < 0.5
    unknown = baselines(noise[:50_000], noise[50_000:])
    for name, loss in unknown.items():
        assert math.log(256) - 0.01 < loss < math.log(256) + 0.7, (
            name
        )  # noise cannot be predicted; interpolation costs up to half of p


def test_lzma_is_what_the_held_out_text_adds() -> None:
    train, held_out = text(*(f"line {n}" for n in range(500))), text(*(f"row {n}" for n in range(80)))
    sizes = [len(lzma.compress(part.tobytes(), preset=6)) for part in (train, np.concatenate((train, held_out)))]
    expected = (sizes[1] - sizes[0]) * 8 * math.log(2) / len(held_out)
    assert baselines(train, held_out)["lzma"] == pytest.approx(expected)


def test_a_training_text_shorter_than_an_order() -> None:
    assert all(math.isfinite(loss) for loss in baselines(text("ab"), text("abc")).values())


def test_the_held_out_text_is_not_learned_from() -> None:
    """The loss of a held-out text is that of its bytes given the training text: what follows changes nothing."""
    train, held_out = text("the cat sat on the mat"), text("unseen words of another kind")
    (alone,), (twice,) = ngram_losses(train, held_out, (3,)), ngram_losses(train, np.tile(held_out, 2), (3,))
    assert twice == pytest.approx(alone, rel=0.05)


@pytest.mark.slow
def test_on_the_library_they_are_what_a_study_found() -> None:
    from rwkv_train.config import DataSettings
    from rwkv_train.data.corpus import join, read_corpus
    from rwkv_train.data.tokenizers import ByteTokenizer

    corpus = read_corpus(DataSettings(source="stdlib", path=None, tokenizer="bytes", hold_out=0.05))
    train, held_out = (join(part, ByteTokenizer()).tokens for part in (corpus.train, corpus.held_out))
    assert ngram_losses(train, held_out, (2, 3, 4)) == pytest.approx([1.90, 1.50, 1.40], abs=0.1)
