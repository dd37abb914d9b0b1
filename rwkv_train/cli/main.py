"""`rwkv-train COMMAND …`, the program of an installed wheel; `rwkv-train train` is `python train.py`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rwkv_train import __version__
from rwkv_train.cli import launcher
from rwkv_train.cli.commands import COMMANDS
from rwkv_train.config.suggestions import suggestion
from rwkv_train.console import replace_unknown_characters
from rwkv_train.errors import UserError
from rwkv_train.exit_codes import ExitCode

_INTRODUCTION = """\
usage: rwkv-train COMMAND …

Trains RWKV language models, and uses them.

examples:
  rwkv-train train experiment=smoke
  rwkv-train generate runs/NAME/weights.pth --prompt 'def '
  rwkv-train COMMAND --help

commands:
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 1 for a negative answer (docs/slurm.md), 2 for a user error."""
    argv = list(sys.argv[1:] if argv is None else argv)
    replace_unknown_characters()
    command = COMMANDS.get(argv[0]) if argv else None
    if command is None:
        return _without_command(argv)
    launcher.share_cores()
    try:
        return command(argv[0], argv[1:])
    except UserError as error:
        launcher.report(error)
        return ExitCode.USER_ERROR
    except BrokenPipeError:  # `… | head` has closed its end
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        print()
        return ExitCode.INTERRUPTED


def _without_command(argv: Sequence[str]) -> int:
    """--help, --version, and a command that is missing or unknown."""
    if argv[:1] in (["-h"], ["--help"]):
        commands = "".join(f"  {name:10} {command.summary}\n" for name, command in COMMANDS.items())
        sys.stdout.write(_INTRODUCTION + commands)
        return 0
    if argv[:1] == ["--version"]:
        print(f"rwkv-train {__version__}")
        return 0
    what = f"{argv[0]}: there is no such command" if argv else "no command is given"
    launcher.report(UserError(what, suggestion(argv[0] if argv else "", list(COMMANDS))))
    return ExitCode.USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
