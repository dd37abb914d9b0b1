"""Step-by-step generation: `rwkv-train generate CKPT --prompt …`."""

from __future__ import annotations

import codecs
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice

import psutil
import torch

from rwkv_train.console import for_stream
from rwkv_train.errors import UserError
from rwkv_train.inference.continuation import continue_texts, streams
from rwkv_train.inference.loading import load_model, tokenizer_of
from rwkv_train.inference.sampling import Sampling
from rwkv_train.models import LanguageModel
from rwkv_train.user_path import user_path

_LARGEST_SEED = 2**62
_BYTES_PER_TEXT = 8192  # of its random generator and its objects


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


@dataclass(frozen=True)
class GenerateOptions:
    """The options of `rwkv-train generate`.

    Args:
        checkpoint: a checkpoint directory or a .pth file.
        prompt: the text that is continued; an empty one starts from end-of-text.
        tokens: maximum number of tokens of each text.
        sampling: how a token is drawn.
        seed: seed of the first text; that of each further text is one more. None: random seeds.
        tokenizer: bytes, world or a tokenizer.json; None: the tokenizer that the checkpoint names.
        stops: strings that end a text; they are not shown.
        until_end: whether an end-of-text token ends a text.
        batch: number of texts.
        as_json: whether one JSON object is printed instead of the texts.
        device: cpu, cuda or auto.
    """

    checkpoint: str
    prompt: str
    tokens: int
    sampling: Sampling
    seed: int | None = None
    tokenizer: str | None = None
    stops: Sequence[str] = ()
    until_end: bool = False
    batch: int = 1
    as_json: bool = False
    device: str = "cpu"


def refuse_batch(model: LanguageModel, batch: int, prompt: int) -> None:
    """Refuses more texts than memory holds.

    Args:
        model: on its device.
        batch: number of texts.
        prompt: characters of the prompt, about as many tokens at most.

    Raises:
        UserError: their states, logits and prompts need more than is free.
    """
    device = model.emb.weight.device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    shape = model.config
    logits = 16 * shape.vocab_size  # in float32, and the chances of one text in float64
    each = 2 * model.architecture.state_bytes(shape) + logits + 16 * prompt + _BYTES_PER_TEXT
    if batch * each > free:
        raise UserError(
            f"--batch {batch} needs about {batch * each / 1e9:,.1f} GB, {free / 1e9:,.1f} GB are free",
            f"--batch {max(1, free // each // 2)}, several times with other seeds",
        )


def run(options: GenerateOptions) -> int:
    """The command: a single text is streamed to standard output after its prompt, several are printed at the end.

    Raises:
        UserError: no such checkpoint, a vocabulary without a tokenizer here, a value out of range.
    """
    prompt, tokens, stops = options.prompt, options.tokens, options.stops
    batch, seed = options.batch, options.seed
    if tokens < 0 or batch < 1 or not all(stops):
        what = f"--tokens {tokens}" if tokens < 0 else f"--batch {batch}" if batch < 1 else "--stop ''"
        raise UserError(f"{what} is out of range", "tokens ≥ 0, batch ≥ 1, stop strings of at least one character")
    if seed is not None and abs(seed) > _LARGEST_SEED:
        raise UserError(f"--seed {seed} is out of range", f"valid: up to {_LARGEST_SEED}")
    model = load_model(user_path(options.checkpoint), options.device)
    refuse_batch(model, batch, len(prompt))
    tokenizer = tokenizer_of(user_path(options.checkpoint), model.config.vocab_size, options.tokenizer)
    ids = tokenizer.encode(
        prompt.encode(errors="surrogateescape")
    ).tolist()  # bytes that are not UTF-8 as they were typed
    seeds = [None if seed is None else seed + number for number in range(batch)]
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    streamed = batch == 1 and not options.as_json

    def show(_: int, text: bytes) -> None:
        sys.stdout.write(for_stream(decoder.decode(text), sys.stdout))
        sys.stdout.flush()

    if streamed:
        sys.stdout.write(for_stream(prompt, sys.stdout))
    encoded = [stop.encode(errors="surrogateescape") for stop in stops]
    texts = continue_texts(
        model,
        tokenizer,
        [(ids or [tokenizer.end_of_text], None)] * batch,
        tokens,
        options.sampling,
        seeds,
        encoded,
        options.until_end,
        show if streamed else None,
        shown_before=ids,
    )
    if options.as_json:
        results = [
            {"text": text.text.decode(errors="replace"), "tokens": text.tokens, "ended": text.ended, "seed": drawn}
            for text, drawn in zip(texts, seeds, strict=True)
        ]
        about = {"checkpoint": options.checkpoint, "tokenizer": tokenizer.identity, "prompt": prompt}
        print(json.dumps({**about, "sampling": asdict(options.sampling), "stop": list(stops), "texts": results}))
    elif streamed:
        print(decoder.decode(b"", final=True))
    else:
        for number, text in enumerate(texts, 1):
            whole = for_stream(prompt + text.text.decode(errors="replace"), sys.stdout)
            print(f"===== {number} of {batch} =====\n{whole}\n")
    return 0
