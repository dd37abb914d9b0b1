"""Step-by-step generation: `rwkv-train generate CKPT --prompt …`."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rwkv_train.data.tokenizers import load_tokenizer
from rwkv_train.errors import UserError
from rwkv_train.models import RWKV, build_model
from rwkv_train.models.weights import infer_config, load_weights, refuse_mismatches, shapes_of

_PROMPT_CHUNK = 1024  # tokens read in one pass: the memory for a long prompt does not grow with it


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> int:
    """Draws a token from logits (V): the likeliest at temperature 0, else one of the smallest set that has top_p."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits.double() / temperature, dim=-1)
    if top_p < 1:
        ordered, index = probabilities.sort(descending=True)
        dropped = ordered.cumsum(-1) - ordered >= top_p  # the likeliest always stays
        probabilities[index[dropped]] = 0
    return int(torch.multinomial(probabilities, 1, generator=generator))


@torch.inference_mode()
def generate(
    model: RWKV,
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
    device = model.emb.weight.device
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    state = None
    ids = torch.tensor(list(prompt) or [0], device=device)
    for chunk in ids.split(_PROMPT_CHUNK):
        logits, state = model(chunk[None], state)
    for _ in range(tokens):
        token = sample(logits[0, -1].cpu(), temperature, top_p, generator)
        yield token
        logits, state = model(torch.tensor([[token]], device=device), state)


def load_model(checkpoint: Path) -> RWKV:
    """The model of a checkpoint directory or a .pth file under the field's names; the tensors tell its shape.

    Raises:
        UserError: there is no such file, or it is not the weights of a model that can be built here.
    """
    weights = load_weights(checkpoint)
    model = build_model(infer_config(weights, str(checkpoint)), device="meta").to_empty(device="cpu")
    refuse_mismatches(str(checkpoint), shapes_of(weights), model)
    model.load_state_dict(weights)
    return model.eval()


def run(
    checkpoint: str,
    prompt: str,
    temperature: float,
    top_p: float,
    tokens: int,
    seed: int | None,
    tokenizer_name: str | None = None,
) -> int:
    """The command: streams the prompt and what follows it to standard output.

    Raises:
        UserError: no such checkpoint, a vocabulary without a tokenizer here, a value out of range.
    """
    if temperature < 0 or not 0 < top_p <= 1 or tokens < 0:
        raise UserError(
            f"temperature {temperature}, top-p {top_p}, tokens {tokens}: out of range",
            "temperature ≥ 0, 0 < top-p ≤ 1, tokens ≥ 0",
        )
    model = load_model(Path(checkpoint))
    vocabulary = model.config.vocab_size
    name = tokenizer_name or {256: "bytes", 65536: "world"}.get(vocabulary)
    tokenizer = None if name is None else load_tokenizer(name)
    if tokenizer is None or tokenizer.vocab_size > vocabulary:
        has = "" if tokenizer is None else f", the tokenizer {tokenizer.name} {tokenizer.vocab_size:,}"
        raise UserError(
            f"{checkpoint} has a vocabulary of {vocabulary:,} tokens{has}",
            "--tokenizer names the one that it was trained with: bytes, world, or the path of a tokenizer.json",
        )
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    sys.stdout.write(prompt)
    for token in generate(model, tokenizer.encode(prompt.encode()).tolist(), tokens, temperature, top_p, seed):
        sys.stdout.write(decoder.decode(tokenizer.decode([token])))
        sys.stdout.flush()
    print(decoder.decode(b"", final=True))
    return 0
