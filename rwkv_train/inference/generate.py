"""Step-by-step generation: `rwkv-train generate CKPT --prompt …`."""

from __future__ import annotations

import codecs
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from rwkv_train.errors import UserError
from rwkv_train.inference.continuation import continue_texts, streams
from rwkv_train.inference.loading import load_model, tokenizer_of
from rwkv_train.inference.sampling import Sampling
from rwkv_train.models import LanguageModel


def generate(
    model: LanguageModel,
    prompt: Sequence[int],
    tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> Iterator[int]:
    """Yields new token ids one by one.

    The prompt is read in the time-parallel mode, the rest step by step: time per token and memory do not depend on how
    many were read. Runs on the model's device.

    Args:
        prompt: token ids; an empty one starts from end-of-text (0).
        tokens: how many to yield.
        temperature: 0 takes the likeliest token each time.
        top_p: probability mass that is sampled from, 0 < top_p ≤ 1.
        seed: of the draws; None: a random one.
    """
    drawn = streams(model, [(list(prompt) or [0], None)], Sampling(temperature, top_p), [seed], set())
    for new in islice(drawn, tokens):
        yield new[0]


def run(
    checkpoint: str,
    prompt: str,
    tokens: int,
    sampling: Sampling,
    seed: int | None = None,
    tokenizer_name: str | None = None,
    stops: Sequence[str] = (),
    at_end: bool = False,
    batch: int = 1,
    as_json: bool = False,
    device: str = "cpu",
) -> int:
    """The command: a single text is streamed to standard output behind its prompt, several come when all are done.

    Args:
        checkpoint: a directory or a .pth file.
        prompt: what the texts go on from; an empty one starts from end-of-text.
        tokens: at most so many for each text.
        sampling: how they are drawn.
        seed: of the first text's draws, the next one's is one more; None: random ones.
        tokenizer_name: None: the one that the checkpoint remembers.
        stops: strings that end a text; they are not shown.
        at_end: whether an end-of-text ends it.
        batch: how many texts.
        as_json: whether one JSON object is printed instead, with everything in it.
        device: cpu, cuda or auto.

    Raises:
        UserError: no such checkpoint, a vocabulary without a tokenizer here, a value out of range.
    """
    if tokens < 0 or batch < 1 or not all(stops):
        what = f"--tokens {tokens}" if tokens < 0 else f"--batch {batch}" if batch < 1 else "--stop ''"
        raise UserError(f"{what} is out of range", "tokens ≥ 0, batch ≥ 1, stop strings of at least one character")
    model = load_model(Path(checkpoint), device)
    tokenizer = tokenizer_of(Path(checkpoint), model.config.vocab_size, tokenizer_name)
    ids = tokenizer.encode(prompt.encode()).tolist() or [tokenizer.end_of_text]
    seeds = [None if seed is None else seed + number for number in range(batch)]
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    streamed = batch == 1 and not as_json

    def show(_: int, piece: bytes) -> None:
        sys.stdout.write(decoder.decode(piece))
        sys.stdout.flush()

    if streamed:
        sys.stdout.write(prompt)
    encoded = [stop.encode() for stop in stops]
    texts = continue_texts(
        model, tokenizer, [(ids, None)] * batch, tokens, sampling, seeds, encoded, at_end, show if streamed else None
    )
    if as_json:
        told = [
            {"text": text.text.decode(errors="replace"), "tokens": text.tokens, "ended": text.ended, "seed": drawn}
            for text, drawn in zip(texts, seeds, strict=True)
        ]
        about = {"checkpoint": checkpoint, "tokenizer": tokenizer.identity, "prompt": prompt}
        print(json.dumps({**about, "sampling": asdict(sampling), "stop": list(stops), "texts": told}))
    elif streamed:
        print(decoder.decode(b"", final=True))
    else:
        for number, text in enumerate(texts, 1):
            print(f"===== {number} of {batch} =====\n{prompt}{text.text.decode(errors='replace')}\n")
    return 0
