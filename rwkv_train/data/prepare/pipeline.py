"""Tokenises units into shards on all cores, and joins the shards into a store.

Finished shards are kept, so that a killed `prepare` resumes when the same command runs again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_train import __version__
from rwkv_train.data.indexed import PARTS_SUFFIX, PLAN_FILE, STORE_SUFFIXES, IndexedStore, store_file, write_index
from rwkv_train.data.manifest import Manifest, write_manifest
from rwkv_train.data.prepare.find import find_sources
from rwkv_train.data.prepare.piped import copied
from rwkv_train.data.prepare.progress import PrepareProgress
from rwkv_train.data.prepare.shards import Shard, ShardCounts, make_shard
from rwkv_train.data.prepare.units import Unit, units
from rwkv_train.data.tokenizers import Tokenizer, load_tokenizer, token_dtype, tokenizer_note
from rwkv_train.data.workers import pool as pool_of
from rwkv_train.errors import UserError
from rwkv_train.file_lock import lock

MAX_ATTEMPTS = 3  # at a unit whose worker process is killed
_BLOCK_BYTES = 2**22  # copied or hashed at once


@dataclass(frozen=True)
class PrepareOptions:
    """The options of `rwkv-train prepare`.

    Attributes:
        sources: files, directories, globs, or names of data sets.
        tokenizer: bytes, world, or the path of a tokenizer.json.
        out: NAME for NAME.bin, NAME.idx, NAME.crc and NAME.json.
        extend: texts that become single tokens.
        field: column or JSON key of the text.
        split: split of the data sets.
        stop_at_broken: whether to fail at the first unusable document; otherwise such are left out and counted.
        workers: number of worker processes.
        max_bad_rows: share of unusable documents that is left out without an error.
    """

    sources: Sequence[str]
    tokenizer: str
    out: Path
    extend: Sequence[str] = ()
    field: str = "text"
    split: str = "train"
    stop_at_broken: bool = False
    workers: int = 1
    max_bad_rows: float = 0.01


def prepare(options: PrepareOptions) -> Manifest:
    """Makes a store, and shows progress on standard error.

    Returns:
        The manifest that was written.

    Raises:
        UserError: a source is missing or damaged, the store exists already, too many documents are unusable, or a file
            cannot be written.
    """
    tokenizer = load_tokenizer(options.tokenizer, options.extend)
    _refuse_existing(options.out)
    files, names = find_sources(options.sources)
    with copied(files, options.out, options.field) as regular:
        return _prepare(options, regular, names, tokenizer)


def _prepare(
    options: PrepareOptions, files: Sequence[tuple[str, Path]], names: Sequence[str], tokenizer: Tokenizer
) -> Manifest:
    identity = tokenizer.identity
    plan = {
        "sources": [[name, path.stat().st_size, path.stat().st_mtime_ns] for name, path in files] + [*names],
        "tokenizer": identity,
        "field": options.field,
        "split": options.split,
    }
    folder = store_file(options.out, PARTS_SUFFIX)
    total = None if names else sum(path.stat().st_size for _, path in files)
    with _claimed(folder, plan), PrepareProgress(total) as progress:
        if note := tokenizer_note(tokenizer):
            progress.say(note)
        try:
            shards = _make_shards(options, units(files, names, options.field, options.split), folder, progress)
            manifest = _join(options, identity, shards, progress)
        except UserError:
            if not progress.counts.documents:
                shutil.rmtree(folder)  # it is empty, and would block a run with other options
            raise
        except OSError as error:
            raise UserError(
                f"{error.filename or folder} cannot be written: {error.strerror or error}",
                f"free disk space; the same command resumes from the shards in {folder}",
            ) from None
        shutil.rmtree(folder)
    return manifest


def _refuse_existing(out: Path) -> None:
    """Refuses a store of which any file exists: it may be the source, or unrelated.

    Raises:
        UserError: a file that the store would overwrite exists.
    """
    for suffix in STORE_SUFFIXES:
        if os.path.lexists(file := store_file(out, suffix)):
            raise UserError(
                f"{file} exists already", "give another --out: `prepare` overwrites no file, and would write this one"
            )


@contextmanager
def _claimed(folder: Path, plan: dict[str, Any]) -> Iterator[None]:
    """Locks the folder of shards for this process, and refuses shards of another plan.

    Raises:
        UserError: the folder cannot be written, is locked, has shards of other sources or another tokenizer, or other
            files.
    """
    recorded = folder / PLAN_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not recorded.exists() and any(file.name != ".lock" for file in folder.iterdir()):
            raise UserError(
                f"{folder} has files that are not of an unfinished `prepare`, which would delete them",
                "give another --out, or move them",
            )
        file = open(folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115  closed by the `with` below
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}", "give another --out") from None
    with file:
        if not lock(file):
            raise UserError(f"another `prepare` is writing to {folder}", "wait until it ends, or give another --out")
        digest = hashlib.sha256(json.dumps(plan).encode()).hexdigest()
        if recorded.exists() and recorded.read_text() != digest:
            raise UserError(
                f"{folder} has the shards of an unfinished `prepare` of other files or with another tokenizer",
                f"give another --out, or remove {folder}",
            )
        recorded.write_text(digest)
        yield


def _make_shards(options: PrepareOptions, todo: Iterable[Unit], folder: Path, progress: PrepareProgress) -> list[Shard]:
    """Makes all shards; returns them in order. At most two units per process are queued, so that memory is bounded."""
    shards: list[Shard] = []
    running: dict[Future[ShardCounts], tuple[Unit, Shard, int]] = {}
    pool = pool_of(options.workers, options.tokenizer, options.extend)
    try:
        for number, unit in enumerate(todo):
            shard = Shard(folder, number)
            shards.append(shard)
            if (counts := shard.read_counts()) is not None:
                progress.add(unit.size, counts)
                continue
            while len(running) >= 2 * options.workers:
                pool = _collect(options, pool, running, progress)
            pool = _submit(options, pool, running, unit, shard, 1)
        while running:
            pool = _collect(options, pool, running, progress)
    finally:
        pool.shutdown(cancel_futures=True)
    return shards


def _submit(
    options: PrepareOptions, pool: ProcessPoolExecutor, running: dict[Any, Any], unit: Unit, shard: Shard, attempt: int
) -> ProcessPoolExecutor:
    try:
        future = pool.submit(make_shard, unit, shard, options.stop_at_broken)
    except BrokenProcessPool:  # noticed here first; running units are resubmitted by _collect
        pool = pool_of(options.workers, options.tokenizer, options.extend)
        future = pool.submit(make_shard, unit, shard, options.stop_at_broken)
    running[future] = (unit, shard, attempt)
    return pool


def _collect(
    options: PrepareOptions,
    pool: ProcessPoolExecutor,
    running: dict[Future[ShardCounts], tuple[Unit, Shard, int]],
    progress: PrepareProgress,
) -> ProcessPoolExecutor:
    """Waits for a shard and counts it; resubmits the units of killed processes. Returns the pool to use from now on."""
    done, _ = wait(running, return_when=FIRST_COMPLETED)
    broken = []
    for future in done:
        unit, shard, attempt = running.pop(future)
        try:
            counts = future.result()
            progress.add(unit.size, counts)
            if counts.named and progress.counts.documents:
                progress.counts.bad_rows(options.max_bad_rows).check(complete=False)
        except BrokenProcessPool:
            broken.append((unit, shard, attempt))
    if not broken:
        return pool
    pool.shutdown(cancel_futures=True)
    broken += [running.pop(future) for future in list(running)]  # a broken pool loses all running units
    pool = pool_of(options.workers, options.tokenizer, options.extend)
    progress.say(f"a process was killed (out of memory?); {len(broken)} shards are started again")
    for unit, shard, attempt in broken:
        if attempt == MAX_ATTEMPTS:
            raise UserError(
                f"the process that makes shard {shard.number} was killed {MAX_ATTEMPTS} times",
                "free memory or use fewer --workers; the same command resumes",
            )
        pool = _submit(options, pool, running, unit, shard, attempt + 1)
    return pool


def _join(options: PrepareOptions, identity: str, shards: list[Shard], progress: PrepareProgress) -> Manifest:
    """Joins the shards into a store, beside them; its files are renamed at the end."""
    counts = ShardCounts()
    for shard in shards:
        counts.add(shard.read_counts() or ShardCounts())
    if not counts.documents:
        left_out = ", ".join(f"{n} {reason}" for reason, n in counts.skipped.items()) or "the sources are empty"
        raise UserError(f"no usable document ({left_out})", "give the column of the text with --field")
    bad = counts.bad_rows(options.max_bad_rows)
    bad.check(complete=True)
    if bad.bad:
        progress.say(bad.description)
    joined = shards[0].folder / "joined"
    digest = hashlib.sha256()
    progress.say("joining the shards")
    with open(store_file(joined, ".bin"), "wb") as out, open(store_file(joined, ".crc"), "wb") as checks:
        for shard in shards:
            with open(shard.bin, "rb") as file:
                while block := file.read(_BLOCK_BYTES):
                    digest.update(block)
                    out.write(block)
            checks.write(_column(shard, "checks").tobytes())
        _sync(out)
        _sync(checks)
    dtype = token_dtype(load_tokenizer(options.tokenizer, options.extend).vocab_size)
    write_index(store_file(joined, ".idx"), dtype, lambda: (_column(shard, "lengths") for shard in shards))
    manifest = Manifest(
        tokenizer=options.tokenizer,
        extend=list(options.extend),
        identity=identity,
        documents=counts.documents,
        tokens=counts.tokens,
        bytes=counts.bytes,
        largest_token=counts.largest_token,
        fingerprint=IndexedStore(joined).fingerprint(),
        sha256={
            f"{options.out.name}.bin": digest.hexdigest(),
            f"{options.out.name}.idx": _sha256(store_file(joined, ".idx")),
        },
        sources=list(options.sources),
        skipped=counts.skipped,
        version=__version__,
    )
    write_manifest(joined, manifest)
    _publish(joined, options.out)
    return manifest


def _publish(joined: Path, out: Path) -> None:
    """Renames the files of a store to their final names, and removes those again if one cannot be renamed.

    Raises:
        UserError: a file of that name has appeared.
        OSError: a file cannot be renamed.
    """
    _refuse_existing(out)
    renamed: list[Path] = []
    try:
        for suffix in STORE_SUFFIXES:
            os.rename(store_file(joined, suffix), store_file(out, suffix))
            renamed.append(store_file(out, suffix))
    except BaseException:
        for path in renamed:
            with contextlib.suppress(OSError):
                path.unlink()
        raise


def _column(shard: Shard, name: str) -> Any:
    with np.load(shard.documents) as columns:
        return columns[name]


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
