"""Conversations in JSON Lines files, one object with `messages` per line; the loss is on the assistant's tokens.

A template defines how a message of each role is written. Its text after `{content}` ends the message; the assistant's
has a loss, so that the model learns to stop.
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
from rwkv_train.data.bad_rows import BadRows
from rwkv_train.data.store import MemoryStore
from rwkv_train.data.tokenizers import Tokenizer, Tokens
from rwkv_train.errors import UserError
from rwkv_train.user_path import user_path

WORLD_TEMPLATE = {  # the format that the RWKV World models were fine-tuned on
    "system": "System: {content}\n\n",
    "user": "User: {content}\n\n",
    "assistant": "Assistant: {content}\n\n",
}


@dataclass(frozen=True)
class ChatTemplate:
    """How messages are written.

    Attributes:
        affixes: the texts before and after the content, by role.
    """

    affixes: Mapping[str, tuple[str, str]]

    def write(self, messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> tuple[Tokens, Tokens]:
        """Tokenises a conversation, with an end-of-text after it.

        Prefix, content and suffix of a message are tokenised separately, so that no token spans two of them.

        Args:
            messages: objects with `role` and `content`.
            tokenizer: of the run.

        Returns:
            The tokens (N,), and whether each has a loss, bool (N,).

        Raises:
            ValueError: a message has no text as its content, or a role that the template lacks.
        """
        pieces: list[Tokens] = []
        predicted: list[bool] = []
        for message in messages:
            role, content = message.get("role"), message.get("content")
            if not isinstance(role, str) or role not in self.affixes or not isinstance(content, str):
                raise ValueError(
                    f"message with role {role!r}; the template has the roles {', '.join(self.affixes)}"
                    if role not in self.affixes
                    else f"message of role {role}: its content is not a string"
                )
            prefix, suffix = self.affixes[role]
            pieces += [tokenizer.encode(piece.encode()) for piece in (prefix, content, suffix)]
            predicted += [False, role == "assistant", role == "assistant"]
        end = np.full(1, tokenizer.end_of_text, tokenizer.encode(b"").dtype)
        pieces.append(end)
        predicted.append(bool(predicted) and predicted[-1])
        flags = np.repeat(predicted, [len(piece) for piece in pieces])
        return np.concatenate(pieces), flags


def read_template(path: str | None) -> ChatTemplate:
    """Reads the template from a YAML file with a line `role: "text with {content}"` per role.

    Args:
        path: None: the template of the RWKV World models.

    Raises:
        UserError: the file cannot be read, is not such a mapping, or has no role `assistant`.
    """
    texts: Any = WORLD_TEMPLATE
    if path is not None:
        try:
            texts = yaml.safe_load(user_path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"data.template={path} cannot be read: {error.strerror}", _TEMPLATE_REMEDY) from None
        except yaml.YAMLError as error:
            raise UserError(
                f"data.template={path} is not valid YAML: {' '.join(str(error).split())}", _TEMPLATE_REMEDY
            ) from None
    valid = isinstance(texts, dict) and all(isinstance(t, str) and t.count("{content}") == 1 for t in texts.values())
    if not valid or "assistant" not in texts:
        raise UserError(
            f"data.template={path} is not a template: each role needs a text that contains {{content}} once",
            _TEMPLATE_REMEDY,
        )
    affixes = {}
    for role, text in texts.items():
        prefix, _, suffix = text.partition("{content}")
        affixes[str(role)] = (prefix, suffix)
    return ChatTemplate(affixes)


_TEMPLATE_REMEDY = (
    'give a YAML file with a line for each role, the assistant among them: assistant: "Assistant: {content}\\n\\n"'
)


def conversations(path: Path, bad: BadRows) -> Iterator[tuple[int, Sequence[Mapping[str, Any]]]]:
    """Yields the line number (from 1) and the messages of every conversation of a .jsonl file.

    Args:
        path: the file.
        bad: counts the lines that are not conversations.

    Raises:
        UserError: too many lines are not JSON, or have no `messages`.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                messages = json.loads(line)["messages"]
                if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
                    raise TypeError("`messages` is not a list of objects")
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                bad.leave_out(f"{path}, line {number}", f"not a conversation ({type(error).__name__}: {error})")
            else:
                yield number, messages


def read_chat(data: DataSettings, tokenizer: Tokenizer) -> tuple[MemoryStore, MemoryStore, str, str]:
    """Reads and tokenises the conversations of `data.path`.

    Returns:
        Training and held-out tokens, a one-line description, and a hash of content, template and split (16 hexadecimal
        digits).

    Raises:
        UserError: too many lines are not conversations or have unknown roles, or no token of the training part has a
            loss.
    """
    template, path = read_template(data.template), user_path(str(data.path))
    bad = BadRows(data.max_bad_rows)
    parts: tuple[list[tuple[Tokens, Tokens]], list[tuple[Tokens, Tokens]]] = ([], [])
    digest = hashlib.sha256(repr(sorted(template.affixes.items())).encode())
    try:
        for number, messages in conversations(path, bad):
            try:
                written = template.write(messages, tokenizer)
                text = json.dumps(messages, sort_keys=True).encode()
            except (ValueError, RecursionError) as error:
                bad.leave_out(f"{path}, line {number}", str(error))
                continue
            bad.rows += 1
            digest.update(text + b"\n")
            fraction = int.from_bytes(hashlib.blake2s(text).digest()[:7], "big") / 2**56
            parts[fraction < data.hold_out].append(written)
    except OSError as error:
        raise UserError(f"data.path={path} cannot be read: {error.strerror}", "name a .jsonl file") from None
    bad.check(complete=True)
    train, held_out = (_stored(part, tokenizer) for part in parts)
    if not train.predicted.any():  # type: ignore[union-attr]
        raise UserError(
            f"{path}: no token has a loss ({len(parts[0])} conversations to train on, none with text of the assistant)",
            "add conversations with messages of the role assistant, or lower data.hold_out",
        )
    predicted = int(train.predicted.sum())  # type: ignore[union-attr]
    digest.update(str(data.hold_out).encode())
    description = (
        f"{path}: {len(parts[0]):,} conversations, {len(train):,} tokens, {predicted:,} of them "
        f"({predicted / len(train):.0%}) the assistant's, hash {digest.hexdigest()[:16]}; held out: "
        f"{len(parts[1]):,} conversations" + (f"; {bad.description}" if bad.bad else "")
    )
    return train, held_out, description, digest.hexdigest()[:16]


def _stored(conversations: Sequence[tuple[Tokens, Tokens]], tokenizer: Tokenizer) -> MemoryStore:
    if not conversations:
        empty = tokenizer.encode(b"")
        return MemoryStore(empty, np.zeros(0, np.int64), np.zeros(0, bool))
    tokens, predicted = zip(*conversations, strict=True)
    starts = np.cumsum([0, *map(len, tokens[:-1])], dtype=np.int64)
    return MemoryStore(np.concatenate(tokens), starts, np.concatenate(predicted))
