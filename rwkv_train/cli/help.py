"""What `python train.py --help` and `rwkv-train plan --help` print: examples, flags, every choice and every setting.

Choices and settings are read from the conf folders: the comment after a value there is its description. They are read
line by line, without Hydra, so that help is fast.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from rwkv_train.cli.conf_folders import ConfFolders

TRAIN = """\
usage: python train.py [setting=value …] [flags]      (rwkv-train train … is the same)

Trains an RWKV language model.

EXAMPLES
  python train.py                                        the default run: minutes on a CPU
  python train.py experiment=smoke                       does everything work here? less than a minute
  python train.py data=text data.path=~/books budget.steps=5000
  python train.py model=169m data=text data.path=corpus/ budget.tokens=10B trainer.precision=bf16-mixed
  python train.py -m optim.lr=1e-3,2e-3,4e-3             three runs, one after the other
  python train.py init.weights=model.pth data=text data.path=notes.txt optim.lr=1e-4 optim.final_lr=1e-5

FLAGS
  -m, --multirun     run every combination of the values that are listed with commas
  --cfg              print the complete configuration and exit
  --config-dir DIR   a folder of your own with experiment/, model/, …, in addition to conf/
  -h, --help         print this help and exit
"""

PLAN = """\
usage: rwkv-train plan [setting=value …] [--json]

Estimates the memory, time and network traffic of a run without starting it. Exit code 1: it does not fit.

EXAMPLES
  rwkv-train plan model=7b trainer.devices=8             with the strategy that is fastest
  rwkv-train plan model=14b trainer.devices=8 trainer.num_nodes=4 batch.tokens=2097152 device=h200-141g

FLAGS
  --json             print one JSON object
  --config-dir DIR   a folder of your own with experiment/, model/, …, in addition to conf/
  -h, --help         print this help and exit
"""

_NAME_COLUMN = 38  # width of the column with setting=default


def help_text(introduction: str, conf: ConfFolders, width: int = 100) -> str:
    """The complete text.

    Args:
        introduction: TRAIN or PLAN.
        conf: the conf folders; the first one holds train.yaml.
        width: columns of the terminal.
    """
    folder = conf.folders[0]
    lines = (folder / "train.yaml").read_text(encoding="utf-8").splitlines()
    chosen = {m[1]: m[2] for line in lines if (m := re.match(r"\s+- (?:optional )?(\w+): (\w+)", line))}
    parts = [introduction, "CHOICES: group=NAME, a file in conf/group; the default in [ ]"]
    for group, names in conf.groups.items():
        if group != "local":
            parts += _wrap(f"{group}=", " ".join(f"[{n}]" if n == chosen.get(group) else n for n in names), 15, width)
    for group in ("experiment", "debug"):
        for name in conf.groups.get(group, ()):
            description = _description_of(folder / group / f"{name}.yaml")
            parts += _wrap(f"  {group}={name}", description, 28, width) if description else []
    parts.append("\nSETTINGS: setting=default; counts may be written 10k, 1.5M, 1e9, 300B")
    parts += _setting_lines(lines, "", width)
    for group in ("data", "optim"):
        parts.append(f"\nSETTINGS with {group}={chosen[group]}")
        file = folder / group / f"{chosen[group]}.yaml"
        parts += _setting_lines(file.read_text(encoding="utf-8").splitlines(), f"{group}.", width)
    return "\n".join(parts)


def _setting_lines(lines: Sequence[str], prefix: str, width: int) -> Iterator[str]:
    for name, value, description in _settings(lines, prefix):
        yield from _wrap(f"{name}={value}", description, _NAME_COLUMN, width)


def _settings(lines: Sequence[str], prefix: str) -> Iterator[tuple[str, str, str]]:
    """(name, default, description) of every line of YAML with a value."""
    path: list[tuple[int, str]] = []
    for line in lines:
        found = re.match(r"( *)(\w+):(?: ([^#\s][^#]*?))?(?:\s+# (.*))?$", line)
        if found is None or found[2] == "defaults":
            continue
        depth = len(found[1])
        path = [*(part for part in path if part[0] < depth), (depth, found[2])]
        if found[3] is not None:
            yield prefix + ".".join(name for _, name in path), found[3], found[4] or ""


def _description_of(file: Path) -> str:
    """The comments in the head of a file, without the command and Hydra's own line."""
    if not file.is_file():
        return ""
    head = [line[2:] for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
    return " ".join(line for line in head if not line.startswith(("python ", "@package")))


def _wrap(left: str, right: str, column: int, width: int) -> list[str]:
    start = f"  {left}".ljust(column) + ("  " if len(left) + 2 >= column else "")
    return textwrap.wrap(right, width, initial_indent=start, subsequent_indent=" " * column) or [start.rstrip()]
