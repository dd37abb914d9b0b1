"""Texts continued together: each one is what it would be alone, whatever is in the batch beside it.

Nothing is padded: of prompts of different lengths, as many tokens are read at once as all of them still have, and a
text that has ended leaves the batch. Each text has its own draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_train.data.tokenizers import Tokenizer
from rwkv_train.inference.sampling import Sampling, sample
from rwkv_train.models import LanguageModel, State

_AT_ONCE = 1024  # tokens of a prompt that are read in one pass: the memory for a long one does not grow with it

Prompt = tuple[Sequence[int], State | None]  # tokens, at least one, and the memory (of one row) of what is before them


@torch.inference_mode()
def read(model: LanguageModel, prompts: Sequence[Prompt]) -> tuple[Tensor, State]:
    """Reads prompts in the time-parallel mode.

    Returns:
        the logits after the last token of each (B, V), and the state there.
    """
    device = model.emb.weight.device
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row][0]))
    ids = [torch.tensor(list(prompts[row][0]), device=device) for row in order]
    state = begin(model, [prompts[row][1] for row in order])
    logits: list[Tensor] = []
    states: list[State] = []
    done, live = 0, len(ids)  # tokens read of each; the rows that have more, the last ones of `ids`
    while live:
        first = len(ids) - live
        upto = min(len(ids[first]), done + _AT_ONCE)
        tokens = torch.stack([row[done:upto] for row in ids[first:]])
        found, state = model(tokens, state, None, _last)
        ended = sum(len(row) == upto for row in ids[first:])
        if ended:
            logits.extend(found[:ended])
            states.append(state.rows(range(ended)))
            state = state.rows(range(ended, live))
        done, live = upto, live - ended
    back = sorted(range(len(order)), key=order.__getitem__)
    return torch.stack([logits[place] for place in back]), State.join(states).rows(back)


def _last(hidden: Tensor, weight: Tensor) -> Tensor:
    """The logits (B, V) after the last token: those of a prompt's other tokens are not needed."""
    return F.linear(hidden[:, -1], weight)


def begin(model: LanguageModel, states: Sequence[State | None]) -> State | None:
    """States of one row each as one batch, where None is a text of which nothing was read; None: all are."""
    if all(state is None for state in states):
        return None
    empty = model.empty_state(1)
    return State.join([empty if state is None else state for state in states])


def streams(
    model: LanguageModel, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int | None], ended: set[int]
) -> Iterator[dict[int, int]]:
    """Yields, again and again, the next token of each text that has not ended, by the text's number.

    Args:
        model: on any device.
        prompts: what each text begins with.
        sampling: how tokens are drawn.
        seeds: of each text's draws; None: a random one.
        ended: the caller adds the texts that are to get no more tokens.
    """
    device = model.emb.weight.device
    draws = []
    for seed in seeds:
        draws.append(torch.Generator())
        if seed is None:
            draws[-1].seed()
        else:
            draws[-1].manual_seed(seed)
    seen = [set(ids) if sampling.repetition_penalty != 1 else set() for ids, _ in prompts]
    logits, state = read(model, prompts)
    live = list(range(len(prompts)))
    while live:
        told = logits.cpu()
        new = {text: sample(told[row], sampling, draws[text], seen[text]) for row, text in enumerate(live)}
        yield new
        if ended.intersection(live):
            state = state.rows([row for row, text in enumerate(live) if text not in ended])
            live = [text for text in live if text not in ended]
        if sampling.repetition_penalty != 1:
            for text in live:
                seen[text].add(new[text])
        if live:
            with torch.inference_mode():
                found, state = model(torch.tensor([[new[text]] for text in live], device=device), state)
            logits = found[:, -1]


@dataclass
class Continuation:
    """What a text went on with.

    Attributes:
        text: the bytes before the stop string, if one came.
        tokens: all that were drawn, those of a stop string too.
        ended: why no more came: length, stop or end_of_text.
    """

    text: bytes = b""
    tokens: list[int] = field(default_factory=list)
    ended: str = "length"


def continue_texts(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    tokens: int,
    sampling: Sampling,
    seeds: Sequence[int | None],
    stops: Sequence[bytes] = (),
    at_end: bool = True,
    told: Callable[[int, bytes], None] | None = None,
) -> list[Continuation]:
    """Continues texts until they are long enough, hold a stop string or come to their end.

    Args:
        tokens: at most so many for each.
        stops: strings that end a text; what is kept ends before the first of them.
        at_end: whether an end-of-text ends it.
        told: is called with a text's number and its next bytes, as soon as no stop string can begin in them.
    """
    results = [Continuation() for _ in prompts]
    if not tokens or not prompts:
        return results
    settled, ended = [0] * len(prompts), set[int]()
    for new in streams(model, prompts, sampling, seeds, ended):
        for number, token in new.items():
            result = results[number]
            if at_end and token == tokenizer.end_of_text:
                result.ended = "end_of_text"
                ended.add(number)
            else:
                result.tokens.append(token)
                piece = tokenizer.decode([token]) if not stops else b""
                result.text = tokenizer.decode(result.tokens) if stops else result.text + piece
                found = [place for stop in stops if (place := result.text.find(stop)) >= 0]
                if found:
                    result.text, result.ended = result.text[: min(found)], "stop"
                if found or len(result.tokens) == tokens:
                    ended.add(number)
            if told is not None:
                safe = len(result.text) - (0 if number in ended else _may_begin(result.text, stops))
                told(number, result.text[settled[number] : safe])
                settled[number] = max(settled[number], safe)
    return results


def _may_begin(text: bytes, stops: Sequence[bytes]) -> int:
    """The length of the longest end of a text that a stop string begins with."""
    return max((size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0)
