"""Output: texts with square brackets are printed as they are, and a full disk or a closed pipe ends no program."""

from __future__ import annotations

import io
import multiprocessing
import os
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from rich.table import Table

from rwkv_train.cli import launcher, main
from rwkv_train.console import for_stream, make_console, visible
from rwkv_train.data.batch_preview import _styled_row
from rwkv_train.data.tokenizers import load_tokenizer
from rwkv_train.errors import UserError
from tests import PRELOAD
from tests.evaluation.made_runs import make_run
from tests.runs import losses, overrides_for

FOREIGN = "books [old] [/b] [link=x] [/pytorch/third_party] :smile: [bold]"

PRINTS = """
import sys
from rwkv_train.console import make_console, tolerated_output
with tolerated_output():
    for number in range(3000):
        make_console().print(f"line {number}")
        print(f"line {number}", file=sys.stderr)
"""


def test_foreign_text_is_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    make_console().print(FOREIGN)
    assert capsys.readouterr().out == f"{FOREIGN}\n"
    make_console(quiet=True).print(FOREIGN)
    assert capsys.readouterr().out == ""


NASTY = "a\x1b]0;title\x07\x1b[2J\x9b1A\rb\u202ec\td\n\x00\x7f\u2066é"
SHOWN = "a\\x1b]0;title\\x07\\x1b[2J\\x9b1A\\x0db\\u202ec\td\n\\x00\\x7f\\u2066é"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_no_control_character_of_a_text_reaches_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert visible(NASTY) == SHOWN
    everything = visible("".join(map(chr, range(0xD800))))
    assert not [char for char in everything if unicodedata.category(char) == "Cc" and char not in "\t\n"]
    monkeypatch.setenv("TERM", "xterm")
    for name in ("stdout", "stderr"):
        stream = Terminal()
        monkeypatch.setattr(sys, name, stream)
        make_console(stderr=name == "stderr").print(NASTY.replace("\t", ""))
        table = Table(NASTY, box=None)
        make_console(stderr=name == "stderr").print(table)
        if name == "stderr":
            launcher.report(UserError(NASTY, NASTY))
        assert SHOWN.replace("\t", "").splitlines()[0] in stream.getvalue()
        assert not re.findall("\x1b[^[]|\x1b\\[[^0-9;]|\x1b\\[2J|[\x07\x9b\r\u202e]", stream.getvalue())


def test_a_pipe_gets_the_text_as_it_is() -> None:
    tokens = list(NASTY.replace("\x00", "").encode())  # 0 ends a document
    row = [_styled_row(tokens, [True] * len(tokens), load_tokenizer("bytes"), terminal) for terminal in (False, True)]
    assert row[1].plain == visible(NASTY.replace("\x00", ""))
    assert row[0].plain != row[1].plain
    assert for_stream(NASTY, io.StringIO()) == NASTY
    assert for_stream(NASTY, Terminal()) == SHOWN


def test_a_terminal_gets_no_control_characters_of_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "a\x1b[2J", steps=5)
    (run / "eval.json").write_text("{")
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True)
    assert main.main(["report", str(run)]) == 0
    output = capsys.readouterr().out
    assert "a\\x1b[2J/report.html" in output
    assert "note: a\\x1b[2J: eval.json cannot be read" in output
    assert "\x1b" not in output


@pytest.mark.parametrize(
    ("redirection", "said"),
    [
        (">/dev/full", "writes to standard output failed: No space left on device"),
        ("| head -n 3 >/dev/null", "writes to standard output failed: Broken pipe"),
        ("2>/dev/full", ""),
        (">/dev/full 2>/dev/full", ""),
        (">&-", ""),
    ],
)
def test_output_that_fails(redirection: str, said: str) -> None:
    shell = f'"$0" -c "$1" {redirection}; exit ${{PIPESTATUS[0]}}'
    ended = subprocess.run(["bash", "-c", shell, sys.executable, PRINTS], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "Exception ignored" not in ended.stderr


def test_characters_that_the_terminal_does_not_know() -> None:
    code = "from rwkv_train.console import *\nwith tolerated_output(): make_console().print('… ×')"
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    assert (ended.returncode, ended.stdout) == (0, "? ?\n"), ended.stderr


def test_a_run_whose_output_fails(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=_train_into_nothing, args=(overrides_for(tmp_path, "run", "budget.steps=5"),))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    assert len(losses(tmp_path / "runs" / "run")) == 5
    assert (tmp_path / "runs" / "run" / "weights.pth").exists()


def _train_into_nothing(overrides: list[str]) -> None:
    full, (reader, closed) = os.open("/dev/full", os.O_WRONLY), os.pipe()
    os.close(reader)
    os.dup2(full, 2)
    os.dup2(closed, 1)
    sys.exit(launcher.main(overrides))
