"""`launcher=slurm`: each run of a command line becomes a job of SLURM's, by the submitit of hydra-submitit-launcher.

The plugin's own launcher waits for all jobs and calls a task of Hydra's; this one submits the same command lines with
the same settings, and ends.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rwkv_train.config import Config
from rwkv_train.errors import UserError

_FOLDER = ".submitit"  # below run.root: what submitit keeps of each job, its output among it


def submit(lines: Sequence[Sequence[str]], configs: Sequence[Config], run: Callable[[Sequence[str]], Any]) -> list[str]:
    """Submits a job for each command line; those that ask for the same are one array.

    Args:
        lines: words of each run.
        configs: theirs, settled.
        run: what a job calls with its words, in every task.

    Returns:
        the jobs' numbers.

    Raises:
        UserError: unknown words of `launcher`, a package or SLURM that is not there, a job that SLURM refuses.
    """
    try:
        import submitit
        from submitit.core.utils import FailedJobError
    except ImportError:
        raise UserError(
            "launcher=slurm needs hydra-submitit-launcher, which is not installed", "pip install 'rwkv-train[slurm]'"
        ) from None
    asked = [_parameters(config) for config in configs]
    jobs: dict[int, Any] = {}
    for parameters in (one for number, one in enumerate(asked) if one not in asked[:number]):
        same = [number for number, one in enumerate(asked) if one == parameters]
        try:
            root = Path(configs[same[0]].run.root).expanduser().absolute()
            executor = submitit.AutoExecutor(folder=root / _FOLDER / "%j", cluster="slurm")
            executor.update_parameters(**parameters)
            with executor.batch():
                for number in same:
                    jobs[number] = executor.submit(run, lines[number])
        except (FailedJobError, RuntimeError, OSError) as error:  # no srun, no sbatch, no such partition
            said = " ".join(str(error).split())
            raise UserError(f"launcher=slurm: {said}", "sbatch and srun must work here; launcher.partition=…") from None
    return [str(jobs[number].job_id) for number in range(len(lines))]


def _parameters(config: Config) -> dict[str, Any]:
    """What submitit is told: the words of `launcher`, and the nodes and tasks that the run needs."""
    from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf, SlurmQueueConf
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    given = {word: value for word, value in config.launcher.items() if value is not None}
    devices = config.trainer.devices
    given.setdefault("nodes", config.trainer.machines)
    given.setdefault("tasks_per_node", given.get("gpus_per_node", 1) if devices == "auto" else devices)
    schema = OmegaConf.structured(SlurmQueueConf)
    valid = [word for word in schema if word not in ("_target_", "submitit_folder", "max_num_timeout")]
    for word in given:
        if word not in valid:
            near = difflib.get_close_matches(word, valid, 1, 0.6)
            hint = f"nearest: {near[0]}; " if near else ""
            raise UserError(f"launcher.{word}: there is no such word", f"{hint}valid: {', '.join(sorted(valid))}")
    try:
        settled: Mapping[str, Any] = OmegaConf.merge(schema, given)  # type: ignore[assignment]
        told = {word: settled[word] for word in valid if word in given}
    except OmegaConfBaseException as error:
        raise UserError(
            f"launcher: {str(error).splitlines()[0]}", "the words are those of hydra-submitit-launcher"
        ) from None
    base = set(OmegaConf.structured(BaseQueueConf))
    plain = {w: OmegaConf.to_container(v) if OmegaConf.is_config(v) else v for w, v in told.items()}
    named = {w if w in base else f"slurm_{w}": v for w, v in plain.items()}
    return {"name": f"{config.arch}-{config.model.size}", **named}
