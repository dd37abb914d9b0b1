"""What `python train.py --help` prints: every choice and every setting, read from conf/ itself.

The comment behind a value in conf/ is its description, so that the menu cannot tell another story than the files. It
is read line by line, without Hydra: help comes at once.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

EXAMPLES = """\
  python train.py                                        the default run: minutes on a CPU
  python train.py experiment=smoke                       does everything work here? less than a minute
  python train.py data=text data.path=~/books budget.steps=5000
  python train.py model=169m data=text data.path=corpus/ budget.tokens=10B trainer.precision=bf16-mixed
  python train.py -m optim.lr=1e-3,2e-3,4e-3             three runs, one after the other
  python train.py init.weights=model.pth data=text data.path=notes.txt optim.lr=1e-4 optim.final_lr=1e-5"""

FLAGS = """\
  -m, --multirun     run every combination of the values that are listed with commas
  --cfg              print the settled configuration, and run nothing
  --config-dir DIR   a folder of your own with experiment/, model/, … beside conf/
  -h, --help         this menu"""


def groups(folders: Sequence[Path]) -> dict[str, list[str]]:
    """The choices of every group, as the files of the conf folders give them."""
    found: dict[str, set[str]] = {}
    for folder in folders:
        for file in folder.glob("*/**/*.yaml"):
            group, *path = file.relative_to(folder).with_suffix("").parts
            found.setdefault(group, set()).add("/".join(path))
    return {group: sorted(names, key=_by_size) for group, names in sorted(found.items())}


def _by_size(name: str) -> tuple[int, float, str]:
    """Names such as 169m and 1b5 in the order of the sizes they mean, behind all others."""
    scale = {"m": 1e6, "b": 1e9}
    unit = next((letter for letter in "mb" if name[:1].isdigit() and letter in name), None)
    return (0, 0.0, name) if unit is None else (1, float(name.replace(unit, ".").rstrip(".")) * scale[unit], name)


def menu(conf: Path, groups: Mapping[str, Sequence[str]], width: int = 100) -> str:
    """The whole text.

    Args:
        conf: the folder with train.yaml.
        groups: group → names of its choices.
        width: columns of the terminal.
    """
    lines = (conf / "train.yaml").read_text(encoding="utf-8").splitlines()
    chosen = {m[1]: m[2] for line in lines if (m := re.match(r"\s+- (?:optional )?(\w+): (\w+)", line))}
    parts = [
        "usage: python train.py [word=value …] [flags]      (rwkv-train train … is the same)\n",
        "Trains an RWKV language model. What is not typed has the value shown here; counts: 10k, 1.5M, 1e9, 300B.\n",
        "CHOICES: a file of conf/ each, the default in [ ]",
    ]
    for group, names in groups.items():
        if group != "local":
            parts += _wrap(f"{group}=", " ".join(f"[{n}]" if n == chosen.get(group) else n for n in names), 15, width)
    for group in ("experiment", "debug"):
        for name in groups.get(group, ()):
            about = _about(conf / group / f"{name}.yaml")
            parts += _wrap(f"  {group}={name}", about, 28, width) if about else []
    parts.append("\nSETTINGS: word=default, what it is")
    for word, value, about in _settings(lines, ""):
        parts += _wrap(f"{word}={value}", about, 38, width)
    for group in ("data", "optim"):
        name = chosen[group]
        parts.append(f"\nand with {group}={name}")
        text = (conf / group / f"{name}.yaml").read_text(encoding="utf-8")
        for word, value, about in _settings(text.splitlines(), f"{group}."):
            parts += _wrap(f"{word}={value}", about, 38, width)
    return "\n".join([*parts, "\nFLAGS", FLAGS, "\nEXAMPLES", EXAMPLES])


def _settings(lines: Sequence[str], prefix: str) -> Iterator[tuple[str, str, str]]:
    """(word, default, description) of every line with a value."""
    path: list[tuple[int, str]] = []
    for line in lines:
        found = re.match(r"( *)(\w+):(?: ([^#\s][^#]*?))?(?:\s+# (.*))?$", line)
        if found is None or found[2] == "defaults":
            continue
        depth = len(found[1])
        path = [*(part for part in path if part[0] < depth), (depth, found[2])]
        if found[3] is not None:
            yield prefix + ".".join(name for _, name in path), found[3], found[4] or ""


def _about(file: Path) -> str:
    """The description in the head of a file: its comments but for the command and Hydra's own line."""
    if not file.is_file():
        return ""
    head = [line[2:] for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
    return " ".join(line for line in head if not line.startswith(("python ", "@package")))


def _wrap(left: str, right: str, column: int, width: int) -> list[str]:
    start = f"  {left}".ljust(column) + ("  " if len(left) + 2 >= column else "")
    return textwrap.wrap(right, width, initial_indent=start, subsequent_indent=" " * column) or [start.rstrip()]
