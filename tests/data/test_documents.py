"""Packed documents and chats in batches: document starts, masks, the weight of a token, mixtures, pinned memory."""

from __future__ import annotations

import io
import json
import re
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from rwkv_train.config import BatchSettings, DataSettings, SourceSettings, StageSettings
from rwkv_train.config.mesh import Mesh
from rwkv_train.data import ahead
from rwkv_train.data.ahead import Ahead
from rwkv_train.data.batch_preview import BORDER, show_batch
from rwkv_train.data.batches import Batches
from rwkv_train.data.chat import read_template
from rwkv_train.data.rows import IGNORED_TARGET
from rwkv_train.data.tokenizers import load_tokenizer
from rwkv_train.errors import UserError
from rwkv_train.training.loss import language_model_loss


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Forty documents of 1 to 45 bytes; each begins with a byte of its own."""
    for number in range(40):
        (tmp_path / f"{number:02}.txt").write_bytes(bytes([65 + number]) * (1 + number * 7 % 45))
    return tmp_path


def packed(path: Path, reset: bool, tokens: int = 192, context: int = 24, **more: Any) -> Batches:
    data = DataSettings("text", str(path), "bytes", 0.2, documents="packed", reset=reset)
    return Batches(data, BatchSettings(tokens, context, more.pop("micro", None)), seed=1, **more)


def check_row(tokens: list[int], targets: list[int], starts: list[bool] | None, reset: bool) -> list[bytes]:
    """The pieces of a row, each checked: a token follows the other, borders are masked unless the state is reset."""
    pieces: list[bytes] = []
    for position, (token, target) in enumerate(zip(tokens, targets, strict=True)):
        following = tokens[position + 1] if position + 1 < len(tokens) else None
        begins = token == 0 if starts is None else starts[position]
        if begins and target != IGNORED_TARGET:
            assert reset or position == 0, "the first token of a document is not predicted from another document"
        if target > 0 and following:  # neither the end of a piece nor masked
            assert target == following
        if token == 0:
            pieces.append(b"")
        elif pieces:
            pieces[-1] += bytes([token])
    return pieces


@pytest.mark.parametrize("reset", [False, True])
def test_an_epoch_of_packed_documents_has_each_token_once(texts: Path, reset: bool) -> None:
    data = packed(texts, reset, tokens=24)
    predicted, rows = 0, len(data._rows[0].packing)  # type: ignore[attr-defined]
    seen: list[int] = []
    for step in range(rows):
        batch = data.batch(step)
        starts = None if batch.starts is None else batch.starts[0].tolist()
        check_row(batch.tokens[0].tolist(), batch.targets[0].tolist(), starts, reset)
        real = batch.targets[0] != IGNORED_TARGET
        seen += batch.targets[0][real].tolist()
        predicted += int(real.sum())
        assert batch.predictions == max(1, int(real.sum()))
    stream = data.train.tokens
    if reset:
        assert sorted(seen) == sorted(stream[1:].tolist()), "all but the end-of-text that the stream begins with"
    else:
        pieces = data._rows[0].packing  # type: ignore[attr-defined]
        assert predicted == len(stream) - 1 - (len(pieces.lengths) - rows), "one less for each border inside a row"


def test_rows_are_nearly_full_and_said_so(texts: Path) -> None:
    assert "of the positions filled; the state is reset at each" in packed(texts, True).description
    assert "the state continues across them" in packed(texts, False).description


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 2])
def test_every_predicted_token_counts_the_same(texts: Path, ranks: int, micro: int) -> None:
    """The mean over passes and ranks is the mean over the batch's predicted tokens, computed by hand."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(256, 256, generator=generator, dtype=torch.float64)
    data = packed(texts, False, mesh=Mesh(ranks), micro=micro)
    losses, nats = [], []
    for rank in range(ranks):
        data.rank = rank
        for index in range(data.accumulation):
            batch = data.batch(3, index)
            logits = table[batch.tokens]
            assert batch.predictions is not None
            losses.append(language_model_loss(logits, batch.targets, 0.0, batch.predictions.double()))
            for row, targets in zip(logits, batch.targets, strict=True):
                real = targets != IGNORED_TARGET
                nats += F.cross_entropy(row[real], targets[real], reduction="none").tolist()
    assert len({len(nats)}) == 1
    torch.testing.assert_close(torch.stack(losses).mean(), torch.tensor(nats, dtype=torch.float64).mean())


def test_validation_of_packed_documents_has_each_token_once(texts: Path) -> None:
    data = packed(texts, True)
    seen = [int(t) for batch in data.validation() for t in batch[1].flatten() if t != IGNORED_TARGET]
    assert sorted(seen) == sorted(data.held_out.tokens[1:].tolist())


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2 😀"},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
]


def write_chats(path: Path, count: int = 30) -> Path:
    lines = [
        json.dumps({"messages": [*CHAT[:1], {"role": "user", "content": f"n {n}"}, *CHAT[1:]]}) for n in range(count)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def chat(path: Path, **more: Any) -> Batches:
    data = DataSettings("chat", str(path), "world", 0.2, documents="packed", reset=True, **more)
    return Batches(data, BatchSettings(256, 128, None), seed=1)


def test_the_loss_of_a_chat_is_on_the_assistants_tokens() -> None:
    world = load_tokenizer("world")
    tokens, predicted = read_template(None).write(CHAT, world)
    assert world.decode(tokens).decode() == (
        "System: Be brief.\n\nUser: 1+1?\n\nAssistant: 2 😀\n\nUser: Sure?\n\nAssistant: Yes.\n\n"
    )
    assert world.decode(tokens[predicted]).decode() == "2 😀\n\nYes.\n\n"
    assert tokens[-1] == world.end_of_text
    assert predicted[-1]


def test_chats_are_packed_with_their_mask(tmp_path: Path) -> None:
    data = chat(write_chats(tmp_path / "chat.jsonl"))
    batch = data.batch(0)
    for row in range(2):
        text = data.tokenizer.decode(batch.targets[row][batch.targets[row] != IGNORED_TARGET].tolist()).decode()
        assert text.replace("2 😀\n\n", "").replace("Yes.\n\n", "") == ""
        assert "Yes." in text
    assert "the assistant's" in data.description
    assert len(data.validation()) > 0


def test_a_custom_template(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text('user: "<u>{content}"\nassistant: "<a>{content}<e>"\n')
    template, tokenizer = read_template(str(tmp_path / "t.yaml")), load_tokenizer("bytes", ["<u>", "<a>", "<e>"])
    tokens, predicted = template.write(CHAT[1:3], tokenizer)
    assert tokens.tolist() == [256, *b"1+1?", 257, *"2 😀".encode(), 258, 0]
    assert tokens[predicted].tolist() == [*"2 😀".encode(), 258, 0]


def test_error_messages_of_chats(tmp_path: Path) -> None:
    path = write_chats(tmp_path / "chat.jsonl")

    def message(text: str, **more: Any) -> str:
        path.write_text(text)
        with pytest.raises(UserError) as error:
            chat(path, **more)
        return str(error.value)

    good = json.dumps({"messages": CHAT}) + "\n"
    assert "chat.jsonl, line 2: not a conversation (JSONDecodeError" in message(good + "nonsense\n")
    assert "line 1: not a conversation (KeyError: 'messages')" in message('{"text": "x"}\n')
    assert "line 1: message with role 'robot'; the template has the roles system, user, assistant" in message(
        json.dumps({"messages": [{"role": "robot", "content": "x"}]})
    )
    assert "message of role user: its content is not a string" in message(
        '{"messages": [{"role": "user", "content": [1]}]}'
    )
    assert "no token has a loss (1 conversations to train on" in message(json.dumps({"messages": CHAT[:2]}))
    (tmp_path / "t.yaml").write_text('user: "{content}"\n')
    assert "is not a template: each role needs a text that contains {content} once" in message(
        good, template=str(tmp_path / "t.yaml")
    )
    assert "t.yml cannot be read: No such file" in message(good, template=str(tmp_path / "t.yml"))


def test_a_few_bad_lines_of_chats_are_left_out(tmp_path: Path) -> None:
    path, good = tmp_path / "chat.jsonl", json.dumps({"messages": CHAT}).encode() + b"\n"
    bad = {
        7: b"nonsense",
        20: b"[" * 100_000,
        33: b'{"messages": [{"role": "user", "content": "\xe9"}]}',
        60: b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        90: b'{"messages": [{"role": "robot", "content": "x"}]}',
        95: b'{"messages": [{"role": "user", "content": null}]}',
    }
    path.write_bytes(b"".join(bad[n] + b"\n" if n in bad else good for n in range(1, 601)))
    description = chat(path).description
    assert "left out: 6 of 600 rows: " in description
    found = [int(number) for number in re.findall(r"chat.jsonl, line (\d+): ", description)]
    assert found == [7, 20, 33, 60, 90]
    with pytest.raises(UserError, match=r"^6 of 600 rows cannot be used, more than data.max_bad_rows=0.009 allows"):
        chat(path, max_bad_rows=0.009)


def test_a_batch_is_shown_with_borders_and_mask(tmp_path: Path) -> None:
    data = chat(write_chats(tmp_path / "chat.jsonl"))
    console = Console(width=4000, record=True, force_terminal=True, color_system="standard", file=io.StringIO())
    show_batch(data.batch(0), data.tokenizer, console)
    styled = console.export_text(styles=True, clear=False)
    plain = console.export_text()
    assert "a batch of 2 rows of 128 tokens" in plain
    assert plain.count(BORDER) >= 4
    assert "\x1b[32mYes." in styled, "green: predicted"
    assert "\x1b[2mSystem: Be brief." in styled, "dim: given"


def test_a_mixture_of_texts(tmp_path: Path) -> None:
    for name, byte in (("a", b"a"), ("b", b"b")):
        (tmp_path / name).mkdir()
        for number in range(20):
            (tmp_path / name / f"{number}.txt").write_bytes(byte * 50)
    sources = tuple(SourceSettings(n, str(tmp_path / n), w, None) for n, w in (("a", 0.75), ("b", 0.25)))
    data = DataSettings(
        "mixture", None, "bytes", 0.2, sources=sources, curriculum=(StageSettings(640, {"a": 1.0, "b": 3.0}),)
    )
    batches = Batches(data, BatchSettings(64, 8, None), seed=1)
    shares = []
    for batch in islice(batches.training(), 20):
        letters = batch.tokens == ord("a")
        shares.append(float(letters.sum() / (batch.tokens != 0).sum()))
        assert batch.sources.tolist() == (~letters.any(1)).int().tolist()
    assert np.mean(shares[:10]) == pytest.approx(0.75, abs=0.02)
    assert np.mean(shares[10:]) == pytest.approx(0.25, abs=0.02)
    assert batches.tokens_by_source(10) == {"a": 480, "b": 160}
    assert batches.tokens_by_source(12) == {"a": 480 + 32, "b": 160 + 96}
    assert [batches.sources[n].name for n in batches.validated] == ["a", "b"]
    for number in batches.validated:
        assert all(set(batch[0].unique().tolist()) <= {0, b"ab"[number]} for batch in batches.validation(number))
    assert "a 75.00%: " in batches.description
    again = Batches(data, BatchSettings(64, 8, None), seed=1)
    again.start_step = 11
    assert torch.equal(next(iter(again.training()))[0], batches.batch(11)[0])


def test_a_mixture_with_limited_epochs_ends(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a" * 90)
    data = DataSettings("mixture", None, "bytes", 0.0, sources=(SourceSettings("a", str(tmp_path), None, 2.0),))
    batches = Batches(data, BatchSettings(16, 8, None), seed=1)
    assert batches.mixture.samples == 2 * batches.order.windows == 20
    batches.refuse_budget(10)
    message = r"may be read for 10 steps \(160 tokens\), the budget is 11 steps\n  budget.steps=10"
    with pytest.raises(UserError, match=message):
        batches.refuse_budget(11)
    assert len(list(islice(batches.training(), 10))) == 10


def test_batches_made_ahead_are_the_same_and_pinned(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Tensor] = []

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor)
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    for data in (packed(texts, True), packed(texts, False)):
        data.pinned = True
        loader = data.training()
        assert isinstance(loader, Ahead)
        ahead_of_use = iter(loader)
        for step in range(6):
            batch, expected = next(ahead_of_use), data.batch(step)
            for found, wanted in zip(batch, expected, strict=True):
                assert found is wanted is None or (found == wanted).all()  # type: ignore[union-attr]
        ahead_of_use.close()  # type: ignore[attr-defined]
    assert len(pinned) >= 6 * 4


def test_an_error_in_the_thread_is_raised_where_the_batch_is_requested() -> None:
    def broken() -> Any:
        raise UserError("no such token")
        yield  # type: ignore[unreachable]

    with pytest.raises(UserError, match="no such token"):
        next(iter(ahead.Ahead(broken())))
