"""Installs, trains, prepares and exports on every supported Python that this machine has, except the one of .venv.

    python scripts/pythons.py [3.12 …]

An environment for each is made in .pythons/, and made again when pyproject.toml or constraints.txt have changed.
Interpreters are looked for as `python3.12` on the PATH, and among pyenv's.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".pythons"

# Run in an empty directory, so that the installed package is used and not the checkout.
COMMANDS = (
    ("rwkv-train", "train", "experiment=smoke", "run.name=smoke"),
    ("rwkv-train", "prepare", "text.txt", "--tokenizer", "bytes", "--out", "store", "--workers", "2"),
    ("rwkv-train", "prepare", "verify", "store"),
    ("rwkv-train", "train", "experiment=smoke", "run.name=store", "data=store", "data.path=store", "budget.steps=4"),
    ("rwkv-train", "export", "runs/smoke/weights.pth", "smoke.safetensors"),
    ("rwkv-train", "generate", "runs/smoke/weights.pth", "--prompt", "def ", "--tokens", "8"),
)


def supported() -> list[str]:
    """The versions that pyproject.toml names, "3.11" say."""
    return re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())


def version_of(python: Path | str) -> str | None:
    """As "3.12"; None where this is no Python that runs, for example pyenv's shim of a version that is not selected."""
    code = "import ensurepip, sys, venv; print('{}.{}'.format(*sys.version_info))"
    try:
        result = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def find(version: str) -> Path | None:
    """An interpreter of that version."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    named = shutil.which(f"python{version}")
    candidates = [Path(named)] if named else []
    candidates += sorted(pyenv.glob(f"versions/{version}.*/bin/python"))
    return next((path for path in candidates if version_of(path) == version), None)


def install(python: Path, folder: Path) -> None:
    """Makes the environment where it is not up to date, and puts the package of this checkout into it."""
    wanted = b"".join((ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt"))
    digest, stamp = hashlib.sha256(wanted).hexdigest(), folder / "installed"
    pip = [folder / "bin" / "python", "-m", "pip", "install", "-qq", "--no-compile", "-c", ROOT / "constraints.txt"]
    if not stamp.exists() or stamp.read_text() != digest:
        shutil.rmtree(folder, ignore_errors=True)
        run(python, "-m", "venv", folder)
        if index := os.environ.get("TORCH_INDEX"):
            torch = re.findall(r"^torch==.*$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
            run(*pip, "--index-url", index, *torch)
        run(*pip, ROOT)
        stamp.write_text(digest)
    else:
        run(*pip, "--no-deps", "--force-reinstall", ROOT)


def run(*command: object, cwd: Path = ROOT, environment: dict[str, str] | None = None) -> None:
    print("$", *command, flush=True)
    subprocess.run([str(part) for part in command], cwd=cwd, env=environment, check=True)


def examine(folder: Path) -> None:
    """Runs COMMANDS with the environment in `folder`.

    Raises:
        CalledProcessError: one of them has failed.
    """
    scratch = folder / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    (scratch / "text.txt").write_text("To be, or not to be, that is the question.\n" * 5000)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    environment["PATH"] = f"{folder / 'bin'}:{environment['PATH']}"
    for program, *arguments in COMMANDS:
        run(folder / "bin" / program, *arguments, cwd=scratch, environment=environment)
    made = ("runs/smoke/metrics.jsonl", "runs/store/weights.pth", "smoke.safetensors")
    missing = [name for name in made if not (scratch / name).is_file()]
    if missing:
        raise SystemExit(f"{', '.join(missing)} should have been written to {scratch}")


def results(versions: list[str], remove: bool) -> Iterator[str]:
    """A line for each version, as soon as it is known."""
    own = version_of(ROOT / ".venv" / "bin" / "python")
    for version in versions:
        if version == own:
            yield f"Python {version}: that of .venv, which the other tests run on"
        elif (python := find(version)) is None:
            yield f"Python {version}: skipped, it is not on this machine"
        else:
            started, folder = time.monotonic(), FOLDER / version
            install(python, folder)
            installed = time.monotonic()
            examine(folder)
            seconds = f"{installed - started:.0f} s to install, {time.monotonic() - installed:.0f} s to run"
            if remove:
                shutil.rmtree(folder)
            yield f"Python {version}: passed ({python}; {seconds})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", default=supported(), help="(default: all that pyproject.toml names)")
    parser.add_argument("--remove", action="store_true", help="remove each environment when its commands have passed")
    arguments, lines = parser.parse_args(), []
    try:
        for line in results(arguments.versions, arguments.remove):
            print(line, flush=True)
            lines.append(line)
    except subprocess.CalledProcessError as error:
        sys.exit(f"failed with exit code {error.returncode}: {' '.join(map(str, error.cmd))}")
    print("", *lines, sep="\n")


if __name__ == "__main__":
    main()
