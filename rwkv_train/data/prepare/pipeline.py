"""Units → shards, on all cores; shards → a store. What is finished is kept, so that a killed `prepare` goes on."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_train import __version__
from rwkv_train.data.indexed import IndexedStore, store_file, write_index
from rwkv_train.data.manifest import Manifest, write_manifest
from rwkv_train.data.prepare.progress import PrepareProgress
from rwkv_train.data.prepare.shards import Shard, ShardCounts, make_shard
from rwkv_train.data.prepare.units import Unit, find_sources, units
from rwkv_train.data.tokenizers import load_tokenizer, token_dtype
from rwkv_train.data.workers import pool as pool_of
from rwkv_train.errors import UserError

ATTEMPTS = 3  # at a unit whose process dies
_BLOCK = 2**22  # bytes that are copied at once


@dataclass(frozen=True)
class PrepareOptions:
    """What is to be prepared.

    Attributes:
        sources: files, directories, globs, names of data sets.
        tokenizer, extend: as load_tokenizer takes them.
        out: NAME for NAME.bin, NAME.idx, NAME.crc and NAME.json.
        field, split: of rows of JSON, parquet and data sets.
        stop_at_broken: whether a document that cannot be taken ends it; else such are left out and counted.
        workers: processes.
    """

    sources: tuple[str, ...]
    tokenizer: str
    out: Path
    extend: tuple[str, ...] = ()
    field: str = "text"
    split: str = "train"
    stop_at_broken: bool = False
    workers: int = 1


def prepare(job: PrepareOptions) -> Manifest:
    """Makes the store, and says how it goes on standard error.

    Raises:
        UserError: a source that is not there or cannot be read, a place that is taken, a full disk.
    """
    identity = load_tokenizer(job.tokenizer, job.extend).identity
    files, names = find_sources(job.sources)
    for suffix in (".bin", ".idx"):
        if store_file(job.out, suffix).exists():
            raise UserError(f"{store_file(job.out, suffix)} is there already", "another --out, or remove the old store")
    plan = {
        "sources": [[name, path.stat().st_size, path.stat().st_mtime_ns] for name, path in files] + names,
        "tokenizer": identity,
        "field": job.field,
        "split": job.split,
    }
    folder = store_file(job.out, ".parts")
    total = None if names else sum(path.stat().st_size for _, path in files)
    with _claimed(folder, plan), PrepareProgress(total) as progress:
        try:
            shards = _make_shards(job, units(files, names, job.field, job.split), folder, progress)
            manifest = _join(job, identity, shards, progress)
        except UserError:
            if not progress.counts.documents:
                shutil.rmtree(folder)  # nothing in it is worth keeping, and it would stand in the way of another try
            raise
        except OSError as error:
            raise UserError(
                f"{error.filename or folder} cannot be written: {error.strerror or error}",
                f"make room; the same command goes on from the shards in {folder}",
            ) from None
        shutil.rmtree(folder)
    return manifest


@contextmanager
def _claimed(folder: Path, plan: dict[str, Any]) -> Iterator[None]:
    """Keeps the folder of shards for this process, and sees to it that the shards in it are of the same job."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115  the `with` below closes it
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}", "--out elsewhere") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another `prepare` is writing to {folder}", "wait for it, or another --out") from None
        digest = hashlib.sha256(json.dumps(plan).encode()).hexdigest()
        begun = folder / "plan"
        if begun.exists() and begun.read_text() != digest:
            raise UserError(
                f"{folder} holds the shards of an unfinished `prepare` of other files, or with another tokenizer",
                f"another --out, or remove {folder}",
            )
        begun.write_text(digest)
        yield


def _make_shards(job: PrepareOptions, todo: Iterable[Unit], folder: Path, progress: PrepareProgress) -> list[Shard]:
    """All shards, in order. At most two units a process wait at a time: memory does not grow with the input."""
    shards: list[Shard] = []
    running: dict[Future[ShardCounts], tuple[Unit, Shard, int]] = {}
    pool = pool_of(job.workers, job.tokenizer, job.extend)
    try:
        for number, unit in enumerate(todo):
            shard = Shard(folder, number)
            shards.append(shard)
            if (counts := shard.read_counts()) is not None:
                progress.add(unit.size, counts)
                continue
            while len(running) >= 2 * job.workers:
                pool = _collect(job, pool, running, progress)
            pool = _submit(job, pool, running, unit, shard, 1)
        while running:
            pool = _collect(job, pool, running, progress)
    finally:
        pool.shutdown(cancel_futures=True)
    return shards


def _submit(
    job: PrepareOptions, pool: ProcessPoolExecutor, running: dict[Any, Any], unit: Unit, shard: Shard, attempt: int
) -> ProcessPoolExecutor:
    try:
        future = pool.submit(make_shard, unit, shard, job.stop_at_broken)
    except BrokenProcessPool:  # noticed here first; those that run are told of when they are collected
        pool = pool_of(job.workers, job.tokenizer, job.extend)
        future = pool.submit(make_shard, unit, shard, job.stop_at_broken)
    running[future] = (unit, shard, attempt)
    return pool


def _collect(
    job: PrepareOptions,
    pool: ProcessPoolExecutor,
    running: dict[Future[ShardCounts], tuple[Unit, Shard, int]],
    progress: PrepareProgress,
) -> ProcessPoolExecutor:
    """Takes what is done; what a dead process leaves behind is done again."""
    done, _ = wait(running, return_when=FIRST_COMPLETED)
    broken = []
    for future in done:
        unit, shard, attempt = running.pop(future)
        try:
            progress.add(unit.size, future.result())
        except BrokenProcessPool:
            broken.append((unit, shard, attempt))
    if not broken:
        return pool
    pool.shutdown(cancel_futures=True)
    broken += [running.pop(future) for future in list(running)]  # with one process the pool loses them all
    pool = pool_of(job.workers, job.tokenizer, job.extend)
    progress.say(f"a process was killed (out of memory?); {len(broken)} shards are made again")
    for unit, shard, attempt in broken:
        if attempt == ATTEMPTS:
            raise UserError(
                f"the process that makes shard {shard.number} was killed {ATTEMPTS} times",
                "free memory or use fewer --workers; the same command goes on",
            )
        pool = _submit(job, pool, running, unit, shard, attempt + 1)
    return pool


def _join(job: PrepareOptions, identity: str, shards: list[Shard], progress: PrepareProgress) -> Manifest:
    """The shards as one store, written aside and renamed, the index last: without it there is no store."""
    counts = ShardCounts()
    for shard in shards:
        counts.add(shard.read_counts() or ShardCounts())
    if not counts.documents:
        left_out = ", ".join(f"{n} {why}" for why, n in counts.skipped.items()) or "nothing was there"
        raise UserError(f"no document could be taken ({left_out})", "--field names the column of the text")
    aside = {suffix: store_file(job.out, f"{suffix}.writing") for suffix in (".bin", ".crc", ".idx")}
    digest = hashlib.sha256()
    progress.say("joining the shards")
    try:
        with open(aside[".bin"], "wb") as out, open(aside[".crc"], "wb") as checks:
            for shard in shards:
                with open(shard.bin, "rb") as file:
                    while block := file.read(_BLOCK):
                        digest.update(block)
                        out.write(block)
                checks.write(_column(shard, "checks").tobytes())
            _synced(out)
            _synced(checks)
        kind = token_dtype(load_tokenizer(job.tokenizer, job.extend).vocab_size)
        write_index(aside[".idx"], kind, lambda: (_column(shard, "lengths") for shard in shards))
        hashes = {f"{job.out.name}.bin": digest.hexdigest(), f"{job.out.name}.idx": _sha256(aside[".idx"])}
        for suffix in (".bin", ".crc", ".idx"):
            os.replace(aside[suffix], store_file(job.out, suffix))
        manifest = Manifest(
            tokenizer=job.tokenizer,
            extend=list(job.extend),
            identity=identity,
            documents=counts.documents,
            tokens=counts.tokens,
            bytes=counts.bytes,
            largest_token=counts.largest_token,
            fingerprint=IndexedStore(job.out).fingerprint(),
            sha256=hashes,
            sources=list(job.sources),
            skipped=counts.skipped,
            version=__version__,
        )
        write_manifest(job.out, manifest)
    except BaseException:
        for path in (*aside.values(), *(store_file(job.out, suffix) for suffix in (".idx", ".json", ".crc", ".bin"))):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        raise
    return manifest


def _column(shard: Shard, name: str) -> Any:
    with np.load(shard.documents) as columns:
        return columns[name]


def _synced(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
