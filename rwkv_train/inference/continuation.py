"""Several texts continued in one batch; each is what it would be if it were continued alone.

Nothing is padded: prompts of different lengths are read in steps of the shortest remaining length, and a text that has
ended leaves the batch. Each text has its own random generator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_train.data.tokenizers import Tokenizer, decode_after
from rwkv_train.inference.sampling import Sampling, sample
from rwkv_train.models import LanguageModel, State

_INCOMPLETE = "\ufffd".encode()  # what tokenizers give for a character whose other tokens are missing
MAX_CHARACTER_TOKENS = 8  # a longer run of incomplete characters is what the model wrote
MAX_PROMPT_CHUNK = 1024  # tokens of a prompt read in one forward pass; bounds the memory for activations

Prompt = tuple[Sequence[int], State | None]  # tokens, at least one, and the state (one row) before them, if any


@torch.inference_mode()
def read(model: LanguageModel, prompts: Sequence[Prompt]) -> tuple[Tensor, State]:
    """Reads prompts in the time-parallel mode.

    Returns:
        the logits after the last token of each (B, V), and the state there.
    """
    device = model.emb.weight.device
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row][0]))
    ids = [torch.tensor(list(prompts[row][0]), device=device) for row in order]
    state = join_states(model, [prompts[row][1] for row in order])
    logits: list[Tensor] = []
    states: list[State] = []
    done, live = 0, len(ids)  # tokens read of each; number of rows that have more, the last ones of `ids`
    while live:
        first = len(ids) - live
        upto = min(len(ids[first]), done + MAX_PROMPT_CHUNK)
        tokens = torch.stack([row[done:upto] for row in ids[first:]])
        found, state = model(tokens, state, None, _last)
        ended = sum(len(row) == upto for row in ids[first:])
        if ended:
            logits.extend(found[:ended])
            states.append(state.rows(range(ended)))
            state = state.rows(range(ended, live))
        done, live = upto, live - ended
    back = sorted(range(len(order)), key=order.__getitem__)
    return torch.stack([logits[row] for row in back]), State.join(states).rows(back)


def _last(hidden: Tensor, weight: Tensor) -> Tensor:
    """A readout: the logits (B, V) after the last token only."""
    return F.linear(hidden[:, -1], weight)


def join_states(model: LanguageModel, states: Sequence[State | None]) -> State | None:
    """States of one row each as one batch; None means the empty state, also where all are empty."""
    if all(state is None for state in states):
        return None
    empty = model.empty_state(1)
    return State.join([empty if state is None else state for state in states])


def streams(
    model: LanguageModel, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int | None], ended: set[int]
) -> Iterator[dict[int, int]]:
    """Yields the next token of each text that has not ended, as {number of the text: token}, until all have ended.

    Args:
        model: the model, on any device.
        prompts: the beginning of each text.
        sampling: how tokens are drawn.
        seeds: seed of each text's random generator; None: a random seed.
        ended: numbers of the texts that get no more tokens; the caller adds to it.
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
        on_cpu = logits.cpu()
        new = {text: sample(on_cpu[row], sampling, draws[text], seen[text]) for row, text in enumerate(live)}
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
    """The continuation of a text.

    Attributes:
        text: the decoded bytes, up to the stop string if one was generated.
        tokens: all generated tokens, including those of a stop string.
        ended: why the generation ended: length, stop or end_of_text.
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
    on_text: Callable[[int, bytes], None] | None = None,
    shown_before: Sequence[int] = (),
) -> list[Continuation]:
    """Continues texts until the maximum length, a stop string, or an end-of-text token.

    Args:
        model: the model, on any device.
        tokenizer: the model's tokenizer.
        prompts: the beginning of each text.
        tokens: maximum number of tokens of each continuation.
        sampling: how tokens are drawn.
        seeds: seed of each text's random generator; None: a random seed.
        stops: strings that end a text; the kept text ends before the first of them.
        at_end: whether an end-of-text token ends a text.
        on_text: called with a text's number and its next bytes, once no stop string can begin in them.
        shown_before: tokens of a text that the reader sees before the continuations, so that they begin with the blank
            that some tokenizers leave out at the start of a text.
    """
    results = [Continuation() for _ in prompts]
    if not tokens or not prompts:
        return results
    growing = [_GrowingText(tokenizer, stops, shown_before) for _ in prompts]
    shown, ended = [0] * len(prompts), set[int]()
    for new in streams(model, prompts, sampling, seeds, ended):
        for number, token in new.items():
            result, text = results[number], growing[number]
            if at_end and token == tokenizer.end_of_text:
                result.ended = "end_of_text"
                ended.add(number)
            else:
                result.tokens.append(token)
            last = number in ended or len(result.tokens) == tokens
            if text.grow(result.tokens, last):
                result.ended = "stop"
            if last or result.ended == "stop":
                ended.add(number)
                result.text = bytes(text.content)
            if on_text is not None:
                safe = len(text.content) - (0 if number in ended else text.held_back())
                on_text(number, bytes(text.content[shown[number] : safe]))
                shown[number] = max(shown[number], safe)
    return results


class _GrowingText:
    """The text of tokens that come one by one; each step decodes and searches the last few of them only.

    A tokenizer may decode a token differently after others (a blank before a word; a character of several tokens).
    Each time, the new tokens are decoded together with those before them, and what these give alone is left out.

    Args:
        tokenizer: decodes the tokens.
        stops: strings that end the text.
        prompt: the tokens before it.

    Attributes:
        content: the text so far, up to the first stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[bytes], prompt: Sequence[int] = ()) -> None:
        self.tokenizer, self.stops, self.content, self.prompt = tokenizer, stops, bytearray(), prompt
        self._longest = max(map(len, stops), default=1)
        self._before = 0  # the first token that is decoded again
        self._done = 0  # tokens that are in the content

    def grow(self, tokens: Sequence[int], last: bool) -> bool:
        """Adds the text of the tokens that are new; returns whether a stop string is found, where the text then ends.

        Args:
            tokens: all of them so far.
            last: whether no more will come; before that, an incomplete character waits for its other tokens.
        """
        if self._before == 0:
            more = decode_after(self.tokenizer, self.prompt, tokens)
            known = decode_after(self.tokenizer, self.prompt, tokens[: self._done])
        else:
            known = self.tokenizer.decode(tokens[self._before : self._done])
            more = self.tokenizer.decode(tokens[self._before :])
        if more.endswith(_INCOMPLETE) and not last and len(tokens) - self._done < MAX_CHARACTER_TOKENS:
            return False
        searched = max(0, len(self.content) - self._longest + 1)
        self.content += more[len(known) :]
        self._before, self._done = self._done, len(tokens)
        found = [offset for stop in self.stops if (offset := self.content.find(stop, searched)) >= 0]
        if found:
            del self.content[min(found) :]
        return bool(found)

    def held_back(self) -> int:
        """Length of the longest suffix that is a proper prefix of a stop string."""
        sizes = (size for stop in self.stops for size in range(1, len(stop)) if self.content.endswith(stop[:size]))
        return max(sizes, default=0)
