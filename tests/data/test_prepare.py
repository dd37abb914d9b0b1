"""`prepare`: every kind of source, broken documents, kills, full disks; and that a store has what was written."""

from __future__ import annotations

import errno
import gzip
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from rwkv_train.cli import main as cli
from rwkv_train.data import tables
from rwkv_train.data.indexed import IndexedStore
from rwkv_train.data.manifest import Manifest, read_manifest
from rwkv_train.data.prepare import PrepareOptions, pipeline, prepare, units
from rwkv_train.data.prepare.examine import verify
from rwkv_train.errors import UserError
from tests.data.test_indexed import ours, read_like_rwkv_lm

TEXTS = [f"document {n}: häppy 😀 " + "words and more words\n" * (n % 23) for n in range(200)]


def options(out: Path, *sources: Path | str, **more: Any) -> PrepareOptions:
    return PrepareOptions(tuple(map(str, sources)), more.pop("tokenizer", "bytes"), out, **more)


def documents(stem: Path) -> list[str]:
    return [bytes(document[:-1]).decode() for document in read_like_rwkv_lm(stem)]


def write_jsonl(path: Path, texts: list[str] = TEXTS) -> Path:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=n % 2 == 0) + "\n" for n, text in enumerate(texts)))
    return path


@pytest.mark.usefixtures("small_units")
def test_compressed_jsonl_gives_the_same_store(tmp_path: Path) -> None:
    plain = write_jsonl(tmp_path / "a.jsonl")
    with gzip.open(tmp_path / "b.jsonl.gz", "wb") as file:
        file.write(plain.read_bytes())
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(plain.read_bytes()))
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst"):
        manifest = prepare(options(tmp_path / f"store-{name}", tmp_path / name, workers=2))
        assert documents(tmp_path / f"store-{name}") == TEXTS
        assert (manifest.documents, manifest.bytes) == (200, sum(len(text.encode()) for text in TEXTS))
        assert manifest.tokens == manifest.bytes + 200
        assert list(verify(tmp_path / f"store-{name}")) == []
        assert not (tmp_path / f"store-{name}.parts").exists()


def test_a_byte_range_has_the_lines_that_begin_in_it(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS[:12])
    size = path.stat().st_size
    for step in (1, 2, 7, 50, size):
        found = [
            text
            for begin in range(0, size, step)
            for text in units.JsonLinesRange(str(path), begin, min(begin + step, size), "text").documents()
        ]
        assert [text.decode() for text in found] == TEXTS[:12]  # type: ignore[union-attr]


def test_directories_parquet_and_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    import pyarrow.parquet as parquet

    source = tmp_path / "code"
    (source / "deep").mkdir(parents=True)
    (source / "a.py").write_text("print()\n")
    (source / "deep" / "b.c").write_text("int main;\n")
    (source / ".hidden").write_text("x")
    (source / "picture").write_bytes(b"\0\1\2")
    write_jsonl(source / "c.jsonl", TEXTS[:3])
    parquet.write_table(pyarrow.table({"text": TEXTS[3:9]}), source / "d.parquet", row_group_size=2)
    manifest = prepare(options(tmp_path / "s", source))
    assert documents(tmp_path / "s") == ["print()\n", *TEXTS[:9], "int main;\n"]
    assert manifest.skipped == {"binary": 1}
    monkeypatch.setattr(units, "MAX_DOCUMENT_BYTES", 100)
    long = "".join(f"line {n}\n" for n in range(100))
    (tmp_path / "long.txt").write_text(long)
    prepare(options(tmp_path / "t", tmp_path / "long.txt"))
    pieces = documents(tmp_path / "t")
    assert "".join(pieces) == long
    assert len(pieces) > 5
    assert all(piece.endswith("\n") for piece in pieces)


def packed(path: Path, content: bytes) -> Path:
    """A file, compressed as its name says."""
    if path.suffix.lower() == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        content = zstandard.ZstdCompressor().compress(content)
    path.write_bytes(content)
    return path


def rows_of(*paths: Path) -> list[Any]:
    named = [(str(path), path) for path in paths]
    return [document for unit in units.units(named, [], "text", "train") for document in unit.documents()]


LINES = "".join(json.dumps({"text": text, "timestamp": "2019"}) + "\n" for text in TEXTS).encode()
ARRAY = json.dumps([{"text": text, "n": 1} for text in TEXTS]).encode()
TABLE = "n,text\r\n" + "".join('1,"{}"\r\n'.format(text.replace('"', '""')) for text in TEXTS)


@pytest.mark.parametrize("block", [1500, 2**25])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("c4-train.00000-of-01024.json.gz", LINES),
        ("a.json.zst", LINES),
        ("a.json", LINES),
        ("a.json", b'{"text": damaged\n' + LINES),
        ("A.JSONL", LINES),
        ("a.jsonlines", LINES),
        ("books.txt.jsonl", LINES),
        ("a.Json.GZ", LINES),
        ("a.json", ARRAY),
        ("a.json", json.dumps([{"text": text} for text in TEXTS], indent=1, ensure_ascii=False).encode()),
        ("a.json.gz", ARRAY),
        ("a.csv", TABLE.encode()),
        ("a.csv.gz", b"\xef\xbb\xbf" + TABLE.encode()),
        ("a.tsv", TABLE.replace("1,", "1\t").replace("n,text", "n\ttext").encode()),
    ],
)
def test_rows_are_documents_whatever_the_file_is_called(
    tmp_path: Path, name: str, content: bytes, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", block)
    monkeypatch.setattr(tables, "_READ_CHARACTERS", block)
    found = rows_of(packed(tmp_path / name, content))
    assert [text.decode() for text in found if isinstance(text, bytes)] == TEXTS
    assert len(found) - len(TEXTS) == content.startswith(b'{"text": damaged')


@pytest.mark.parametrize("content", ['{\n "name": "x"\n}\n', '{"name": "x"}', "[1, 2]\n", '["a"]', "no JSON", '"text"'])
def test_json_without_rows_is_a_text(tmp_path: Path, content: str) -> None:
    assert rows_of(packed(tmp_path / "a.json", content.encode())) == [content.encode()]
    assert rows_of(packed(tmp_path / "a.json.gz", content.encode())) == [content.encode()]


def test_unusable_rows_of_json_arrays_and_tables(tmp_path: Path) -> None:
    array = b'[{"text": "a"}, {"body": 1}, 7, {"text": "\xff"}, {"text": "\\ud800"}, {"text": "b"}]'
    found = rows_of(packed(tmp_path / "a.json", array))
    assert [row if isinstance(row, bytes) else (row.reason, row.where[-9:]) for row in found] == [
        b"a",
        ("without the text field", "element 2"),
        ("without the text field", "element 3"),
        ("not UTF-8", "element 4"),
        ("not UTF-8", "element 5"),
        b"b",
    ]
    for name, content in (("t.csv", b"text,n\nx,1\n\xe9,2\n"), ("u.csv", b"n,text\n1,x\n2\n")):
        first, second = rows_of(packed(tmp_path / name, content))
        assert (first, second.where[-5:]) == (b"x", "row 2")
    (other,) = rows_of(packed(tmp_path / "other.csv", b"a,b\n1,2\n"))
    assert other.reason == "without the text field"
    for content in (b'[{"text": "a"}, {"text": ', b'[{"text": "a"} nonsense', b"[" * 3 + b'{"text'):
        with pytest.raises(UserError, match=r"a.json, element 2: not complete JSON"):
            rows_of(packed(tmp_path / "a.json", content.replace(b"[[[", b'[{"text": "a"}, ')))


def test_world_with_additional_tokens(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["hello <|user|> world", "😀"])
    manifest = prepare(options(tmp_path / "s", path, tokenizer="world", extend=("<|user|>",)))
    store = IndexedStore(tmp_path / "s")
    tokenizer = manifest.load_tokenizer()
    assert store.dtype == np.int32
    assert tokenizer.decode(store.document(0)) == b"hello <|user|> world"
    assert manifest.largest_token == 65536
    assert (manifest.identity, read_manifest(tmp_path / "s")) == (tokenizer.identity, manifest)


BROKEN = {
    "not UTF-8": b'{"text": "\xff\xfe"}\n',
    "not JSON": b"{nonsense\n",
    "empty": b'{"text": ""}\n',
    "without the text field": b'{"body": "x"}\n[1]\n',
    "a line of more than 16 MiB": b'{"text": "' + b"x" * 20_000_000 + b'"}\n',
}


def test_broken_documents_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, good = tmp_path / "a.jsonl", b'{"text": "good"}\n'
    path.write_bytes(good + b"".join(broken + good for broken in BROKEN.values()))
    command = ["prepare", str(path), "--tokenizer", "bytes", "--out", str(tmp_path / "s")]
    assert cli.main(command) == 2
    message = "5 of 11 rows cannot be used, more than --max-bad-rows 0.01 allows:\n"
    assert message in capsys.readouterr().err
    assert cli.main([*command, "--max-bad-rows", "1"]) == 0
    assert documents(tmp_path / "s") == ["good"] * (1 + len(BROKEN))
    output = capsys.readouterr().out
    for why in BROKEN:
        assert f"left out: {2 if why == 'without the text field' else 1} documents, {why}" in output


@pytest.mark.usefixtures("small_units")
def test_the_first_bad_rows_are_named_by_file_and_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A few are left out, deep JSON among them; more than the share stop `prepare`, early if there are many rows."""
    bad = ["[" * 100_000, '{"text": 7}', "nonsense", '{"text": "\\ud800"}', '{"body": 1}', "{", "[]"]
    reasons = ["not JSON", "without the text field", "not JSON", "not UTF-8", "without the text field"]
    lines = [json.dumps({"text": f"document {n}"}) for n in range(700)]
    for number, line in enumerate(bad):
        lines[50 + 100 * number] = line
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines) + "\n")
    named = "; ".join(f"{path}, line {51 + 100 * n}: {reason}" for n, reason in enumerate(reasons))
    assert prepare(options(tmp_path / "s", path)).documents == 693
    assert f"left out: 7 of 700 rows: {named}" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(UserError) as error:
        prepare(options(tmp_path / "t", path, max_bad_rows=0.009))
    assert error.value.what == (
        "7 of 700 rows cannot be used, more than --max-bad-rows 0.009 allows:\n    " + named.replace("; ", "\n    ")
    )
    path.write_text("".join(f"{line}\nnonsense\n" for line in lines))
    with pytest.raises(UserError, match=r"^\d\d of \d+ rows cannot be used"):
        prepare(options(tmp_path / "u", path))


@pytest.mark.parametrize("why", list(BROKEN)[:4])
def test_broken_documents_stop_prepare_on_request(tmp_path: Path, why: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + BROKEN[why])
    with pytest.raises(UserError, match=rf"a.jsonl, byte 17: unusable document \({why}\)\n.*--broken"):
        prepare(options(tmp_path / "s", path, stop_at_broken=True))
    assert not (tmp_path / "s.idx").exists()


def test_verify_names_the_document_of_a_flipped_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(options(tmp_path / "s", write_jsonl(tmp_path / "a.jsonl")))
    store = IndexedStore(tmp_path / "s")
    starts, _ = store.documents()
    with open(tmp_path / "s.bin", "r+b") as file:
        file.seek(2 * (int(starts[123]) + 5))
        file.write(b"\x01")
    assert cli.main(["prepare", "verify", str(tmp_path / "s")]) == 1
    output = capsys.readouterr().out
    assert f"s.bin, document 123 (from token {int(starts[123]):,} on) differs from its checksum" in output
    assert "1 fault\n" in output
    index = bytearray((tmp_path / "s.idx").read_bytes())
    index[34] ^= 1
    (tmp_path / "s.idx").write_bytes(index)
    assert any("does not begin at the end of the previous one" in fault.what for fault in verify(tmp_path / "s"))


def test_verify_finds_tokens_outside_the_vocabulary_in_a_store_without_manifest(tmp_path: Path) -> None:
    ours(tmp_path / "x", [[5, 6, 0], [7, 300, 0]])
    faults = list(verify(tmp_path / "x", "bytes"))
    assert "x.bin, document 1: token 4 is 300, the vocabulary of bytes has 256" in faults[0].what
    assert "has no manifest" in faults[1].what
    assert not faults[1].remedy


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(options(tmp_path / "s", write_jsonl(tmp_path / "a.jsonl"), tokenizer="world"))
    assert cli.main(["prepare", "inspect", str(tmp_path / "s"), "--document", "7"]) == 0
    output = capsys.readouterr().out
    assert "s: 200 documents, " in output
    assert "tokenizer world:" in output
    assert "document 7: häppy 😀 words and more words" in output
    assert cli.main(["prepare", "inspect", str(tmp_path / "s"), "--document", "200"]) == 2
    assert "has no document 200\n  give a number from 0 to 199" in capsys.readouterr().err


def test_error_messages(tmp_path: Path) -> None:
    def message(*sources: Path | str, **more: Any) -> str:
        with pytest.raises(UserError) as error:
            prepare(options(tmp_path / "s", *sources, **more))
        return str(error.value)

    path = write_jsonl(tmp_path / "a.jsonl")
    assert "gone.jsonl: there is no such file or directory" in message(tmp_path / "gone.jsonl")
    (tmp_path / "empty").mkdir()
    assert "is an empty directory" in message(tmp_path / "empty")
    assert "data.tokenizer=gpt5 is not a known tokenizer\n  give bytes, world" in message(path, tokenizer="gpt5")
    assert "no usable document (200 without the text field)\n  give the column" in message(path, field="body")
    (tmp_path / "bad.jsonl.gz").write_bytes(b"no gzip")
    assert "bad.jsonl.gz cannot be decompressed" in message(tmp_path / "bad.jsonl.gz")
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    assert "bad.parquet is not a parquet file" in message(tmp_path / "bad.parquet")
    assert not (tmp_path / "s.idx").exists()
    assert not (tmp_path / "s.parts").exists(), "it would block another attempt"
    prepare(options(tmp_path / "s", path))
    assert "s.bin exists already\n  give another --out" in message(path)


@pytest.mark.parametrize("suffix", [".json", ".crc", ".bin", ".idx"])
def test_no_file_of_a_user_is_overwritten_or_deleted(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the source, nor an unrelated file, nor one that appears while the shards are made on a full disk."""
    path = write_jsonl(tmp_path / f"corpus{suffix}", TEXTS[:3])
    before = path.read_bytes()
    with pytest.raises(UserError, match=rf"corpus\{suffix} exists already\n  give another --out: `prepare` overwrites"):
        prepare(options(tmp_path / "corpus", path))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    source, theirs = write_jsonl(tmp_path / "a.jsonl", TEXTS[:3]), tmp_path / f"s{suffix}"
    monkeypatch.setattr(pipeline, "write_manifest", lambda *_: theirs.write_text("theirs"))
    with pytest.raises(UserError, match=rf"s\{suffix} exists already"):
        prepare(options(tmp_path / "s", source))
    assert theirs.read_text() == "theirs"
    assert path.read_bytes() == before
    assert {file.name for file in tmp_path.glob("s.*")} == {"s.parts", theirs.name}


def test_a_file_that_cannot_be_renamed_leaves_no_part_of_a_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename

    def refuse_the_index(source: Path, target: Path) -> None:
        if target.suffix == ".idx":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        rename(source, target)

    path = write_jsonl(tmp_path / "a.jsonl", TEXTS[:3])
    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", refuse_the_index)
        with pytest.raises(UserError, match=r"s\.idx cannot be written: No space left on device"):
            prepare(options(tmp_path / "s", path))
    assert {file.name for file in tmp_path.iterdir()} == {"a.jsonl", "s.parts"}
    prepare(options(tmp_path / "s", path))
    assert list(verify(tmp_path / "s")) == []


def test_a_directory_with_the_name_of_the_shards_is_not_deleted(tmp_path: Path) -> None:
    (tmp_path / "s.parts").mkdir()
    (tmp_path / "s.parts" / "mine").write_text("mine")
    with pytest.raises(UserError, match=r"s.parts has files that are not of an unfinished `prepare`.*\n  give another"):
        prepare(options(tmp_path / "s", write_jsonl(tmp_path / "a.jsonl")))
    assert (tmp_path / "s.parts" / "mine").read_text() == "mine"


@pytest.mark.parametrize("pattern", ["", "*"])
def test_a_store_inside_its_source_is_not_its_source(
    tmp_path: Path, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broken-off `prepare` goes on, and another one finds the same documents."""
    source = tmp_path / "corpus"
    source.mkdir()
    write_jsonl(source / "a.jsonl", TEXTS[:3])
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "_join", lambda *_: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            prepare(options(source / "store", source / pattern))
    assert (source / "store.parts" / "000000.json").exists()
    assert prepare(options(source / "store", source / pattern)).documents == 3
    assert prepare(options(source / "other", source / pattern)).skipped == {}
    assert documents(source / "other") == documents(source / "store") == TEXTS[:3]


def test_invalid_manifests(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text("{}")
    with pytest.raises(UserError, match=r"s.json is not the manifest of a store .*\n  remove it"):
        read_manifest(tmp_path / "s")
    (tmp_path / "s.json").write_text('{"format": 99}')
    with pytest.raises(UserError, match=r"has format 99, this version reads 1"):
        read_manifest(tmp_path / "s")
    manifest = Manifest("bytes", [], "other", 1, 1, 1, 1, "", {}, [])
    with pytest.raises(UserError, match=r"made with the tokenizer other; bytes is bytes now\n  restore"):
        manifest.load_tokenizer()


@pytest.mark.parametrize("length", range(129, 400, 9))
def test_behind_a_line_that_is_too_long_none_is_lost(
    tmp_path: Path, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the blocks end in which a packed file is read, also right after the long line."""
    monkeypatch.setattr(units, "UNIT_BYTES", 64)
    monkeypatch.setattr(units, "MAX_DOCUMENT_BYTES", 128)
    for more in range(9):
        long = json.dumps({"text": "x" * (length + more - len('{"text": ""}\n'))})
        lines = [*(json.dumps({"text": f"t{n}"}) for n in range(3)), long, *(f'{{"text": "u{n}"}}' for n in range(9))]
        with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
            file.write("\n".join(lines) + "\n")
        found = [
            document
            for unit in units.units([("a", tmp_path / "a.jsonl.gz")], [], "text", "train")
            for document in unit.documents()
        ]
        texts = [document for document in found if isinstance(document, bytes)]
        assert texts == [b"t0", b"t1", b"t2", *(b"u%d" % n for n in range(9))]
        assert len(found) == len(texts) + 1, "the long one is counted"
