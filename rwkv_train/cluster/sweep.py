"""`launcher=slurm`: submits each run of a command line as a SLURM job, with the settings of hydra-submitit-launcher.

The plugin's own launcher waits for all jobs and runs Hydra's task function in them; this one submits the same command
lines with the same settings, and returns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rwkv_train.config import Config
from rwkv_train.config.interpolation import resolved_open_tree
from rwkv_train.config.suggestions import suggestion
from rwkv_train.errors import UserError
from rwkv_train.user_path import user_path

JOB_FOLDER = ".submitit"  # below run.root: submitit's files of each job, among them its output


def submit(lines: Sequence[Sequence[str]], configs: Sequence[Config], run: Callable[[Sequence[str]], Any]) -> list[str]:
    """Submits a job for each command line; command lines that ask for the same resources become one array.

    Args:
        lines: settings of each run, as typed.
        configs: of the runs, checked.
        run: called in every task of a job with the settings of its run.

    Returns:
        the jobs' IDs, in the order of `lines`.

    Raises:
        UserError: an unknown setting of `launcher`, a missing package, no SLURM here, or a job that SLURM refuses.
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
            root = user_path(configs[same[0]].run.root).absolute()
            executor = submitit.AutoExecutor(folder=root / JOB_FOLDER / "%j", cluster="slurm")
            executor.update_parameters(**parameters)
            with executor.batch():
                for number in same:
                    jobs[number] = executor.submit(run, lines[number])
        except (FailedJobError, RuntimeError, OSError) as error:  # no srun, no sbatch, no such partition
            reason = " ".join(str(error).split())
            raise UserError(
                f"launcher=slurm: {reason}", "sbatch and srun must work here; launcher.partition=…"
            ) from None
    return [str(jobs[number].job_id) for number in range(len(lines))]


def _parameters(config: Config) -> dict[str, Any]:
    """submitit's parameters: the settings of `launcher`, and the nodes and tasks that the run needs."""
    from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf, SlurmQueueConf
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    given = {key: value for key, value in resolved_open_tree(config, "launcher").items() if value is not None}
    devices = config.trainer.devices
    given.setdefault("nodes", config.trainer.node_count)
    given.setdefault("tasks_per_node", given.get("gpus_per_node", 1) if devices == "auto" else devices)
    schema = OmegaConf.structured(SlurmQueueConf)
    valid = [key for key in schema if key not in ("_target_", "submitit_folder", "max_num_timeout")]
    for key in given:
        if key not in valid:
            raise UserError(f"launcher.{key}: there is no such setting", suggestion(key, sorted(valid)))
    try:
        settled: Mapping[str, Any] = OmegaConf.merge(schema, given)  # type: ignore[assignment]
        merged = {key: settled[key] for key in valid if key in given}
    except OmegaConfBaseException as error:
        raise UserError(
            f"launcher: {str(error).splitlines()[0]}", "valid settings are those of hydra-submitit-launcher"
        ) from None
    base = set(OmegaConf.structured(BaseQueueConf))
    plain = {w: OmegaConf.to_container(v) if OmegaConf.is_config(v) else v for w, v in merged.items()}
    named = {w if w in base else f"slurm_{w}": v for w, v in plain.items()}
    return {"name": f"{config.arch}-{config.model.size}", **named}
