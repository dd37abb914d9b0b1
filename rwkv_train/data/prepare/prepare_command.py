"""`rwkv-train prepare`: command line of its forms (`prepare show` is in rwkv_train/cli)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from rwkv_train.console import make_console
from rwkv_train.data.prepare.examine import inspect, verify
from rwkv_train.data.prepare.pipeline import PrepareOptions, prepare
from rwkv_train.errors import UserError
from rwkv_train.user_path import user_path, utf8_path

_USAGE = """\
rwkv-train prepare SOURCE… --tokenizer world --out STORE    documents → STORE.bin, STORE.idx, STORE.json
       rwkv-train prepare inspect STORE                            statistics, and documents decoded
       rwkv-train prepare verify STORE                             reads every byte
       rwkv-train prepare show SETTINGS…                           the first batch of a training run"""


def run(argv: Sequence[str], cores: int) -> int:
    """Runs `prepare SOURCE…`, `prepare inspect` or `prepare verify`.

    Args:
        argv: arguments after `prepare`.
        cores: default number of worker processes.

    Returns:
        The exit code: 1 if `verify` found a fault, else 0.

    Raises:
        UserError: an argument is invalid, or a source or store cannot be read.
    """
    console = make_console()
    if argv[:1] == ["inspect"]:
        arguments = _store_parser("inspect", "Prints statistics and documents of a store.").parse_args(argv[1:])
        inspect(user_path(arguments.store), arguments.document, arguments.tokenizer, console)
        return 0
    if argv[:1] == ["verify"]:
        return _verify(argv[1:], console)
    arguments = _parser(cores).parse_args(argv)
    if not 0 <= arguments.max_bad_rows <= 1:
        raise UserError(f"--max-bad-rows {arguments.max_bad_rows:g} is out of range", "give a share from 0 to 1")
    if arguments.workers < 1:
        raise UserError(f"--workers {arguments.workers} is out of range", "give at least 1")
    arguments.out = utf8_path(arguments.out)
    stop_at_broken = vars(arguments).pop("broken") == "stop"
    options = PrepareOptions(stop_at_broken=stop_at_broken, **vars(arguments))
    manifest = prepare(options)
    console.print(
        f"{options.out}.bin, .idx: {manifest.documents:,} documents, {manifest.tokens:,} tokens, "
        f"{manifest.bytes:,} bytes of text ({manifest.bytes / manifest.tokens:.2f} a token)"
    )
    for reason, count in manifest.skipped.items():
        console.print(f"left out: {count:,} documents, {reason}")
    console.print(f"next: python train.py data=store data.path={options.out}")
    return 0


def _verify(argv: Sequence[str], console: Console) -> int:
    arguments = _store_parser("verify", "Reads every byte of a store.").parse_args(argv)
    faults = 0
    for fault in verify(user_path(arguments.store), arguments.tokenizer):
        faults += bool(fault.remedy)
        console.print(f"{'BAD' if fault.remedy else 'note'}   {fault.what}")
        if fault.remedy:
            console.print(f"      {fault.remedy}")
    console.print(f"{arguments.store}: " + (f"{faults} fault{'s' * (faults > 1)}" if faults else "no faults"))
    return 1 if faults else 0


def _store_parser(form: str, about: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(f"rwkv-train prepare {form}", description=about)
    parser.add_argument("store", metavar="STORE", type=Path, help="STORE for STORE.bin and STORE.idx")
    parser.add_argument("--tokenizer", help="for a store without a manifest: bytes, world or a tokenizer.json")
    if form == "inspect":
        parser.add_argument(
            "--document", type=int, action="append", default=[], help="number of a document to print; may be repeated"
        )
    return parser


def _parser(cores: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "rwkv-train prepare", usage=_USAGE, description="Makes a token store from documents."
    )
    parser.add_argument(
        "sources",
        metavar="SOURCE",
        nargs="+",
        help="text, .jsonl or .parquet files (text and .jsonl also .gz, .zst), directories, globs, - for "
        "standard input, data sets by name",
    )
    parser.add_argument("--tokenizer", required=True, help="bytes, world, or the path of a tokenizer.json")
    parser.add_argument("--out", required=True, type=Path, metavar="STORE", help="STORE for STORE.bin, STORE.idx, …")
    parser.add_argument(
        "--extend",
        action="append",
        default=[],
        metavar="TEXT",
        help="a text that becomes one token, as in vocab.extend; may be repeated",
    )
    parser.add_argument("--field", default="text", help="column or JSON key of the text (default: text)")
    parser.add_argument("--split", default="train", help="split of a data set (default: train)")
    parser.add_argument(
        "--broken",
        choices=("skip", "stop"),
        default="skip",
        help="documents that are empty, not UTF-8, not JSON or too long: skip and count (default), or stop",
    )
    parser.add_argument(
        "--max-bad-rows",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="share of documents that may be left out, without those that are empty or binary (default: 0.01)",
    )
    parser.add_argument("--workers", type=int, default=cores, help=f"worker processes (default: {cores}, the cores)")
    return parser
