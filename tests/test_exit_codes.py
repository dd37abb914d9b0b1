"""Exit codes: the documentation, the batch script and the Kubernetes policy agree with the code."""

from __future__ import annotations

import re
from pathlib import Path

from rwkv_train.exit_codes import ExitCode

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "slurm.md").read_text()


def test_the_table_of_the_documentation() -> None:
    """One row for each code, as exit_codes.py has it, and one for processes that a signal has killed."""
    rows = [f"| {code.value} | {code.meaning} | {code.restart} |" for code in ExitCode]
    table = PAGE[PAGE.index("| code | meaning | start again? |") :].split("\n\n")[0].splitlines()[2:]
    assert table == [*rows, "| others above 128 | killed by signal number code - 128 | yes |"]


def test_who_starts_the_processes_again() -> None:
    """The batch script does not restart after a final code, nor after 75: the run has requeued its job itself."""
    final = {code.value for code in ExitCode if code.restart == "no"}
    script = (ROOT / "scripts" / "slurm" / "train.sbatch").read_text()
    (handled,) = re.findall(r"^  ([\d |]+)\) # docs/slurm.md", script, re.MULTILINE)
    assert {int(code) for code in handled.split("|")} == final | {ExitCode.STOPPED}
    (policy,) = re.findall(r"onExitCodes: \{operator: In, values: \[([\d, ]+)\]\}", PAGE)
    assert {int(code) for code in policy.split(",")} == final - {ExitCode.FINISHED, ExitCode.INTERRUPTED}


def test_a_code_reads_as_its_number() -> None:
    """Messages, JSON and the file of RWKV_EXIT hold the number."""
    assert (f"{ExitCode.HUNG}", str(ExitCode.STOPPED), ExitCode.NEGATIVE) == ("76", "75", 1)


def test_the_batch_script_takes_no_file_of_another_user() -> None:
    """Neither of a name in a shared directory that somebody else can make first."""
    script = (ROOT / "scripts" / "slurm" / "train.sbatch").read_text()
    assert "/tmp" not in script
    assert re.search(r"^own=\$\(mktemp -d\) .*\n.*\nexport RWKV_EXIT=\$own/exit ", script, re.MULTILINE)
