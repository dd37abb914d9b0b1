"""`python train.py` and `rwkv-train train`: environment, configuration, processes. Only this module reads os.environ.

Nothing heavy is imported before the configuration is valid, so that help and error messages are fast.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from rwkv_train import resources
from rwkv_train.cluster.rank_info import PARENT_THREAD, RankInfo, rank_info_of
from rwkv_train.cluster.rendezvous import die_with_parent, follow_parent
from rwkv_train.config import Config
from rwkv_train.console import for_stream, tolerated_output
from rwkv_train.errors import UserError, UserErrors
from rwkv_train.exit_codes import ExitCode
from rwkv_train.rundir.crash_file import report_faults
from rwkv_train.user_path import user_path

# Iterations that a waiting OpenMP thread spins before it sleeps, about 25 µs. With free cores a step is as fast as with
# the default of 300,000.
OPENMP_SPINS = 2000


def main(argv: Sequence[str], submitted: bool = False) -> int:
    """Builds and checks the configuration of a command line, then trains.

    Args:
        argv: the command line without the program's name.
        submitted: whether this process belongs to a job that `launcher=slurm` has submitted.

    Returns:
        the exit code: 0, 2 for a user error, 3 if the disk refused writes, 75 if a signal stopped the run, 130 for a
        Ctrl-C before it began or a second one; docs/slurm.md lists all. Rank 0 also writes it to the file that
        RWKV_EXIT names, because srun returns the highest code of all processes.
    """
    share_cores()
    if not faulthandler.is_enabled():
        report_faults()
    with tolerated_output():
        try:
            code = _main(argv, submitted)
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            code = ExitCode.INTERRUPTED
    if os.environ.get("RWKV_EXIT") and rank_info().first:
        with suppress(OSError):  # not there inside a container: then srun's own code counts
            Path(os.environ["RWKV_EXIT"]).write_text(f"{code}\n")
    return code


def _main(argv: Sequence[str], submitted: bool) -> int:
    here = rank_info()
    if not here.first:
        follow_parent(os.getppid())
        if here.parent is not None and PARENT_THREAD in os.environ:
            die_with_parent(here.parent)
    try:
        flags, overrides = _parse_flags(argv)
        folders = _conf_folders(flags)
        if flags.help:
            _print_help("train", folders)
            return 0
        lines, configs = _build_configs(overrides, folders, flags.multirun)
    except UserError as error:
        return _report_from_rank(error, here)
    if flags.cfg:
        import yaml

        from rwkv_train.config.schema import as_tree

        _write(yaml.safe_dump_all(map(as_tree, configs), sort_keys=False, allow_unicode=True))
        return 0
    try:
        if not submitted and any(config.launcher for config in configs):
            return _submit(lines, configs, flags.config_dir)
        if flags.multirun:
            return _run_all(lines, configs, flags.config_dir)
        from rwkv_train.training.run import train

        return train(configs[0], rank_info=here)
    except UserError as error:
        return _report_from_rank(error, here)


def _report_from_rank(error: UserError, here: RankInfo) -> int:
    """Rank 0 prints errors; other ranks forward theirs to rank 0, which prints those that it does not have itself."""
    if here.first:
        report(error)
    elif here.ranks > 1:
        from rwkv_train.cluster.preflight import forward_error

        forward_error(here, error)
    return ExitCode.USER_ERROR


def plan(argv: Sequence[str]) -> int:
    """Prints the plan of a run; with `--json`, as one line of JSON.

    Returns:
        the exit code: 0 if it fits, 1 if it does not, 2 for a user error.
    """
    try:
        flags, overrides = _parse_flags([text for text in argv if text != "--json"])
        folders = _conf_folders(flags)
        if flags.help:
            _print_help("plan", folders)
            return 0
        _, (config, *_) = _build_configs([*overrides, "dry_run=true"], folders, multirun=False)
        from rwkv_train.training.dry_run import plan as show_plan

        return show_plan(config, "--json" in argv)
    except UserError as error:
        report(error)
        return ExitCode.USER_ERROR


def load(overrides: Sequence[str]) -> Config:
    """The config of one command line, for use from Python: `train(load(["model=nano", "budget.steps=10"]))`.

    Raises:
        UserErrors: everything that is wrong with it.
    """
    _, (config,) = _build_configs(overrides, [resources.resource("conf")], multirun=False)
    return config


def show(overrides: Sequence[str]) -> int:
    """Prints the first batch that `train` would get with these overrides.

    Raises:
        UserError: an error in the overrides, or in the data.
    """
    from rwkv_train.data.batch_preview import preview

    preview(load(overrides))
    return 0


def report(error: UserError) -> None:
    """Prints all errors in one block on standard error."""
    problems = error.problems if isinstance(error, UserErrors) else [error]
    print(for_stream("\n".join(f"error: {problem}" for problem in problems), sys.stderr), file=sys.stderr)


def rank_info() -> RankInfo:
    """Rank, node and job of this process."""
    return rank_info_of(os.environ, os.getppid())


def share_cores() -> None:
    """Makes waiting OpenMP threads give up their core after microseconds instead of milliseconds.

    At the end of each parallel loop, GNU's OpenMP (torch's own) spins for about 4 ms before it sleeps. If another
    process uses one of the cores, every loop costs that much, and a step becomes a hundred times slower. Must be called
    before torch is imported; variables that the user has set are kept.
    """
    if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(OPENMP_SPINS))


def _parse_flags(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags of a command line, and its overrides."""
    parser = argparse.ArgumentParser("train.py", add_help=False, allow_abbrev=False, usage="python train.py --help")
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("--cfg", action="store_true")
    parser.add_argument("--config-dir", type=Path)
    flags, overrides = parser.parse_known_args(argv)
    for text in overrides:
        if text.startswith("-"):
            raise UserError(
                f"{text}: there is no such flag", "settings are typed without dashes: setting=value; --help lists them"
            )
    if flags.config_dir is not None and not user_path(flags.config_dir).is_dir():
        raise UserError(f"--config-dir {flags.config_dir}: there is no such directory", "give an existing directory")
    return flags, overrides


def _conf_folders(flags: argparse.Namespace) -> list[Path]:
    return [resources.resource("conf"), *([user_path(flags.config_dir).resolve()] if flags.config_dir else [])]


def _print_help(command: Literal["train", "plan"], folders: Sequence[Path]) -> None:
    from rwkv_train.cli.conf_folders import ConfFolders
    from rwkv_train.cli.help import PLAN, TRAIN, help_text

    width = min(shutil.get_terminal_size().columns, 120)
    _write(help_text(TRAIN if command == "train" else PLAN, ConfFolders(folders), width) + "\n")


def _build_configs(
    overrides: Sequence[str], folders: Sequence[Path], multirun: bool
) -> tuple[list[list[str]], list[Config]]:
    """Every command line of a multirun (or the only one), and its config; all are checked before the first one runs."""
    from rwkv_train.cli.checks import Machine
    from rwkv_train.cli.configure import config_builder

    with config_builder(folders, Machine(resources.cpu_cores(), rank_info())) as builder:
        lines = builder.parser.expand(overrides) if multirun else [list(overrides)]
        configs: list[Config] = []
        problems: dict[str, UserError] = {}
        for line in lines:
            try:
                configs.append(builder.build(line))
            except UserErrors as error:
                problems.update((str(problem), problem) for problem in error.problems)
            except UserError as error:
                problems[str(error)] = error
    names = [config.run.name for config in configs]
    for name in sorted({name for name in names if names.count(name) > 1}):
        problems[name] = UserError(
            f"run.name={name} would be the directory of {names.count(name)} runs", "leave run.name out"
        )
    if problems:
        raise UserErrors(list(problems.values()))
    return lines, configs


def _write(text: str) -> None:
    """Writes a text to standard output; the reader may close it before the end (`… | head`)."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _submit(lines: Sequence[Sequence[str]], configs: Sequence[Config], config_dir: Path | None) -> int:
    """Submits a SLURM job for each run and returns when they are in the queue."""
    from rwkv_train.cluster.sweep import submit

    flags = ["--config-dir", str(user_path(config_dir).absolute())] if config_dir else []
    jobs = submit([[*flags, *line] for line in lines], configs, run_job)
    for job, line, config in zip(jobs, lines, configs, strict=True):
        print(f"job {job}  {config.run.root}/{config.run.name}  {' '.join(line)}")
    runs = " ".join(f"{config.run.root}/{config.run.name}" for config in configs)
    print(f"\nTo see their progress:  rwkv-train status {runs}")
    return 0


def run_job(argv: Sequence[str]) -> None:
    """Entry point of each task of a job that `launcher=slurm` has submitted; its exit code is that of the run."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # submitit's handler would end the job; the run sets its own
    sys.exit(main(argv, submitted=True))


def _run_all(lines: Sequence[Sequence[str]], configs: Sequence[Config], config_dir: Path | None) -> int:
    """Runs one after the other, each in its own process, so that none inherits memory or state."""
    program = [sys.argv[0]] if sys.argv[0].endswith("train.py") else ["-m", "rwkv_train.cli.main", "train"]
    extra = ["--config-dir", str(config_dir)] if config_dir else []
    codes: list[int] = []
    for number, (line, config) in enumerate(zip(lines, configs, strict=True), 1):
        print(f"\n[{number}/{len(lines)}] {config.run.name}: {' '.join(line)}", flush=True)
        codes.append(subprocess.run([sys.executable, *program, *extra, *line], check=False).returncode)
        if codes[-1] in (ExitCode.INTERRUPTED, ExitCode.STOPPED):
            break
    for config, code in zip(configs, codes, strict=False):
        print(f"exit code {code}  {config.run.root}/{config.run.name}")
    return next((code for code in codes if code), 0)
