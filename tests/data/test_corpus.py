"""Which files are trained on, and which are held out (PAINS 11)."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np
import pytest

from rwkv_train.config import DataSettings
from rwkv_train.data import corpus
from rwkv_train.data.corpus import Corpus, join, read_corpus
from rwkv_train.data.tokenizers import ByteTokenizer, load_tokenizer
from rwkv_train.errors import UserError
from tests.data.test_indexed import ours


def text(path: Path | str | None, hold_out: float = 0.05) -> DataSettings:
    return DataSettings(source="text", path=None if path is None else str(path), tokenizer="bytes", hold_out=hold_out)


def library() -> Corpus:
    return read_corpus(DataSettings(source="stdlib", path=None, tokenizer="bytes", hold_out=0.05))


def write(root: Path, **files: bytes) -> Path:
    for name, content in files.items():
        (root / name).write_bytes(content)
    return root


def test_the_library_is_read_without_its_near_copies() -> None:
    corpus = library()
    names = [document.name for document in corpus.train + corpus.held_out]
    assert len(names) > 300
    assert "argparse.py" in names
    assert "json/decoder.py" in names
    assert all(name.endswith(".py") for name in names)
    folders = {folder for name in names for folder in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "site-packages", "dist-packages", "encodings", "lib2to3", "idlelib"}
    for part in (corpus.train, corpus.held_out):
        assert [document.name for document in part] == sorted(document.name for document in part)


def test_the_library_holds_out_a_twentieth() -> None:
    corpus = library()
    files = len(corpus.held_out) / len(corpus.train + corpus.held_out)
    size = sum(len(d.text) for d in corpus.held_out) / sum(len(d.text) for d in corpus.train + corpus.held_out)
    assert 0.03 < files < 0.08
    assert 0.03 < size < 0.08
    assert corpus.description.startswith(
        f"{sysconfig.get_paths()['stdlib']}: {len(corpus.train + corpus.held_out)} files, "
    )
    assert (
        f"hash {corpus.digest}; held out: {len(corpus.held_out)} files by a hash of their names, " in corpus.description
    )
    assert library().digest == corpus.digest


def test_whether_a_file_is_held_out_depends_on_its_name_alone(tmp_path: Path) -> None:
    for number in range(100):
        (tmp_path / f"{number}.txt").write_bytes(b"some text")
    before = {document.name for document in read_corpus(text(tmp_path, 0.2)).held_out}
    assert 8 < len(before) < 35
    write(tmp_path, **{"0.txt": b"changed", "new.txt": b"new"})
    after = {document.name for document in read_corpus(text(tmp_path, 0.2)).held_out}
    assert after - {"new.txt"} == before


def test_a_change_of_any_file_changes_the_hash(tmp_path: Path) -> None:
    digests = [read_corpus(text(write(tmp_path, a=b"one", b=b"two"))).digest]
    digests += [read_corpus(text(write(tmp_path, a=b"onet", b=b"wo"))).digest]
    (tmp_path / "b").rename(tmp_path / "c")
    digests += [read_corpus(text(tmp_path)).digest, read_corpus(text(tmp_path, 0.3)).digest]
    assert len(set(digests)) == 4


def test_another_split_of_the_same_files_changes_the_hash(tmp_path: Path) -> None:
    all_of_it, half = (read_corpus(text(write(tmp_path, a=b"ab", b=b"cd"), share)) for share in (0.0, 0.5))
    assert (half.train, half.held_out) == (all_of_it.train[:1], all_of_it.train[1:])
    assert half.digest != all_of_it.digest


def test_stray_files_are_skipped_and_counted(tmp_path: Path) -> None:
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / "deep" / "er").mkdir(parents=True)
    write(tmp_path / ".ipynb_checkpoints", stray=b"no")
    write(tmp_path / "deep" / "er", text=b"yes")
    write(tmp_path, empty=b"", picture=b"\x89PNG\0\0", **{".hidden": b"no"}, latin=b"caf\xe9 \xff\xfe")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    corpus = read_corpus(text(tmp_path, 0.0))
    assert [document.name for document in corpus.train] == ["deep/er/text", "latin"]
    assert (corpus.hidden, corpus.binary) == (2, 1)
    assert corpus.description == (
        f"{tmp_path}: 2 files, 10 bytes, hash {corpus.digest}; held out: nothing, 0 bytes; "
        "skipped: 1 binary and 2 hidden files"
    )


def test_linked_directories_are_read_once(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    (folder / "real").mkdir(parents=True)
    (elsewhere / "deep").mkdir(parents=True)
    write(folder / "real", a=b"a")
    write(elsewhere, b=b"b", c=b"c")
    write(elsewhere / "deep", d=b"d")
    (folder / "link").symlink_to(elsewhere)
    (folder / "again").symlink_to(folder / "real")
    (elsewhere / "deep" / "loop").symlink_to(folder)
    (elsewhere / "deep" / "itself").symlink_to(elsewhere / "deep")
    names = [document.name for document in read_corpus(text(folder, 0.0)).train]
    assert names == ["link/b", "link/c", "link/deep/d", "real/a"]


def test_token_stores_are_no_text(tmp_path: Path) -> None:
    ours(tmp_path / "s")
    write(tmp_path, **{"s.json": b"{}", "s.crc": b"crc", "other.json": b"[]", "x.idx": b"an index of another kind"})
    corpus = read_corpus(text(tmp_path, 0.0))
    assert [document.name for document in corpus.train] == ["other.json", "x.idx"]
    assert corpus.binary == 0


@pytest.mark.parametrize("share", [0.05, 0.3, 0.999])
def test_the_last_lines_of_a_single_file_are_held_out(tmp_path: Path, share: float) -> None:
    lines = b"".join(b"line %d\n" % number for number in range(200))
    corpus = read_corpus(text(write(tmp_path, one=lines) / "one", share))
    train, held_out = corpus.train[0].text, corpus.held_out[0].text
    assert train + held_out == lines
    assert train.endswith(b"\n")
    assert len(held_out) == pytest.approx(share * len(lines), abs=10)
    assert f"held out: the last {share:.1%} of the text, {len(held_out):,} bytes" in corpus.description


def test_a_single_line_is_cut_at_the_held_out_share(tmp_path: Path) -> None:
    corpus = read_corpus(text(write(tmp_path, one=b"x" * 100) / "one", 0.1))
    assert (len(corpus.train[0].text), len(corpus.held_out[0].text)) == (90, 10)


def test_eighteen_short_files_are_split(tmp_path: Path) -> None:
    for number in range(18):
        (tmp_path / f"sample{number:02}.txt").write_bytes(b"question? answer!\n")
    corpus = read_corpus(text(tmp_path))
    assert corpus.train
    assert corpus.held_out
    assert sum(len(document.text) for document in corpus.train + corpus.held_out) == 18 * 18


def test_a_large_file_is_not_held_out_whole(tmp_path: Path) -> None:
    """Its name has a hash below the share."""
    large = next(f"{n}" for n in range(1000) if corpus._fraction(f"{n}") < 0.05)
    small = next(f"{n}" for n in range(1000) if corpus._fraction(f"{n}") >= 0.05)
    found = read_corpus(text(write(tmp_path, **{large: b"line\n" * 2000, small: b"line\n" * 2})))
    assert sum(len(document.text) for document in found.held_out) == pytest.approx(0.05 * 10_010, abs=10)


def test_documents_are_separated_by_byte_0(tmp_path: Path) -> None:
    corpus = read_corpus(text(write(tmp_path, a=b"ab", b=b"c"), 0.0))
    stream = join(corpus.train, ByteTokenizer())
    assert stream.tokens.dtype == np.uint8
    assert stream.tokens.tobytes() == b"\0ab\0c"
    starts, lengths = stream.documents()
    assert (starts.tolist(), lengths.tolist()) == (
        [1, 4],
        [3, 1],
    )  # each with the end-of-text after it, if there is one
    assert len(join((), ByteTokenizer())) == 0


def test_bytes_are_encoded_and_decoded() -> None:
    tokenizer = load_tokenizer("bytes")
    everything = bytes(range(256))
    assert tokenizer.encode(everything).tolist() == list(everything)
    assert tokenizer.decode(tokenizer.encode(everything)) == everything
    assert tokenizer.decode([104, 105]) == b"hi"
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (256, 0)


def test_errors_name_the_cause_and_the_remedy(tmp_path: Path) -> None:
    def message(data: DataSettings) -> str:
        with pytest.raises(UserError) as error:
            read_corpus(data)
        return str(error.value)

    assert message(text(tmp_path / "gone")) == (
        f"data.path={tmp_path}/gone does not exist\n  give a text file or a directory of text files"
    )
    assert message(text(None)) == "data.path is not set\n  give a text file or a directory of text files: data.path=…"
    for name, kind in (("a.jsonl", "jsonl"), ("a.JSONL", "jsonl"), ("a.parquet", "parquet"), ("a.txt.gz", "gz")):
        (tmp_path / name).write_bytes(b"{}")
        assert f"{name} is no plain text: its name says {kind}\n  make a store" in message(text(tmp_path / name))
        (tmp_path / name).unlink()
    write(tmp_path, picture=b"\0\1\2", **{".hidden": b"x"})
    assert message(text(tmp_path)) == (
        f"data.path={tmp_path} contains no text (skipped: 1 binary and 1 hidden files)\n"
        "  give a text file, or a directory that contains one"
    )
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "loop" in message(text(tmp_path / "loop"))
    with pytest.raises(UserError, match=r"data\.tokenizer=gpt5 is not a known tokenizer"):
        load_tokenizer("gpt5")
