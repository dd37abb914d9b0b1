"""Streams: three consecutive resumes equal one run, on any number of ranks; error messages."""

from __future__ import annotations

import gzip
import json
import os
import random
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard

from rwkv_train.config import BatchSettings, DataSettings
from rwkv_train.config.mesh import Mesh
from rwkv_train.data import ahead
from rwkv_train.data import stream as reading
from rwkv_train.data.batch import Batch
from rwkv_train.data.batches import Batches
from rwkv_train.data.stream import PROBE_SAMPLES, open_dataset
from rwkv_train.errors import UserError
from rwkv_train.training.attempt import continue_data
from tests.checkpoint.metas import meta_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture
def files(tmp_path: Path) -> str:
    number = 0
    for part in range(3):
        with open(tmp_path / f"{part}.jsonl", "w") as file:
            for _ in range(90):
                file.write(json.dumps({"text": f"document {number} " + "word " * (number % 17), "id": number}) + "\n")
                number += 1
    return str(tmp_path / "*.jsonl")


def stream(path: str, workers: int = 0, ranks: int = 1, context: int = 64, **more: Any) -> Batches:
    data = DataSettings("stream", path, "bytes", 0.0, workers=workers, **{"held_out_documents": 5, **more})
    return Batches(data, BatchSettings(512, context, None), seed=1, mesh=Mesh(ranks))


def text_of(batches: list[Any]) -> bytes:
    return b"".join(bytes(row.tolist()) for batch in batches for row in batch[0])


def test_the_stream_is_the_documents_in_their_order_epoch_after_epoch(files: str) -> None:
    data = stream(files)
    text = text_of([data.batch(step) for step in range(60)])
    expected = b"".join(b"\0document %d " % n + b"word " * (n % 17) for n in range(5, 270))
    assert (expected * 3).startswith(text[: len(expected) * 2])
    assert len(text) > len(expected) * 1.5
    held = b"".join(b"\0document %d " % n + b"word " * (n % 17) for n in range(5))
    assert data.held_out.tokens.tobytes() == held + b"\0"
    assert "streamed in its own order, without a shuffle" in data.description


def test_three_resumes_in_a_row_are_one_run(files: str) -> None:
    uninterrupted = stream(files)
    expected = [uninterrupted.batch(step) for step in range(49)]
    position, begin = None, 0
    for end in (9, 23, 40, 48):  # the third is in the second epoch
        part = stream(files)
        part.begin(begin, position)
        loader = iter(part.training())
        for step in range(begin, end):
            batch = next(loader)
            assert torch.equal(batch.tokens, expected[step].tokens)
            assert torch.equal(batch.targets, expected[step].targets)
        part.trained(batch)
        for _ in range(3):
            next(loader)  # a loader reads ahead of the step that is saved
        position, begin = json.loads(json.dumps(part.position())), end
        assert torch.equal(part.batch(end)[0], expected[end][0])
        for sample in part.probe_samples(end, PROBE_SAMPLES):
            assert torch.equal(part.lone_sample(sample).tokens, expected[sample // 8].tokens[[sample % 8]])
    assert len(json.dumps(position)) < 2000


def test_ranks_and_workers_change_nothing(files: str) -> None:
    alone = stream(files)
    for workers, ranks in ((1, 1), (2, 2)):
        data = stream(files, workers, ranks)
        for step in (0, 1, 5):
            rows = []
            for rank in range(ranks):
                data.rank = rank
                rows.append(data.batch(step)[0])
            assert torch.equal(torch.cat(rows), alone.batch(step)[0])
        data.stream.close()  # type: ignore[union-attr]


def test_error_messages(files: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.field=body: a row has no text in this column; its columns are text, id"):
        stream(files, field="body")
    with pytest.raises(UserError, match="has no document to train on beyond the 500 held-out ones"):
        stream(files, held_out_documents=500).batch(0)
    with pytest.raises(UserError, match=r"is neither a local file nor a reachable data set"):
        stream(str(tmp_path / "gone.jsonl"))
    (tmp_path / "x.csv").write_text("a,b")
    with pytest.raises(UserError, match="names files of several or of unknown kinds"):
        stream(str(tmp_path / "x.csv"))


BAD_ROWS = {
    b'{"id": 1}': "no text in text",
    b'{"text": 7}': "no text in text",
    b'{"text": null}': "no text in text",
    b'{"text": "caf\xe9"}': "not UTF-8",
    b'{"text": "\\ud800"}': "not UTF-8",
    b'{"text": "\0"}': "not JSON",
    b"[" * 100_000: "not JSON",
    b"[1]": "not an object",
}


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize(
    "bad", list(BAD_ROWS), ids=lambda row: row[:20].decode("latin-1").encode("unicode_escape").decode()
)
def test_a_bad_row_is_left_out_and_named(tmp_path: Path, bad: bytes, suffix: str) -> None:
    """Whether it is read in the run or passed by a resume; the run is the one without that row."""
    lines = [b'{"text": "document %d"}' % number for number in range(500)]
    whole, path = tmp_path / "whole.jsonl", tmp_path / "rows" / f"a.jsonl{suffix}"
    whole.write_bytes(b"\n".join(lines[:399] + lines[400:]) + b"\n")
    lines[399] = bad
    path.parent.mkdir()
    content = b"\n".join(lines) + b"\n"
    packed = {"": content, ".gz": gzip.compress(content), ".zst": zstandard.ZstdCompressor().compress(content)}
    path.write_bytes(packed[suffix])
    expected, data = stream(str(whole)), stream(str(path))
    batches = [data.batch(step) for step in range(18)]  # more than an epoch
    assert text_of(batches) == text_of([expected.batch(step) for step in range(18)])
    assert data.left_out.endswith(f" rows: {path}, line 400: {BAD_ROWS[bad]}")
    resumed = stream(str(path))
    assert batches[11].after is not None
    resumed.begin(12, json.loads(json.dumps(batches[11].after.as_json())))
    assert torch.equal(resumed.batch(12)[0], batches[12][0])
    assert expected.left_out == ""


def test_too_many_bad_rows_end_a_stream(tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"document {n}"}) if n % 20 else "nonsense" for n in range(1, 400)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows) + "\n")
    data = stream(str(tmp_path / "a.jsonl"))
    with pytest.raises(
        UserError, match=r"(?s)rows cannot be used, more than data.max_bad_rows=0.01 allows:.*line 20: not"
    ):
        text_of([data.batch(step) for step in range(20)])
    allowed = stream(str(tmp_path / "a.jsonl"), max_bad_rows=0.05)
    assert text_of([allowed.batch(step) for step in range(9)]).startswith(b"\0document 6\0document 7")


def _flip(path: Path, text: bytes) -> None:
    """Spoils the page of an uncompressed parquet file that holds a text."""
    content = path.read_bytes()
    assert content.count(text) == 1
    path.write_bytes(content.replace(text, bytes(len(text))))


def _damaged(folder: Path, kind: str) -> str:
    """Rows 0 … 99, 100 … 199 and 200 … 299 in three files; of the second one row or part is damaged."""
    import pyarrow
    from pyarrow import parquet

    rows = [f"document {number}" for number in range(300)]
    folder.mkdir()
    for part in range(3):
        texts: list[Any] = rows[100 * part : 100 * part + 100]
        if kind.startswith("parquet"):
            if kind == "parquet, a binary column with a row that is not UTF-8":
                texts = [text.encode() for text in texts]
                texts[7] = b"caf\xe9" if part == 1 else texts[7]
            table, path = pyarrow.table({"text": texts}), folder / f"{part}.parquet"
            options: Any = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
            parquet.write_table(table, path, row_group_size=20, write_statistics=False, **options)
            if part == 1 and kind == "parquet, a page":
                _flip(path, b"document 150")
            elif part == 1 and kind == "parquet, no file":
                path.write_bytes(path.read_bytes()[:-9])
        else:
            objects: list[Any] = [{"text": text} for text in texts]
            if part == 1:
                objects[7] = {"text": None} if kind == "json, a row" else objects[7]
            content = json.dumps(objects)
            cut = part == 1 and kind == "json, a cut array"
            (folder / f"{part}.json").write_text(content[: content.index("document 150")] if cut else content)
    return str(folder / "*")


DAMAGE = {  # the rows that are left out, and what is named
    "parquet, a page": (range(140, 160), "1.parquet, row 41: its row group 2 cannot be read"),
    "parquet, no file": (range(100, 200), "1.parquet, from row 1 on: cannot be read"),
    "parquet, a binary column with a row that is not UTF-8": (range(107, 108), "1.parquet, row 8: not UTF-8"),
    "json, a row": (range(107, 108), "1.json, row 8: no text in text"),
    "json, a cut array": (range(150, 200), "1.json, from row 51 on: cannot be read"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_of_parquet_and_json_costs_the_damaged_rows(tmp_path: Path, kind: str) -> None:
    path = _damaged(tmp_path / "rows", kind)
    lost, named = DAMAGE[kind]
    rows = [json.dumps({"text": f"document {number}"}) for number in range(300) if number not in lost]
    (tmp_path / "whole.jsonl").write_text("\n".join(rows))
    expected, data = stream(str(tmp_path / "whole.jsonl")), stream(path, max_bad_rows=0.5)
    batches = [data.batch(step) for step in range(12)]  # more than an epoch
    assert text_of(batches) == text_of([expected.batch(step) for step in range(12)])
    assert named in data.left_out
    resumed = stream(path, max_bad_rows=0.5)
    data.trained(batches[8])
    resumed.begin(9, json.loads(json.dumps(data.position())))
    assert torch.equal(resumed.batch(9)[0], batches[9][0])
    if kind in ("parquet, a page", "parquet, no file"):  # of a cut file it is not known how many rows are lost
        with pytest.raises(UserError, match=r"rows cannot be used, more than data.max_bad_rows=0.01 allows"):
            text_of([stream(path).batch(step) for step in range(12)])


def test_a_closed_stream_is_read_again(files: str) -> None:
    """And its processes end with `close`, not with the interpreter, which cannot end them without a traceback."""
    data, again = stream(files, workers=1), stream(files)
    first = data.batch(0)[0]
    reading: Any = data.stream
    assert reading._arriving is not None
    data.close()
    assert reading._arriving is None
    assert torch.equal(data.batch(0)[0], first)
    assert torch.equal(data.batch(3)[0], again.batch(3)[0])
    data.close()


@pytest.mark.parametrize("name", ["books.txt.jsonl", "books.JSONL", "books.ndjson", "books.json"])
def test_the_last_suffix_is_the_kind(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"text": "one"}\n{"text": "two"}\n')
    data = stream(str(tmp_path / name), held_out_documents=1)
    assert data.held_out.tokens.tobytes() == b"\0one\0"


def test_another_context_or_another_stream_continues_where_it_can(files: str, tmp_path: Path) -> None:
    """Behind the same token under another context; at the beginning of another stream."""
    before = stream(files)
    batches = [before.batch(step) for step in range(12)]
    before.trained(batches[8])
    text, position, tokens = text_of(batches), before.position(), 9 * 512
    meta = meta_of(step=9, batches=((0, 512),), data_tokens=tokens, position=position, data=before.digest)
    longer = stream(files, context=128)
    continue_data(longer, meta, ())
    assert text_of([longer.batch(step) for step in (9, 10)]) == text[tokens : tokens + 2 * 512]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.jsonl").write_text("".join(json.dumps({"text": f"{n} other"}) + "\n" for n in range(90)))
    other = stream(str(tmp_path / "other" / "a.jsonl"))
    continue_data(other, meta, ())
    assert text_of([other.batch(9)]).startswith(b"\x005 other\x006 other")
    assert longer.position() == position


def _read_in_a_thread(data: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the batches as for a GPU; the thread is slow, so that it is mostly in the middle of one."""
    encode = reading._encode

    def slow(texts: Any) -> Any:
        time.sleep(0.001)
        return encode(texts)

    monkeypatch.setattr(reading, "DOCUMENTS_PER_CHUNK", 3)
    monkeypatch.setattr(reading, "_encode", slow)
    monkeypatch.setattr(Batch, "pin", lambda batch: batch)
    data.pinned = True


def _threads() -> int:
    return sum(thread.name == "batches" for thread in threading.enumerate())


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_thread_that_reads_ahead_is_never_in_the_way(
    files: str, accumulation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positions and probes at every step while it reads, rewinds in the middle, kills and resumes: the same batches."""
    alone = stream(files)
    expected = [alone.batch(step).tokens for step in range(41)]
    draw, step, saved = random.Random(accumulation), 0, {0: json.dumps(alone._start)}
    position, moves = saved[0], 0
    while step < 40:
        data = stream(files)  # a new process
        data.share_out(8 // accumulation)
        _read_in_a_thread(data, monkeypatch)
        data.begin(step, json.loads(position))
        probe = data.lone_sample(8 * step)  # compared when a checkpoint is loaded, before a batch is asked for
        assert torch.equal(probe.tokens, expected[step][:1])
        loader, killed = iter(data.training()), False
        while step < 40 and not killed:
            micro = [next(loader) for _ in range(accumulation)]
            assert torch.equal(torch.cat([batch.tokens for batch in micro]), expected[step])
            data.trained(micro[-1])
            step += 1
            saved[step] = json.dumps(data.position())
            probe = data.lone_sample(8 * step + 7)
            assert torch.equal(probe.tokens, expected[step][7:])
            if draw.random() < 0.2:
                moves += 1
                step = draw.randrange(max(0, step - 4), step + 1)
                position, killed = saved[step], draw.random() < 0.3
                if not killed:  # the run is rewound
                    data.begin(step, json.loads(position))
                    assert _threads() == 0, "the thread owns the data until it ends"
                    with pytest.raises(RuntimeError, match="have been dropped"):
                        next(loader)
                    loader = iter(data.training())
        data.close()
        assert _threads() == 0
    assert moves > 4


def test_a_thread_that_does_not_end_keeps_its_data(files: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, hangs = [], threading.Event()

    def pin(batch: Batch) -> Batch:
        made.append(batch)
        if len(made) > 1:
            hangs.wait(5)
        return batch

    data = stream(files)
    _read_in_a_thread(data, monkeypatch)
    monkeypatch.setattr(ahead, "END_TIMEOUT", 0.05)
    monkeypatch.setattr(Batch, "pin", pin)
    loader = iter(data.training())
    next(loader)
    with pytest.raises(TimeoutError, match="the thread that reads the data ahead has not ended"):
        data.begin(3, None)
    assert data.start_step == 0
    data.close()  # the end of the process does not wait for it
    assert data.stream is not None
    assert data.stream._arriving is not None
    hangs.set()
    monkeypatch.setattr(ahead, "END_TIMEOUT", 5)
    data.begin(3, None)
    assert data.start_step == 3
    assert _threads() == 0


def test_text_files_are_documents_whatever_their_names(tmp_path: Path) -> None:
    """No name is a pattern or a chain of URLs; a file that is not UTF-8 is one row that is left out."""
    for name, content in {
        "a::b [1],c.txt": b"one",
        "d.txt": b"\xff",
        "e.txt": b"",
        "f.txt": "drei 數".encode(),
    }.items():
        (tmp_path / name).write_bytes(content)
    assert list(open_dataset(str(tmp_path / "a::b [1],c.txt"), "train", "body")) == [{"body": "one"}]
    rows = open_dataset(str(tmp_path / "*.txt"), "train", "text")
    assert list(rows) == [{"text": "one"}, "not UTF-8", {"text": "drei 數"}]
    rows.load_state_dict({"file": 1, "row": 1})
    assert list(rows) == [{"text": "drei 數"}]


def test_a_data_set_that_there_is_not_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a proxy that never answers, `datasets` waits without an end."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(reading, "HUB_SECONDS", 0.2)
        began = time.monotonic()
        with pytest.raises(UserError, match=r"^someone/corpis is neither a local file nor a reachable data set"):
            open_dataset("someone/corpis", "train", "text")
        assert time.monotonic() - began < 5


def test_a_pipe_is_no_stream(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe is no file: it can be read once, and a stream is read again"):
        open_dataset(str(tmp_path / "pipe"), "train", "text")
