"""`rwkv-train prepare`: its words, and what each of its four forms does."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from rwkv_train.data.prepare.examine import inspect, verify
from rwkv_train.data.prepare.pipeline import Job, prepare
from rwkv_train.errors import UserError

_FORMS = """\
rwkv-train prepare SOURCE… --tokenizer world --out STORE    documents → STORE.bin, STORE.idx, STORE.json
       rwkv-train prepare inspect STORE                            statistics, and documents decoded
       rwkv-train prepare verify STORE                             reads every byte
       rwkv-train prepare show WORDS…                              a batch as training would get it"""


def run(argv: Sequence[str], cores: int) -> int:
    """One call of `prepare`, but for `show`; the exit code.

    Raises:
        UserError: what a user can mend.
    """
    console = Console(highlight=False, soft_wrap=True)
    if argv[:1] == ["inspect"]:
        seen = _examiner("inspect", "what is in a store").parse_args(argv[1:])
        inspect(seen.store, seen.document, seen.tokenizer, console)
        return 0
    if argv[:1] == ["verify"]:
        return _verify(argv[1:], console)
    given = _parser(cores).parse_args(argv)
    if given.workers < 1:
        raise UserError(f"--workers {given.workers} is not valid", "at least 1")
    job = Job(
        sources=tuple(given.sources),
        tokenizer=given.tokenizer,
        out=given.out.expanduser(),
        extend=tuple(given.extend),
        field=given.field,
        split=given.split,
        stop=given.broken == "stop",
        workers=given.workers,
    )
    manifest = prepare(job)
    console.print(
        f"{job.out}.bin, .idx: {manifest.documents:,} documents, {manifest.tokens:,} tokens, {manifest.bytes:,} bytes "
        f"of text ({manifest.bytes / manifest.tokens:.2f} a token)"
    )
    for why, count in manifest.skipped.items():
        console.print(f"left out: {count:,} documents, {why}")
    console.print(f"python train.py data=store data.path={job.out}")
    return 0


def _verify(argv: Sequence[str], console: Console) -> int:
    given = _examiner("verify", "reads every byte of a store").parse_args(argv)
    faults = 0
    for fault in verify(given.store, given.tokenizer):
        faults += bool(fault.remedy)
        console.print(f"{'BAD' if fault.remedy else 'note'}   {fault.what}", markup=False)
        if fault.remedy:
            console.print(f"      {fault.remedy}", markup=False)
    console.print(f"{given.store}: " + (f"{faults} faults" if faults else "whole"))
    return 1 if faults else 0


def _examiner(form: str, about: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(f"rwkv-train prepare {form}", description=about)
    parser.add_argument("store", metavar="STORE", type=Path, help="STORE for STORE.bin and STORE.idx")
    parser.add_argument("--tokenizer", help="of a store without a manifest: bytes, world or a tokenizer.json")
    if form == "inspect":
        parser.add_argument("--document", type=int, action="append", default=[], help="its number; may be repeated")
    return parser


def _parser(cores: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "rwkv-train prepare", usage=_FORMS, description="Makes a token store of documents."
    )
    parser.add_argument(
        "sources",
        metavar="SOURCE",
        nargs="+",
        help="text, .jsonl or .parquet files (text and .jsonl also .gz, .zst), directories, globs, data sets by name",
    )
    parser.add_argument("--tokenizer", required=True, help="bytes, world, or the path of a tokenizer.json")
    parser.add_argument("--out", required=True, type=Path, metavar="STORE", help="STORE for STORE.bin, STORE.idx, …")
    parser.add_argument(
        "--extend",
        action="append",
        default=[],
        metavar="TEXT",
        help="becomes one token; may be repeated (vocab.extend)",
    )
    parser.add_argument("--field", default="text", help="column of the text (default: text)")
    parser.add_argument("--split", default="train", help="part of a data set (default: train)")
    parser.add_argument(
        "--broken",
        choices=("skip", "stop"),
        default="skip",
        help="documents that are empty, no UTF-8, no JSON or too long: skip and count (default), or stop",
    )
    parser.add_argument("--workers", type=int, default=cores, help=f"processes (default: {cores}, the cores)")
    return parser
