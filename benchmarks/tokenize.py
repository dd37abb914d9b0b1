"""The cost of `rwkv-train prepare`: jsonl → store with the World tokenizer, against the tokenizer alone and others.

    python benchmarks/tokenize.py [--quick]

prepare_mb_per_s     megabytes of jsonl per second, end to end, with all start-up, on two processes
vs_wheel             text per second of it, against the Rust wheel alone in one thread
vs_trie              the same against PyPI rwkv's tokenizer in plain Python
memory_1gb_vs_100mb  peak memory of the parent process, the larger input against the smaller (--quick: 400 and 40 MB)

The text is the Python library's sources, over and over.
"""

from __future__ import annotations

import sys

if __name__ != "__main__":  # this folder is on sys.path: whoever imports `tokenize` from here means the library's
    import importlib.util
    import os

    _spec = importlib.util.spec_from_file_location(
        "tokenize", os.path.join(os.path.dirname(os.__file__), "tokenize.py")
    )
    assert _spec is not None
    assert _spec.loader is not None
    sys.modules["tokenize"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["tokenize"])
else:
    import argparse
    import json
    import subprocess
    import sysconfig
    import tempfile
    import time
    from importlib.util import find_spec
    from pathlib import Path

    from measure import in_turn, table


def texts() -> list[str]:
    found = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" not in path.parts:
            text = path.read_bytes().decode(errors="ignore")
            if text:
                found.append(text)
    return found


def write_jsonl(path: Path, documents: list[str], megabytes: int) -> tuple[int, int]:
    """Documents, over and over, up to that size; bytes of the file, and of the text in it."""
    lines = [json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n" for text in documents]
    sizes = [len(text.encode()) for text in documents]
    size = text = 0
    with open(path, "wb") as file:
        while size < megabytes * 10**6:
            for line, of_text in zip(lines, sizes, strict=True):
                if size >= megabytes * 10**6:
                    break
                file.write(line)
                size, text = size + len(line), text + of_text
    return size, text


def prepare(source: Path, store: Path) -> tuple[float, int]:
    """Seconds of the command, and the largest resident size of its own process in bytes."""
    arguments = ["prepare", str(source), "--tokenizer", "world", "--out", str(store), "--workers", "2"]
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "rwkv_train.cli.main", *arguments], stdout=subprocess.DEVNULL, stderr=2
    )
    peak = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = max(
                peak, *(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM")), 0
            )
        except (OSError, TypeError):
            pass
        time.sleep(0.02)
    assert process.returncode == 0
    taken = time.perf_counter() - began
    for suffix in (".bin", ".idx", ".crc", ".json"):
        store.with_name(store.name + suffix).unlink()
    return taken, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller inputs, under 50 s")
    quick = parser.parse_args().quick
    small, large, rounds = (40, 400, 2) if quick else (100, 1000, 5)
    from pyrwkv_tokenizer import RWKVTokenizer
    from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

    documents = texts()
    spec = find_spec("rwkv")
    assert spec is not None
    trie = TRIE_TOKENIZER(str(Path(str(spec.origin)).with_name("rwkv_vocab_v20230424.txt")))
    wheel = RWKVTokenizer()
    part = documents[: max(1, len(documents) // 4)]
    few = documents[:: max(1, len(documents) // 40)][:40]
    with tempfile.TemporaryDirectory() as folder:
        source, store = Path(folder, "text.jsonl"), Path(folder, "store")
        size, text = write_jsonl(source, documents, large)
        taken: list[float] = []
        peaks: list[int] = []

        def ours() -> None:
            seconds, peak = prepare(source, store)
            taken.append(seconds)
            peaks.append(peak)

        times = in_turn(
            {
                "wheel": lambda: [wheel.encode(document) for document in part],
                "trie": lambda: [trie.encode(document) for document in few],
                "prepare": ours,
            },
            rounds,
            warm_up=0,
        )
        write_jsonl(source, documents, small)
        _, small_peak = prepare(source, store)
    seconds = min(times["prepare"])
    wheel_rate = sum(len(document.encode()) for document in part) / min(times["wheel"]) / 1e6
    trie_rate = sum(len(document.encode()) for document in few) / min(times["trie"]) / 1e6
    figures = {
        "prepare_mb_per_s": round(size / seconds / 1e6, 1),
        "vs_wheel": round(text / seconds / 1e6 / wheel_rate, 2),
        "vs_trie": round(text / seconds / 1e6 / trie_rate, 1),
        "memory_1gb_vs_100mb": round(max(peaks) / small_peak, 3),
    }
    rows = [
        [f"rwkv-train prepare, {size / 1e6:,.0f} MB of jsonl, 2 processes", f"{text / seconds / 1e6:.1f}"],
        ["the wheel alone, 1 thread", f"{wheel_rate:.1f}"],
        ["PyPI rwkv, plain Python", f"{trie_rate:.2f}"],
    ]
    print(table(["", "MB of text/s"], rows))
    print(
        f"peak memory of the parent: {max(peaks) / 1e6:.0f} MB for {large} MB, {small_peak / 1e6:.0f} MB for {small} MB"
    )
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
