"""The token store: our reader against an independent writer, our writer against an independent reader, and faults."""

from __future__ import annotations

import gc
import os
import resource
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rwkv_train.config import BatchSettings, DataSettings
from rwkv_train.data import indexed
from rwkv_train.data.batches import Batches
from rwkv_train.data.indexed import IndexedStore, write_index
from rwkv_train.data.manifest import Manifest
from rwkv_train.data.prepare import examine
from rwkv_train.data.prepare.examine import verify
from rwkv_train.data.store import JoinedStore, MemoryStore, StoreSlice
from rwkv_train.errors import UserError

CODES = {"uint8": 1, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}


def write_like_megatron(stem: Path, documents: list[list[int]], dtype: str) -> None:
    """As Megatron-LM's MMapIndexedDatasetBuilder writes it, from the format's description, with struct alone."""
    size = np.dtype(dtype).itemsize
    with open(f"{stem}.bin", "wb") as file:
        for document in documents:
            file.write(b"".join(token.to_bytes(size, "little") for token in document))
    with open(f"{stem}.idx", "wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<QB", 1, CODES[dtype]))
        file.write(struct.pack("<QQ", len(documents), len(documents) + 1))
        file.write(b"".join(struct.pack("<i", len(document)) for document in documents))
        at = 0
        for document in documents:
            file.write(struct.pack("<q", at))
            at += len(document) * size
        file.write(b"".join(struct.pack("<q", number) for number in range(len(documents) + 1)))


def read_like_rwkv_lm(stem: Path) -> list[list[int]]:
    """As RWKV-LM's and GPT-NeoX's MMapIndexedDataset reads it."""
    raw = Path(f"{stem}.idx").read_bytes()
    assert raw[:9] == b"MMIDIDX\x00\x00"
    (version,) = struct.unpack("<Q", raw[9:17])
    (code,) = struct.unpack("<B", raw[17:18])
    (count,) = struct.unpack("<Q", raw[18:26])
    (boundaries,) = struct.unpack("<Q", raw[26:34])
    assert (version, boundaries) == (1, count + 1)
    dtype = {number: name for name, number in CODES.items()}[code]
    sizes = np.frombuffer(raw, np.int32, count, 34)
    pointers = np.frombuffer(raw, np.int64, count, 34 + 4 * count)
    assert np.frombuffer(raw, np.int64, boundaries, 34 + 12 * count).tolist() == list(range(boundaries))
    content = Path(f"{stem}.bin").read_bytes()
    return [
        np.frombuffer(content, dtype, size, pointer).tolist() for size, pointer in zip(sizes, pointers, strict=True)
    ]


DOCUMENTS = [[5, 6, 7, 0], [0], [9] * 100 + [0], [1, 2, 0]]


def ours(stem: Path, documents: list[list[int]] = DOCUMENTS, dtype: Any = np.uint16) -> Path:
    np.concatenate([np.array(document, dtype) for document in documents]).tofile(f"{stem}.bin")
    lengths = np.array([len(document) for document in documents], np.int32)
    write_index(Path(f"{stem}.idx"), dtype, lambda: iter([lengths[:1], lengths[1:]]))
    return stem


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "int64"])
def test_stores_of_megatron_are_read(tmp_path: Path, dtype: str) -> None:
    write_like_megatron(tmp_path / "a.b", DOCUMENTS, dtype)
    store = IndexedStore(tmp_path / "a.b.idx")
    assert [store.document(n).tolist() for n in range(4)] == DOCUMENTS
    assert store.dtype == dtype
    flat = [token for document in DOCUMENTS for token in document]
    out = np.empty(60, np.int64)
    store.read(3, out)
    assert out.tolist() == flat[3:63]
    starts, lengths = store.documents()
    assert (starts.tolist(), lengths.tolist()) == ([0, 4, 5, 106], [4, 1, 101, 3])
    assert [store.document_of(token) for token in (0, 3, 4, 5, 105, 106, 108)] == [0, 0, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_our_stores_are_read_by_rwkv_lm(tmp_path: Path, dtype: Any) -> None:
    assert read_like_rwkv_lm(ours(tmp_path / "x", dtype=dtype)) == DOCUMENTS


def test_a_document_may_have_several_sequences(tmp_path: Path) -> None:
    """Megatron's own documents may span sequences: the third column has their first sequences."""
    write_like_megatron(tmp_path / "x", DOCUMENTS, "uint16")
    raw = bytearray((tmp_path / "x.idx").read_bytes())
    raw[26:34] = struct.pack("<Q", 3)
    raw[34 + 12 * 4 :] = struct.pack("<3q", 0, 3, 4)
    (tmp_path / "x.idx").write_bytes(raw)
    store = IndexedStore(tmp_path / "x")
    assert store.document(0).tolist() == DOCUMENTS[0] + DOCUMENTS[1] + DOCUMENTS[2]
    assert store.documents()[1].tolist() == [106, 3]


def test_errors_name_the_cause_and_the_remedy(tmp_path: Path) -> None:
    def message(path: Path) -> str:
        with pytest.raises(UserError) as error:
            IndexedStore(path)
        return str(error.value)

    stem = ours(tmp_path / "x")
    whole, index = (tmp_path / "x.bin").read_bytes(), (tmp_path / "x.idx").read_bytes()
    (tmp_path / "x.bin").write_bytes(whole[:-7])
    assert f"{stem}.bin has {len(whole) - 7} bytes, according to x.idx {len(whole)}: it is truncated" in message(stem)
    (tmp_path / "x.bin").write_bytes(whole + b"\0\0")
    assert "the files belong to different stores\n  copy both files" in message(stem)
    (tmp_path / "x.bin").write_bytes(whole)
    (tmp_path / "x.idx").write_bytes(index[:-1])
    assert f"its 4 sequences need {len(index)}" in message(stem)
    (tmp_path / "x.idx").write_bytes(b"something else, long enough to be an index")
    assert "is not the index of a token store (MMIDIDX)" in message(stem)
    (tmp_path / "x.idx").write_bytes(index[:9] + struct.pack("<Q", 2) + index[17:])
    assert "version 2" in message(stem)
    (tmp_path / "x.idx").unlink()
    assert f"there is no file {stem}.idx" in message(stem)


def foreign(
    stem: Path,
    boundaries: list[int] | None = None,
    lengths: dict[int, int] | None = None,
    pointers: dict[int, int] | None = None,
    tokens: dict[int, int] | None = None,
    dtype: Any = np.int32,
) -> Path:
    """A store of 3,000 documents of three tokens, with changed entries; `boundaries` replaces all of them."""
    count, size = 3000, np.dtype(dtype).itemsize
    content = np.tile(np.array([5, 6, 0], dtype), count)
    for number, token in (tokens or {}).items():
        content[number] = token
    content.tofile(f"{stem}.bin")
    sizes, offsets = np.full(count, 3, np.int32), np.arange(count, dtype=np.int64) * 3 * size
    for number, length in (lengths or {}).items():
        sizes[number] = length
    for number, offset in (pointers or {}).items():
        offsets[number] = offset
    edges = np.arange(count + 1, dtype=np.int64) if boundaries is None else np.array(boundaries, np.int64)
    code = CODES[np.dtype(dtype).name]
    with open(f"{stem}.idx", "wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, count, len(edges)))
        file.write(sizes.tobytes() + offsets.tobytes() + edges.tobytes())
    return stem


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "one edge": (
        {"boundaries": [0]},
        "its documents begin at sequence 0 and end at 0; it has the sequences 0 to 3,000",
    ),
    "a merge": ({"boundaries": list(range(1501))}, "end at 1,500; it has the sequences 0 to 3,000"),
    "beyond": ({"boundaries": [*range(2000), 7000, 3000]}, "the document boundaries are not in ascending order"),
    "unordered": ({"boundaries": [0, 20, 10, 3000]}, "the document boundaries are not in ascending order"),
    "a negative edge": ({"boundaries": [0, -5, 3000]}, "the document boundaries are not in ascending order"),
    "a negative length": ({"lengths": {1: -3}}, "sequence 1 has -3 tokens"),
    "a gap": ({"pointers": {2: 12}}, "sequence 2 does not begin at the end of the previous one"),
    "not at the start": ({"pointers": {0: 4}}, "sequence 0 does not begin at the end of the previous one"),
    "a negative token": ({"tokens": {8: -1}}, "x.bin, document 2: token 8 is -1"),
    "a token of int16": ({"tokens": {8: -1}, "dtype": np.int16}, "x.bin, document 2: token 8 is -1"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_inconsistent_stores_are_not_opened(tmp_path: Path, name: str) -> None:
    changes, fault = FAULTS[name]
    stem = foreign(tmp_path / "x", **changes)
    with pytest.raises(UserError) as error:
        IndexedStore(stem)
    assert fault in str(error.value)
    assert "again" in error.value.remedy
    assert any(fault in found.what for found in verify(stem) if found.remedy), "verify says the same"


def test_verify_finds_what_no_sample_showed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexed, "_PAGE_BYTES", 8)  # 64 samples of two tokens each
    monkeypatch.setattr(examine, "_BLOCK_SIZE", 100)
    edges = list(range(3001))
    edges[1001], edges[1002] = edges[1002], edges[1001]
    for changes, fault in (
        ({"boundaries": edges}, "boundaries are not in ascending order"),
        ({"lengths": {1000: 4, 1001: 2}}, "sequence 1,001 does not begin"),
        ({"tokens": {4050: -1}}, "document 1,350: token 4,050 is -1"),
    ):
        stem = foreign(tmp_path / "x", **changes)
        IndexedStore(stem)
        assert fault in "\n".join(found.what for found in verify(stem) if found.remedy)


def test_a_negative_token_that_no_sample_showed_is_found_when_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexed, "_PAGE_BYTES", 8)
    foreign(tmp_path / "x", tokens={4050: -1}, dtype=np.int16)
    data = batches(tmp_path / "x", hold_out=0.0)
    starts = data.order.starts(np.arange(data.order.windows, dtype=np.int64))
    step = int(np.flatnonzero((starts <= 4050) & (starts + 8 > 4050))[0]) // 2
    with pytest.raises(UserError, match=r"store, sample at token [\d,]+, contains the token -1"):
        data.batch(step)


def test_a_store_without_document_boundaries_is_one_document(tmp_path: Path) -> None:
    stem = foreign(tmp_path / "x", boundaries=[])
    assert IndexedStore(stem).documents()[1].tolist() == [9000]
    assert "x.idx has no document boundaries: the store is taken for one document" in batches(stem).description
    assert [found.remedy for found in verify(stem)] == ["", ""], "notes, no faults"


def test_moved_sequences_change_the_fingerprint(tmp_path: Path) -> None:
    """Also those between the pages that are checked; manifests of format 1 keep theirs."""
    before = IndexedStore(foreign(tmp_path / "x"))
    moved = IndexedStore(foreign(tmp_path / "y", pointers={5: 0}), check=False)
    assert before.fingerprint() != moved.fingerprint()
    assert before.fingerprint(with_pointers=False) == moved.fingerprint(with_pointers=False)
    for version in (1, 2):
        fingerprint = before.fingerprint(with_pointers=version > 1)
        manifest = Manifest("bytes", [], "bytes", 1, 1, 1, 1, fingerprint, {}, [], format=version)
        assert (manifest.matches(before), manifest.matches(moved)) == (True, version == 1)


def test_slices_and_joined_stores_are_one_stream(tmp_path: Path) -> None:
    first, second = IndexedStore(ours(tmp_path / "x")), MemoryStore(np.arange(10), np.array([0, 4]))
    joined = JoinedStore([first, second, first])
    flat = np.concatenate([first.tokens, second.tokens, first.tokens]).astype(np.int64)
    assert len(joined) == len(flat)
    for start in range(len(flat) - 20):
        out = np.empty(20, np.int64)
        joined.read(start, out)
        assert np.array_equal(out, flat[start : start + 20])
    part = StoreSlice(joined, 100, 130)
    out = np.empty(30, np.int64)
    part.read(0, out)
    assert np.array_equal(out, flat[100:130])
    starts, lengths = part.documents()
    assert (starts.tolist(), lengths.tolist()) == ([6, 9, 13, 19, 23, 24], [3, 4, 6, 4, 1, 101])


def batches(path: Path | str, tokenizer: str | None = "world", **more: Any) -> Batches:
    data = DataSettings("store", str(path), tokenizer, more.pop("hold_out", 0.1), **more)
    return Batches(data, BatchSettings(16, 8, None), seed=1)


def test_training_takes_a_store_a_glob_and_a_directory(tmp_path: Path) -> None:
    ours(tmp_path / "s-1")
    ours(tmp_path / "s-2", [[3] * 50 + [0], [4] * 40 + [0]])
    (tmp_path / "notes.txt").write_text("a stray file")
    assert len(batches(tmp_path / "s-1", hold_out=0.0).train) == 109
    for path in (tmp_path, tmp_path / "s-*", tmp_path / "s-*.idx", tmp_path / "s-*.bin"):
        data = batches(path, hold_out=0.0)
        assert len(data.train) == 109 + 92
        assert "6 documents, 201 tokens" in data.description
    held = batches(tmp_path, hold_out=0.2)
    assert len(held.train) == 109 + 51, "the last document is held out"
    assert held.held_out.store is held.train.store
    out = np.empty(42, np.int64)
    held.held_out.read(0, out)
    assert out.tolist() == [0] + [4] * 40 + [0]


@pytest.mark.parametrize(
    ("lengths", "share", "train", "inside"),
    [
        ([1_172, 1_228_895], 0.005, 1_223_917, True),  # the last document is nearly everything
        ([1_228_895, 1_172], 0.005, 1_223_917, True),  # it is too small, and the first one too large
        ([1_000_000], 0.1, 900_000, True),  # a single document
        ([99_999, 1], 0.1, 90_000, True),  # an empty last document
        ([90_000, 9_000, 1_000], 0.1, 90_000, False),  # exactly there
        ([85_000, 15_000], 0.1, 85_000, False),  # near enough
        ([50_000, 44_000, 6_000], 0.1, 94_000, False),
    ],
)
def test_about_the_share_asked_for_is_held_out(
    tmp_path: Path, lengths: list[int], share: float, train: int, inside: bool
) -> None:
    ours(tmp_path / "x", [[7] * (length - 1) + [0] for length in lengths])
    data = batches(tmp_path / "x", hold_out=share)
    held = sum(lengths) - train
    assert (len(data.train), len(data.held_out)) == (train, held + 1)
    assert f"held out: the last {held:,} tokens" in data.description
    note = f"({held / sum(lengths):.2%}; they begin inside a document)"
    assert (note in data.description) == inside
    for part, tokens in ((data.train, train), (data.held_out, held)):
        starts, sizes = part.documents()
        assert int(sizes.sum()) == tokens, "packed documents are cut as well"
        assert starts[0] == len(part) - tokens


def test_error_messages_of_stores(tmp_path: Path) -> None:
    ours(tmp_path / "x")
    with pytest.raises(UserError, match=r"gone: there is no store gone.bin and gone.idx\n.*rwkv-train prepare"):
        batches(tmp_path / "gone")
    with pytest.raises(UserError, match=r"x has no manifest .*that names its tokenizer\n  set data.tokenizer"):
        batches(tmp_path / "x", None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"contains no store: it has no \.idx file"):
        batches(tmp_path / "empty")
    ours(tmp_path / "large", [[300, 0] * 20])
    with pytest.raises(
        UserError, match=r"large.bin contains the token 300; the vocabulary has 256\n  set data.tokenizer"
    ):
        batches(tmp_path / "large", "bytes", hold_out=0.0)


def test_a_token_beyond_the_vocabulary_that_no_sample_showed_is_found_when_it_is_read(tmp_path: Path) -> None:
    tokens = [7] * 2_000_000
    tokens[1_000_123] = 70_000
    ours(tmp_path / "x", [tokens], np.int32)
    data = Batches(DataSettings("store", str(tmp_path / "x"), "world", 0.0), BatchSettings(8192, 4096, None), seed=1)
    windows = np.arange(data.order.windows, dtype=np.int64)
    step = int(np.flatnonzero(np.abs(data.order.starts(windows) + 2048 - 1_000_123) <= 2048)[0]) // 2
    with pytest.raises(UserError, match=r"store, sample at token [\d,]+, contains the token 70000"):
        data.batch(step)


def test_stores_keep_no_descriptor(tmp_path: Path) -> None:
    """601 of them did not fit below `ulimit -n 1024`, and `select` knows no descriptor from 1024 on."""
    for number in range(30):
        ours(tmp_path / f"s-{number:02d}")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = set(map(int, os.listdir("/proc/self/fd")))
    free = [number for number in range(soft) if number not in used]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[10], hard))  # ten more
    try:
        data = batches(tmp_path, hold_out=0.0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(data.train) == 30 * 109


def test_a_mapping_ends_with_what_reads_it(tmp_path: Path) -> None:
    stem = ours(tmp_path / "s")
    mapped = f"{tmp_path}/s.bin"
    tokens = IndexedStore(stem).tokens[2:5]
    assert mapped in Path("/proc/self/maps").read_text()
    assert not tokens.flags.writeable
    assert tokens.tolist() == [7, 0, 0]
    del tokens
    gc.collect()
    assert mapped not in Path("/proc/self/maps").read_text()


def test_opening_a_store_does_not_read_it(tmp_path: Path) -> None:
    """A sparse file of a terabyte, of which only the requested pages are read."""
    size = 2**40
    with open(tmp_path / "x.bin", "wb") as file:
        file.truncate(size)
    document = 2**30 - 1
    count, rest = divmod(size // 2, document)
    write_index(tmp_path / "x.idx", np.uint16, lambda: iter([np.array([document] * count + [rest], np.int32)]))
    data = batches(tmp_path / "x", hold_out=0.0)
    assert len(data.train) == size // 2
    tokens, targets, *_ = data.batch(10**6)
    assert tokens.shape == (2, 8)
    assert not tokens.any()
    assert not targets.any()
