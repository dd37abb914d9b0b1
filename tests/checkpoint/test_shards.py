"""State shards: any ranges that together make up the state are written and read back as any other ranges."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor

from rwkv_train.checkpoint import shards
from rwkv_train.checkpoint.directory import newest, refuse_damage, verify
from rwkv_train.checkpoint.name import CheckpointName
from rwkv_train.checkpoint.shards import MOMENTS, WEIGHT, Reader, StateShard, contents, file_names, index_of
from rwkv_train.checkpoint.storage import LocalStorage
from rwkv_train.checkpoint.writer import InProcessStore, Writer
from rwkv_train.errors import UserError
from rwkv_train.models import ModelConfig
from rwkv_train.models.detect import detect_file
from rwkv_train.rundir.attempts import Attempts
from tests.checkpoint.metas import meta_of

SHAPES = {"emb.weight": (7, 5), "ln.weight": (5,), "head.weight": (11, 5)}


def state_of(seed: int) -> dict[tuple[str, str], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    kinds = (WEIGHT, *MOMENTS)
    return {(kind, name): torch.randn(shape, generator=generator) for kind in kinds for name, shape in SHAPES.items()}


def split(values: Tensor, ranks: int, draw: random.Random) -> list[tuple[int, Tensor]]:
    """A flattened tensor in `ranks` ranges, some of them empty."""
    cuts = sorted([0, values.numel(), *(draw.randrange(values.numel() + 1) for _ in range(ranks - 1))])
    flat = values.flatten()
    return [(cuts[rank], flat[cuts[rank] : cuts[rank + 1]]) for rank in range(ranks)]


def write(path: Path, ranks: int, seed: int = 0, indexed: bool = False) -> dict[tuple[str, str], Tensor]:
    """Writes a checkpoint of so many ranks, whose shards are drawn at random; returns its state."""
    state, store, draw = state_of(seed), InProcessStore(), random.Random(seed)
    cuts = {name: split(state[WEIGHT, name], ranks, draw) for name in SHAPES}
    for rank in reversed(range(ranks)):  # rank 0 comes last: it reads the others' messages

        def held_by(rank: int = rank) -> Iterator[StateShard]:
            for (kind, name), values in state.items():
                start, part = cuts[name][rank]
                yield StateShard(kind, name, start, values.flatten()[start : start + part.numel()], True)

        held = contents(held_by(), SHAPES)
        files = dict(zip(file_names(rank, ranks), held, strict=True))
        writer = Writer(LocalStorage(), rank, ranks, store)
        meta = meta_of(step=5, shapes=SHAPES, writers=ranks)
        writer.begin(path, files, meta, index_of(*held) if indexed else None)
        writer.wait()
        assert [outcome.error for outcome in writer.finished()] == [None]
    return state


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_any_ranges_are_read_from_any(tmp_path: Path, ranks: int, indexed: bool) -> None:
    attempts = Attempts(tmp_path)
    attempts.begin(attempts.claim(), 0, None)
    path = tmp_path / "checkpoints" / "step_000000005-0001"
    state = write(path, ranks, indexed=indexed)
    assert (path / "index.json").exists() == (indexed and ranks > 1)
    assert verify(path) is None
    assert newest(path.parent)[0] == path
    assert (path.parent / "latest").read_text() == path.name
    reader, draw = Reader(path), random.Random(1)
    assert reader.shapes == SHAPES
    for others in (1, 3, 4):
        for (kind, name), values in state.items():
            for start, part in split(values, others, draw):
                got = torch.full((part.numel(),), torch.nan)
                reader.fill([StateShard(kind, name, start, got, False)])
                assert torch.equal(got, part)
                stored: list[Tensor] = []
                reader.fill([StateShard(kind, name, start, got, False, stored.append)])
                assert torch.equal(stored[0], part)


@pytest.mark.parametrize("indexed", [True, False])
def test_a_rank_opens_the_files_that_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, indexed: bool) -> None:
    """As many ranks read as have written: where each opened every file, 512 ranks opened 524,288."""
    path, ranks = tmp_path / "step_000000005-0001", 5
    state = write(path, ranks, indexed=indexed)
    opened: list[str] = []
    mapped = shards._mapped

    def counted(file: Path) -> Any:
        opened.append(file.name)
        return mapped(file)

    monkeypatch.setattr(shards, "_mapped", counted)
    own = torch.load(path / file_names(3, ranks)[0])
    starts = torch.load(path / file_names(3, ranks)[1])["starts"]
    reader = Reader(path, verified=True)
    for name, part in own.items():
        for kind in (WEIGHT, *MOMENTS):
            got, start = torch.empty(part.numel()), starts.get(name, 0)
            reader.fill([StateShard(kind, name, start, got, False)])
            assert torch.equal(got, state[kind, name].flatten()[start : start + part.numel()])
    everything = [name for number in range(ranks) for name in file_names(number, ranks)]
    assert sorted(opened) == sorted(file_names(3, ranks) if indexed else everything)  # each once


@pytest.mark.parametrize(
    "content", ["", "[]", '{"weight": {"ln.weight": [[7, 0, 5]]}}', '{"weight": {"ln.weight": [3]}}', '{"weight": 1}']
)
def test_an_index_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "step_000000005-0001"
    write(path, 2, indexed=True)
    (path / "index.json").write_text(content)
    with pytest.raises(UserError, match=r"index\.json cannot be read"):
        Reader(path, verified=True)
    (path / "index.json").write_text('{"weight": {"ln.weight": [[0, 0, 50]]}}')
    with pytest.raises(UserError, match=r"has another index than files: ln\.weight \(weight\)"):
        Reader(path, verified=True).fill([StateShard(WEIGHT, "ln.weight", 0, torch.empty(5), False)])


def test_a_file_with_weights_is_read_as_well(tmp_path: Path) -> None:
    """Also one whose tensors are not contiguous in memory, twice."""
    weights = {"a": torch.randn(6, 4).t(), "b": torch.randn(3)}
    torch.save(weights, tmp_path / "some.pth")
    reader = Reader(tmp_path / "some.pth")
    for _ in range(2):
        got = torch.empty(5)
        reader.fill([StateShard(WEIGHT, "a", 7, got, False)])
        assert torch.equal(got, weights["a"].flatten()[7:12])


def whole(reader: Reader, name: str) -> Tensor:
    values = torch.full((math.prod(reader.shapes[name]),), torch.nan)
    reader.fill([StateShard(WEIGHT, name, 0, values, False)])
    return values.view(reader.shapes[name])


@pytest.mark.parametrize("kind", ["file", "checkpoint"])
def test_what_was_read_once_is_read_again(tmp_path: Path, kind: str) -> None:
    """Rows of new tokens as well, which are in no file; each tensor has several pages of memory."""
    weights = {"emb.weight": torch.randn(9, 1024), "head.weight": torch.randn(9, 1024).bfloat16()}
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    path = tmp_path / "some.pth"
    if kind == "file":
        torch.save(weights, path)
    else:
        path = tmp_path / "step_000000005-0001"
        state: dict[str, Any] = {**{moment: {} for moment in MOMENTS}, "starts": {}}
        writer = Writer(LocalStorage(), 0, 1, InProcessStore())
        writer.begin(path, dict(zip(file_names(0, 1), (weights, state), strict=True)), meta_of(shapes=shapes))
        writer.wait()
    reader = Reader(path)
    reader.grow_vocabulary(5)
    for _ in range(3):
        for name, before in weights.items():
            mean = before.double().mean(0).to(before.dtype)
            assert torch.equal(whole(reader, name), torch.cat([before, mean.expand(5, -1)]).float()), name


def test_the_shape_of_a_sharded_checkpoint_is_known(tmp_path: Path) -> None:
    path = tmp_path / "step_000000005-0001"
    write(path, 2)
    shapes = {"emb.weight": [9, 4], "blocks.0.ffn.key.weight": [16, 4], "blocks.0.att.time_first": [4]}
    shapes["blocks.0.att.time_decay"] = [4]
    (path / "meta.json").write_text(json.dumps({"shapes": shapes}))
    assert detect_file(path) == ModelConfig("rwkv4", 1, 4, 9, 16)


def test_elements_that_no_rank_wrote_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "step_000000005-0001"
    write(path, 3, seed=2)
    meta = json.loads((path / "meta.json").read_text())
    for name in file_names(1, 3):
        shutil.copy(path / file_names(0, 3)[name.startswith("state")], path / name)
    manifest = json.loads((path / "manifest.json").read_text())
    for name in file_names(1, 3):
        manifest["files"][name]["bytes"] = (path / name).stat().st_size
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert meta["writers"] == 3
    with pytest.raises(UserError, match=r"lacks \d+ of 55 elements of head\.weight \(weight\)"):
        Reader(path).fill([StateShard(WEIGHT, "head.weight", 0, torch.empty(55), False)])


@pytest.mark.parametrize("name", ["weights_0001_of_0002.pth", "state_0000_of_0002.pth"])
def test_a_missing_shard_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / "step_000000005-0001"
    write(path, 2)
    (path / name).unlink()
    damage = verify(path)
    assert damage is not None
    assert damage.reason == f"{name} cannot be read (No such file or directory)"
    with pytest.raises(UserError, match=f"is damaged: {name} cannot be read"):
        Reader(path)


def test_a_directory_around_checkpoints_is_not_taken_for_a_damaged_one(tmp_path: Path) -> None:
    for step in (5, 15):
        write(tmp_path / "checkpoints" / str(CheckpointName(step, 1)), 2)
    for path in (tmp_path, tmp_path / "checkpoints"):
        with pytest.raises(UserError, match=r"is not a complete checkpoint: it has no manifest\.json") as raised:
            refuse_damage(path)  # to resume, a checkpoint itself must be named
        assert raised.value.remedy == f"use {tmp_path}/checkpoints/step_000000015-0001"
        assert Reader(path).path == tmp_path / "checkpoints" / "step_000000015-0001"


def test_a_rank_that_cannot_write_costs_the_checkpoint_and_says_so(tmp_path: Path) -> None:
    class Full(LocalStorage):
        def write(self, path: Path) -> NoReturn:
            raise OSError(28, "No space left on device", str(path))

    store, path = InProcessStore(), tmp_path / "step_000000005-0001"
    for rank, storage, message in (
        (1, Full(), "No space left"),
        (0, LocalStorage(), "rank 1: No space left on device"),
    ):
        writer = Writer(storage, rank, 2, store)
        writer.begin(path, {file_names(rank, 2)[0]: {}}, meta_of())
        writer.wait()
        (outcome,) = writer.finished()
        assert outcome.error is not None
        assert message in outcome.error
    assert not path.exists()
