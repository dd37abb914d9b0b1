"""Every reader of files that others may have written gets every hostile one; only a UserError may come of it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rwkv_train.checkpoint.directory import verify
from rwkv_train.checkpoint.meta import CheckpointMeta
from rwkv_train.checkpoint.shards import MOMENTS, WEIGHT, Reader, StateShard
from rwkv_train.data.manifest import Manifest, read_manifest
from rwkv_train.errors import UserError
from rwkv_train.inference.loading import load_model
from rwkv_train.json_files import MAX_BYTES, read_object
from rwkv_train.models.detect import detect_file, read_shapes
from rwkv_train.models.weights import load_weights
from rwkv_train.rundir.replay_file import load_replay
from tests.checkpoint.metas import meta_of


def _sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(MAX_BYTES + 1)


def _zero(path: Path) -> None:
    path.symlink_to("/dev/zero")


BYTES = {
    "empty": b"",
    "half": b'{"step": 3, "fi',
    "zeros": b"\0" * 64,
    "binary": bytes(range(128, 256)),
    "deep list": b"[" * 100_000,
    "deep object": b'{"a":' * 100_000,
    "null": b"null",
    "list": b"[]",
    "number": b"1e999",
    "object": b"{}",
    "text": b'"\\ud800"',
    "digits": b"1" * 10_000,
}
MADE: dict[str, Callable[[Path], object]] = {
    **{name: lambda path, content=content: path.write_bytes(content) for name, content in BYTES.items()},  # type: ignore[misc]
    "pipe": os.mkfifo,
    "directory": os.mkdir,
    "device": _zero,
    "larger than the limit": _sparse,
}


def _replay(path: Path) -> object:
    try:
        return load_replay(path)
    except (OSError, ValueError) as error:  # which cli/checks.py reports
        raise UserError(str(error)) from None


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a checkpoint's description": ("meta.json", lambda path: CheckpointMeta.read(path.parent)),
    "its shapes": ("meta.json", read_shapes),
    "a store's manifest": ("s.json", lambda path: read_manifest(path.parent / "s")),
    "a replay file": ("step_1.json", _replay),
    "weights": ("weights.pth", load_weights),
    "a table of weights": ("weights.pth", read_shapes),
}


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("reader", READERS)
def test_a_file_that_is_none(reader: str, made: str, tmp_path: Path) -> None:
    name, read = READERS[reader]
    MADE[made](tmp_path / name)
    if name == "s.json" and made in ("pipe", "directory", "device"):
        return  # a store without a manifest
    with pytest.raises(UserError) as raised:
        read(tmp_path / name)
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize("made", MADE)
def test_a_manifest_that_is_none_is_damage(made: str, tmp_path: Path) -> None:
    MADE[made](tmp_path / "manifest.json")
    assert verify(tmp_path) is not None


@pytest.mark.parametrize("name", ["../outside", "/dev/zero", ".", "..", "", "a/b", "[/x]\0", "pipe", "zero", "folder"])
def test_a_manifest_leads_out_of_its_directory_nowhere(name: str, tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "outside").write_bytes(b"")
    os.mkfifo(inside / "pipe")
    (inside / "zero").symlink_to("/dev/zero")
    (inside / "folder").mkdir()
    (inside / "meta.json").write_bytes(b"")
    digest = hashlib.sha256(b"").hexdigest()
    files = {each: {"bytes": 0, "sha256": digest} for each in ("meta.json", name)}
    manifest = {"step": 1, "attempt": 1, "files": files}
    (inside / "manifest.json").write_text(json.dumps(manifest))
    assert verify(inside) is not None
    del files[name]
    (inside / "manifest.json").write_text(json.dumps(manifest))
    assert verify(inside) is None
    (inside / "manifest.json").write_text(json.dumps({**manifest, "files": {}}))
    assert verify(inside) is not None


WRONG_META: dict[str, list[Any]] = {
    "step": [None, True, -1, 1.5, "3", 10**400],
    "writers": [-1, 0, 10**9, "x"],
    "probe": [float("nan"), float("inf"), "1"],
    "batches": [3, [3], [[1, 2, 3]], [["1", "2"]], [[-1, 2]]],
    "shapes": [[], {"a": 3}, {"a": ["3"]}, {"a": [-1]}, {"a": [1.5]}, {"a": [10**400]}],
    "tokens_by_source": [[], {"a": "3"}, {"a": -1}, {"a": float("nan")}],
    "config": ["text", [], None],
}


@pytest.mark.parametrize("key", WRONG_META)
def test_a_description_with_a_wrong_value(key: str, tmp_path: Path) -> None:
    good = json.loads(json.dumps(meta_of().as_json()))
    (tmp_path / "meta.json").write_text(json.dumps(good))
    CheckpointMeta.read(tmp_path)
    for value in WRONG_META[key]:
        (tmp_path / "meta.json").write_text(json.dumps({**good, key: value}))
        with pytest.raises(UserError, match=rf"meta\.json: .*{key}"):
            CheckpointMeta.read(tmp_path)


MANIFEST = Manifest("bytes", [], "bytes", 1, 2, 1, 9, "f", {"s.bin": "0"}, ["a"])


@pytest.mark.parametrize("key", [key for key, value in vars(MANIFEST).items() if not isinstance(value, str)])
def test_a_store_s_manifest_with_a_wrong_value(key: str, tmp_path: Path) -> None:
    for value in (None, -1, 1.5, "3", float("nan"), [3], {"a": 1.5}, 10**400):
        (tmp_path / "s.json").write_text(json.dumps({**vars(MANIFEST), key: value}))
        with pytest.raises(UserError, match=r"s\.json (is not the manifest of a store|has format)"):
            read_manifest(tmp_path / "s")


def a_table(path: Path, table: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", table)
    return path


TABLES = {
    "code": b"cos\nsystem\n(S'true'\ntR.",
    "memo": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "memo in text": b"Np99999999999\n0.",
    "nothing on the stack": b"\x80\x020000.",
    "no end": b"\x80\x02}",
    "bytes of a terabyte": b"\x80\x05\x8e" + (2**40).to_bytes(8, "little") + b".",
    "bytearray of a terabyte": b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".",
    "frame": b"\x80\x04\x95" + (2**62).to_bytes(8, "little") + b".",
    "protocol": b"\x80\xff.",
    "deep": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "a call of a number": b"\x80\x02K\x01)R.",
    "a shape of texts": pickle.dumps({"emb.weight": ("3", "4")}),
    "extension": b"\x80\x02\x82\x01.",
}


@pytest.mark.parametrize("table", TABLES)
def test_a_table_that_is_none(table: str, tmp_path: Path) -> None:
    path = a_table(tmp_path / "w.pth", TABLES[table])
    with pytest.raises(UserError):
        detect_file(path)
    with pytest.raises(UserError):
        load_weights(path)


def weights() -> dict[str, torch.Tensor]:
    from rwkv_train.models import ModelConfig, build_model

    return dict(build_model(ModelConfig("rwkv4", 2, 8, 16, 32), 1).state_dict())


@pytest.mark.parametrize("name", ["blocks.999999999.x", "blocks.3.att.key.weight", f"blocks.{'9' * 6000}.x"])
def test_holes_in_the_layers(name: str, tmp_path: Path) -> None:
    torch.save({**weights(), name: torch.zeros(1)}, tmp_path / "w.pth")
    for read in (detect_file, load_model):
        with pytest.raises(UserError, match=r"lacks blocks\.2, and has later ones"):
            read(tmp_path / "w.pth")


def _nan(value: torch.Tensor) -> torch.Tensor:
    value = value.clone()
    value.view(-1)[3:5] = float("nan")
    return value


ODD: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "int8": lambda value: value.to(torch.int8),
    "complex": lambda value: value.to(torch.complex64),
    "bool": lambda value: value > 0,
    "sparse": lambda value: value.to_sparse(),
    "expanded": lambda value: value[:1, :1].clone().expand(value.shape),
    "NaN": _nan,
    "infinite": lambda value: value / 0,
}


@pytest.mark.parametrize("odd", ODD)
def test_weights_of_another_kind_are_named(odd: str, tmp_path: Path) -> None:
    good = weights()
    torch.save({**good, "head.weight": ODD[odd](good["head.weight"])}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"head\.weight") as raised:
        load_model(tmp_path / "w.pth")
    if odd == "NaN":
        assert "head.weight has 2 values that are not finite" in str(raised.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_floats_are_read(dtype: torch.dtype, tmp_path: Path) -> None:
    good = weights()
    torch.save({name: value.to(dtype) for name, value in good.items()}, tmp_path / "w.pth")
    head = load_model(tmp_path / "w.pth").state_dict()["head.weight"]
    assert torch.equal(head, good["head.weight"].to(dtype).to(head.dtype))


def a_checkpoint(path: Path, starts: tuple[int, int], state: Any = None) -> Path:
    """Of two writers, each with four of the eight elements of `a`."""
    path.mkdir(exist_ok=True)
    files: dict[str, bytes] = {"meta.json": json.dumps(meta_of(shapes={"a": (8,)}, writers=2).as_json()).encode()}
    for number, start in enumerate(starts):
        moments = {moment: {"a": torch.ones(4)} for moment in MOMENTS}
        held = {**moments, "starts": {"a": start}} if state is None else state
        for kind, content in (("weights", {"a": torch.full((4,), 1.0 + number)}), ("state", held)):
            buffer = io.BytesIO()
            torch.save(content, buffer)
            files[f"{kind}_{number:04d}_of_0002.pth"] = buffer.getvalue()
    entries = {}
    for name, content in files.items():
        (path / name).write_bytes(content)
        entries[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / "manifest.json").write_text(json.dumps({"step": 7, "attempt": 1, "files": entries}))
    return path


@pytest.mark.parametrize(
    ("name", "named", "message"),
    [
        ("state_0001_of_0002.pth", False, r"manifest\.json lacks state_0001_of_0002\.pth, one of the 5 files"),
        ("notes.txt", True, r"manifest\.json names 'notes\.txt', which is no file of a checkpoint of 2 writers"),
    ],
)
def test_a_manifest_names_exactly_the_files_of_its_writers(
    name: str, named: bool, message: str, tmp_path: Path
) -> None:
    path = a_checkpoint(tmp_path / "made", (0, 4))
    if not (path / name).exists():
        (path / name).write_bytes(b"{}")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"].pop(name, None)
    if named:
        manifest["files"][name] = {"bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=message):
        Reader(path)


def read_a(path: Path) -> torch.Tensor:
    values = torch.zeros(8)
    Reader(path).fill([StateShard(WEIGHT, "a", 0, values, True)])
    return values


def test_pieces_must_tile(tmp_path: Path) -> None:
    assert read_a(a_checkpoint(tmp_path / "good", (0, 4))).tolist() == [1.0] * 4 + [2.0] * 4
    with pytest.raises(UserError, match=r"lacks 2 of 8 elements of a"):
        read_a(a_checkpoint(tmp_path / "overlap", (0, 2)))
    path = a_checkpoint(tmp_path / "twice", (0, 4))
    (path / "index.json").write_text('{"weight": {"a": [[0, 0, 4], [1, 2, 4], [1, 4, 4]]}}')
    with pytest.raises(UserError, match=r"has elements of a \(weight\) twice"):
        read_a(path)
    with pytest.raises(UserError, match=r"lacks 1 of 8 elements of a"):
        read_a(a_checkpoint(tmp_path / "gap", (0, 5)))


@pytest.mark.parametrize("state", [[], {}, {"exp_avg": []}, {"exp_avg": {}, "exp_avg_sq": {}, "starts": {"a": -1}}, 3])
def test_a_state_file_of_another_kind(state: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not hold what a checkpoint does"):
        read_a(a_checkpoint(tmp_path / "c", (0, 4), state))


class _Command:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def test_code_in_a_state_file_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"state_0000_of_0002\.pth cannot be read"):
        read_a(a_checkpoint(tmp_path / "c", (0, 4), _Command()))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "index",
    [
        "[]",
        "{",
        "[" * 100_000,
        '{"weight": []}',
        '{"weight": {"a": [[0, 0]]}}',
        '{"weight": {"a": [[-1, 0, 8]]}}',
        '{"weight": {"a": [[0, -4, 8]]}}',
        '{"weight": {"a": [[9, 0, 8]]}}',
        '{"weight": {"a": [["0", 0, 8]]}}',
    ],
)
def test_an_index_that_is_none(index: str, tmp_path: Path) -> None:
    path = a_checkpoint(tmp_path / "c", (0, 4))
    (path / "index.json").write_text(index)
    with pytest.raises(UserError, match=r"index\.json cannot be read"):
        read_a(path)


def test_a_missing_file_is_not_a_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_object(tmp_path / "a.json", "")
    (tmp_path / "a.json").write_bytes(b"[")
    with pytest.raises(UserError, match=r"a\.json cannot be read: .*\n  restore it"):
        read_object(tmp_path / "a.json", "restore it")
