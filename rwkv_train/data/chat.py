"""Conversations: one JSON object with `messages` a line, of which the assistant's tokens are to be predicted.

A template says how a message of each role is written. What stands before `{content}` in it is given, what stands behind
it is the mark that ends the message: the assistant's is predicted, so that the model learns to stop.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from rwkv_train.config import DataSettings
from rwkv_train.data.store import MemoryStore
from rwkv_train.data.tokenizers import Tokenizer, Tokens
from rwkv_train.errors import UserError

WORLD = {  # what the World models were tuned on
    "system": "System: {content}\n\n",
    "user": "User: {content}\n\n",
    "assistant": "Assistant: {content}\n\n",
}


@dataclass(frozen=True)
class Template:
    """How messages are written: role → what stands before and behind the content."""

    around: Mapping[str, tuple[str, str]]

    def write(self, messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> tuple[Tokens, Tokens]:
        """A conversation as tokens and which of them are predicted (bool), an end-of-text behind it.

        Each message is tokenised in three pieces, so that no token belongs to the content and its surroundings at once.

        Raises:
            ValueError: a message has no content, or a role that the template does not know.
        """
        pieces: list[Tokens] = []
        predicted: list[bool] = []
        for message in messages:
            role, content = message.get("role"), message.get("content")
            if not isinstance(role, str) or role not in self.around or not isinstance(content, str):
                raise ValueError(
                    f"a message with role {role!r}; the template knows {', '.join(self.around)}"
                    if role not in self.around
                    else f"a message of {role} whose content is no text"
                )
            before, behind = self.around[role]
            pieces += [tokenizer.encode(piece.encode()) for piece in (before, content, behind)]
            predicted += [False, role == "assistant", role == "assistant"]
        end = np.full(1, tokenizer.end_of_text, tokenizer.encode(b"").dtype)
        pieces.append(end)
        predicted.append(bool(predicted) and predicted[-1])
        flags = np.repeat(predicted, [len(piece) for piece in pieces])
        return np.concatenate(pieces), flags


def read_template(path: str | None) -> Template:
    """The template of a YAML file, `role: "text with {content}"` for each role; None: RWKV World's.

    Raises:
        UserError: no such file, no such mapping, or no assistant in it.
    """
    texts: Any = WORLD
    if path is not None:
        try:
            texts = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"data.template={path} cannot be read: {error.strerror}", _TEMPLATE) from None
        except yaml.YAMLError as error:
            raise UserError(f"data.template={path} is no YAML: {' '.join(str(error).split())}", _TEMPLATE) from None
    whole = isinstance(texts, dict) and all(isinstance(t, str) and t.count("{content}") == 1 for t in texts.values())
    if not whole or "assistant" not in texts:
        raise UserError(f"data.template={path} is no template: each role needs a text with one {{content}}", _TEMPLATE)
    around = {}
    for role, text in texts.items():
        before, _, behind = text.partition("{content}")
        around[str(role)] = (before, behind)
    return Template(around)


_TEMPLATE = 'a YAML file with a line for each role, the assistant among them: assistant: "Assistant: {content}\\n\\n"'


def conversations(path: Path) -> Iterator[tuple[int, Sequence[Mapping[str, Any]]]]:
    """(line, messages) of every conversation of a .jsonl file.

    Raises:
        UserError: a line is not JSON, or has no messages.
    """
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                messages = json.loads(line)["messages"]
                if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
                    raise TypeError("`messages` is no list of objects")
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{path}, line {number}: no conversation ({type(error).__name__}: {error})",
                    'a line is like {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", …}]}',
                ) from None
            yield number, messages


def read_chat(data: DataSettings, tokenizer: Tokenizer) -> tuple[MemoryStore, MemoryStore, str, str]:
    """Training and held-out conversations, a line for people, and a digest.

    Raises:
        UserError: a line that is no conversation, an unknown role, or no token of an assistant in all of it.
    """
    template, path = read_template(data.template), Path(str(data.path)).expanduser()
    parts: tuple[list[tuple[Tokens, Tokens]], list[tuple[Tokens, Tokens]]] = ([], [])
    digest = hashlib.sha256(repr(sorted(template.around.items())).encode())
    try:
        for number, messages in conversations(path):
            try:
                written = template.write(messages, tokenizer)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: {error}", _TEMPLATE) from None
            text = json.dumps(messages, sort_keys=True).encode()
            digest.update(text + b"\n")
            fraction = int.from_bytes(hashlib.blake2s(text).digest()[:7], "big") / 2**56
            parts[fraction < data.hold_out].append(written)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8: {error.reason} at byte {error.start}", "convert it to UTF-8") from None
    except OSError as error:
        raise UserError(f"data.path={path} cannot be read: {error.strerror}", "name a .jsonl file") from None
    train, held_out = (_stored(part, tokenizer) for part in parts)
    if not train.predicted.any():  # type: ignore[union-attr]
        raise UserError(
            f"{path} has no token of an assistant to be predicted ({len(parts[0])} conversations to train on)",
            "give conversations with messages of the role assistant, or a smaller data.hold_out",
        )
    predicted = int(train.predicted.sum())  # type: ignore[union-attr]
    digest.update(str(data.hold_out).encode())
    description = (
        f"{path}: {len(parts[0]):,} conversations, {len(train):,} tokens, of which {predicted:,} "
        f"({predicted / len(train):.0%}) are the assistant's, hash {digest.hexdigest()[:16]}; held out: "
        f"{len(parts[1]):,} conversations"
    )
    return train, held_out, description, digest.hexdigest()[:16]


def _stored(conversations: Sequence[tuple[Tokens, Tokens]], tokenizer: Tokenizer) -> MemoryStore:
    if not conversations:
        empty = tokenizer.encode(b"")
        return MemoryStore(empty, np.zeros(0, np.int64), np.zeros(0, bool))
    tokens, predicted = zip(*conversations, strict=True)
    starts = np.cumsum([0, *map(len, tokens[:-1])], dtype=np.int64)
    return MemoryStore(np.concatenate(tokens), starts, np.concatenate(predicted))
