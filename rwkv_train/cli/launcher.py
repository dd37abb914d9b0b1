"""The front door of `python train.py` and `rwkv-train train`, and the one place that reads the environment.

Nothing heavy is imported until the configuration is found right: help and the report of a mistake come at once.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rwkv_train.cluster.rank_info import RankInfo, rank_info_of
from rwkv_train.config import Config
from rwkv_train.errors import UserError, UserErrors
from rwkv_train.resources import resource

MISTAKE = 2  # exit codes
STOPPED = 75
INTERRUPTED = 130

SPINS = (
    2000  # of a waiting OpenMP thread, about 25 µs; alone on its cores a step is as fast as with the default 300,000
)


def main(argv: Sequence[str], submitted: bool = False) -> int:
    """Composes and checks what the words ask for, then trains.

    Args:
        argv: the command line without the program's name.
        submitted: whether this is the job that the words of `launcher` have asked for.

    Returns:
        the exit code: 0, 2 for a mistake of the user's, 3 where the disk refused writes, 75 where a signal stopped the
        run, 130 for a Ctrl-C before it began or a second one; docs/slurm.md has them all.
        The first process also writes it to the file that RWKV_EXIT names: srun's own is the highest of all processes'.
    """
    share_cores()
    try:
        code = _main(argv, submitted)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        code = INTERRUPTED
    if os.environ.get("RWKV_EXIT") and rank() == 0:
        Path(os.environ["RWKV_EXIT"]).write_text(f"{code}\n")
    return code


def _main(argv: Sequence[str], submitted: bool) -> int:
    here = rank_info()
    try:
        flags, words = _split(argv)
        folders = [resource("conf"), *([flags.config_dir.expanduser().resolve()] if flags.config_dir else [])]
        if flags.help:
            _show(_menu(folders) + "\n")
            return 0
        lines, configs = _settle(words, folders, flags.multirun)
    except UserError as error:
        return _refuse(error, here)
    if flags.cfg:
        _show("---\n".join(map(_as_yaml, configs)))
        return 0
    try:
        if not submitted and any(config.launcher for config in configs):
            return _submit(lines, configs, flags.config_dir)
        if flags.multirun:
            return _run_all(lines, configs, flags.config_dir)
        from rwkv_train.training.run import train

        return train(configs[0], rank_info=here)
    except UserError as error:
        return _refuse(error, here)


def _refuse(error: UserError, here: RankInfo) -> int:
    """The first process tells a mistake; what another one alone has found goes to the first one."""
    if here.first:
        report(error)
    elif here.ranks > 1:
        from rwkv_train.cluster.preflight import tell

        tell(here, error)
    return MISTAKE


def plan(argv: Sequence[str]) -> int:
    """What the words ask for as a plan; `--json` among them asks for one line of JSON.

    Returns:
        the exit code: 0 where it fits, 1 where it does not, 2 for a mistake.
    """
    words = [word for word in argv if word != "--json"]
    try:
        flags, words = _split(words)
        folders = [resource("conf"), *([flags.config_dir.expanduser().resolve()] if flags.config_dir else [])]
        if flags.help:
            print("usage: rwkv-train plan [word=value …] [--json]      the words are those of train.py\n")
            print(_menu(folders))
            return 0
        _, (config, *_) = _settle([*words, "dry_run=true"], folders, multirun=False)
        from rwkv_train.training.dry_run import plan as show_plan

        return show_plan(config, "--json" in argv)
    except UserError as error:
        report(error)
        return MISTAKE


def load(words: Sequence[str]) -> Config:
    """The config of one command line, for use from Python: `train(load(["model=nano", "budget.steps=10"]))`.

    Raises:
        UserErrors: everything that is wrong with it.
    """
    _, (config,) = _settle(words, [resource("conf")], multirun=False)
    return config


def show(words: Sequence[str]) -> int:
    """Prints the first batch that `train` would get with these words.

    Raises:
        UserError: a mistake in the words, or in the data.
    """
    from rwkv_train.data.batch_preview import preview

    preview(load(words))
    return 0


def report(error: UserError) -> None:
    """Prints every mistake in one block on standard error."""
    problems = error.problems if isinstance(error, UserErrors) else [error]
    print("\n".join(f"error: {problem}" for problem in problems), file=sys.stderr)


def rank() -> int:
    """0 for the first process of a run (or its only one), above 0 for the others."""
    return rank_info().rank


def rank_info() -> RankInfo:
    """Where this process stands among those of its run."""
    return rank_info_of(os.environ)


def share_cores() -> None:
    """Has a thread that waits for the others of its product give its core away after microseconds, not milliseconds.

    At the end of each parallel loop GNU's OpenMP, torch's own, spins about 4 ms before it sleeps. Where another process
    has one of the cores, every loop then costs that much: a step becomes a hundred times slower. Must come before torch
    is imported; what the user has set stays.
    """
    if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _split(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser("train.py", add_help=False, allow_abbrev=False, usage="python train.py --help")
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("--cfg", action="store_true")
    parser.add_argument("--config-dir", type=Path)
    flags, words = parser.parse_known_args(argv)
    for word in words:
        if word.startswith("-"):
            raise UserError(
                f"{word}: there is no such flag", "settings are typed without dashes: word=value; --help lists them"
            )
    if flags.config_dir is not None and not flags.config_dir.expanduser().is_dir():
        raise UserError(f"--config-dir {flags.config_dir}: there is no such directory")
    return flags, words


def _menu(folders: Sequence[Path]) -> str:
    from rwkv_train.cli.help import groups, menu

    return menu(folders[0], groups(folders), min(shutil.get_terminal_size().columns, 120))


def _settle(words: Sequence[str], folders: Sequence[Path], multirun: bool) -> tuple[list[list[str]], list[Config]]:
    """Every command line that the words stand for, and its config; all are checked before the first one runs."""
    from rwkv_train.cli.checks import Machine
    from rwkv_train.cli.compose import composer

    with composer(folders, Machine(cores(), rank_info())) as conf:
        lines = conf.combinations(words) if multirun else [list(words)]
        configs: list[Config] = []
        problems: dict[str, UserError] = {}
        for line in lines:
            try:
                configs.append(conf.settle(line))
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


def _show(text: str) -> None:
    """Prints a text whose reader may have seen enough before its end (`… | head`)."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _as_yaml(config: Config) -> str:
    import yaml

    from rwkv_train.config.schema import as_tree

    text: str = yaml.safe_dump(as_tree(config), sort_keys=False, allow_unicode=True)
    return text


def _submit(lines: Sequence[Sequence[str]], configs: Sequence[Config], config_dir: Path | None) -> int:
    """A job of SLURM's for each run; this process ends when they are in the queue."""
    from rwkv_train.cluster.sweep import submit

    flags = ["--config-dir", str(config_dir.expanduser().absolute())] if config_dir else []
    jobs = submit([[*flags, *line] for line in lines], configs, run_job)
    for job, line, config in zip(jobs, lines, configs, strict=True):
        print(f"job {job}  {config.run.root}/{config.run.name}  {' '.join(line)}")
    runs = " ".join(f"{config.run.root}/{config.run.name}" for config in configs)
    print(f"\nHow they get on:  rwkv-train status {runs}")
    return 0


def run_job(argv: Sequence[str]) -> None:
    """What a job of `launcher=slurm` calls in each of its tasks; its exit code is the run's."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # submitit's handler ends the job; the run sets its own
    sys.exit(main(argv, submitted=True))


def _run_all(lines: Sequence[Sequence[str]], configs: Sequence[Config], config_dir: Path | None) -> int:
    """One run after the other, each in a process of its own: none inherits the memory or the state of another."""
    door = [sys.argv[0]] if sys.argv[0].endswith("train.py") else ["-m", "rwkv_train.cli.main", "train"]
    extra = ["--config-dir", str(config_dir)] if config_dir else []
    codes: list[int] = []
    for number, (line, config) in enumerate(zip(lines, configs, strict=True), 1):
        print(f"\n[{number}/{len(lines)}] {config.run.name}: {' '.join(line)}", flush=True)
        codes.append(subprocess.run([sys.executable, *door, *extra, *line], check=False).returncode)
        if codes[-1] in (INTERRUPTED, STOPPED):
            break
    for config, code in zip(configs, codes, strict=False):
        print(f"exit code {code}  {config.run.root}/{config.run.name}")
    return next((code for code in codes if code), 0)
