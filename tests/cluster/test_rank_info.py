"""The rank of a process, from the variables that SLURM 22 and 23, torchrun and Lightning set."""

from __future__ import annotations

import dataclasses

import pytest

from rwkv_train.cli import launcher
from rwkv_train.cluster.rank_info import RankInfo, expand_hosts, placement_errors, rank_info_of
from rwkv_train.config import TrainerSettings

STEP = {  # of srun -N2 --ntasks-per-node=2, as its last task sees it
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURMD_NODENAME": "gpu08",
}


def test_a_task_of_srun() -> None:
    rank_info = rank_info_of(STEP)
    assert (rank_info.starter, rank_info.rank, rank_info.local_rank, rank_info.ranks) == ("srun", 3, 1, 4)
    assert (rank_info.machines, rank_info.per_node, rank_info.node, rank_info.nodes) == (
        2,
        2,
        "gpu08",
        ("gpu07", "gpu08"),
    )
    assert (rank_info.address, rank_info.job, rank_info.restarts) == ("gpu07", "4711", 0)
    assert [rank_info.node_of(rank) for rank in range(5)] == ["gpu07", "gpu07", "gpu08", "gpu08", "?"]


def test_all_tasks_have_one_port_and_the_next_start_another() -> None:
    ports = {rank_info_of({**STEP, "SLURM_PROCID": str(rank)}).port for rank in range(4)}
    assert len(ports) == 1
    again = rank_info_of({**STEP, "SLURM_RESTART_COUNT": "1"})
    assert again.restarts == 1
    assert ports.isdisjoint({again.port})
    found = [rank_info_of({**STEP, "SLURM_JOB_ID": str(job)}).port for job in range(1, 2000)]
    assert min(found) >= 12000
    assert max(found) < 32000
    assert len(set(found)) == len(found)  # neighbours in the queue may share a node


def test_what_the_user_has_set_holds() -> None:
    rank_info = rank_info_of({**STEP, "MASTER_ADDR": "ib07", "MASTER_PORT": "4000"})
    assert (rank_info.address, rank_info.port) == ("ib07", 4000)


def test_a_task_of_an_array_is_named_by_both_numbers() -> None:
    """One of an array's tasks has the array's number as its own: scontrol would take that for all of them."""
    assert rank_info_of({**STEP, "SLURM_ARRAY_JOB_ID": "4711", "SLURM_ARRAY_TASK_ID": "2"}).job == "4711_2"


def test_torchrun_inside_of_a_job() -> None:
    torchrun = {"TORCHELASTIC_RUN_ID": "x", "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
    more = {"MASTER_ADDR": "h", "MASTER_PORT": "29400", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    rank_info = rank_info_of({**STEP, **torchrun, **more})
    assert (rank_info.starter, rank_info.rank, rank_info.local_rank, rank_info.ranks, rank_info.machines) == (
        "torchrun",
        5,
        1,
        8,
        2,
    )
    assert (rank_info.address, rank_info.port, rank_info.agent_store, rank_info.job) == ("h", 29400, True, "4711")


@pytest.mark.parametrize(
    ("environment", "rank"),
    [({}, 0), ({"LOCAL_RANK": "1"}, 1), ({"NODE_RANK": "2", "LOCAL_RANK": "0"}, 2), ({"RANK": "x"}, 0)],
)
def test_processes_that_the_run_starts_itself(environment: dict[str, str], rank: int) -> None:
    rank_info = rank_info_of(environment)
    assert (rank_info.starter, rank_info.rank, rank_info.ranks, rank_info.job) == ("plain", rank, 1, None)


def test_a_step_of_one_task_is_a_shell() -> None:
    """srun --pty bash, and what is started in it."""
    shell = {**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1", "SLURM_PROCID": "0"}
    rank_info = rank_info_of(shell)
    assert (rank_info.starter, rank_info.rank, rank_info.job) == ("plain", 0, "4711")
    assert rank_info_of({**shell, "LOCAL_RANK": "1"}).rank == 1
    assert rank_info.without_srun is None


TRAINER = TrainerSettings("auto", "auto", 1, "32-true")


def problems(rank_info: RankInfo, **trainer: object) -> str:
    return "\n".join(map(str, placement_errors(rank_info, dataclasses.replace(TRAINER, **trainer))))  # type: ignore[arg-type]


def test_mistakes() -> None:
    step = rank_info_of(STEP)
    assert problems(step, num_nodes=2, devices=2) == problems(step, num_nodes="auto") == ""
    assert "trainer.num_nodes=4, and the job has 2 nodes (gpu07, gpu08)" in problems(step, num_nodes=4)
    assert "sbatch --nodes=4" in problems(step, num_nodes=4)
    wrong = problems(step, num_nodes=2, devices=8)
    assert "trainer.devices=8, and srun starts 2 processes a node" in wrong
    assert "trainer.devices=2, or srun --ntasks-per-node=8" in wrong


@pytest.mark.parametrize(
    ("variables", "missing"),
    [
        ({"SLURM_NTASKS": "4", "SLURM_JOB_NUM_NODES": "2"}, "4 tasks on 2 nodes"),
        ({"SLURM_JOB_NUM_NODES": "2"}, "1 tasks on 2 nodes"),
        ({"SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1"}, ""),
    ],
)
def test_srun_left_out(variables: dict[str, str], missing: str) -> None:
    found = problems(rank_info_of({"SLURM_JOB_ID": "12", **variables}), num_nodes="auto")
    assert missing in found
    assert ("job 12 has" in found and "srun python train.py" in found) == bool(missing)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", ()),
        ("login", ("login",)),
        ("n[1-3]", ("n1", "n2", "n3")),
        ("n[01-03,7],login,a-b.c[8-9]", ("n01", "n02", "n03", "n7", "login", "a-b.c8", "a-b.c9")),
        ("rack[0-1]n[08-10]", ("rack0n08", "rack0n09", "rack0n10", "rack1n08", "rack1n09", "rack1n10")),
        ("n[099-101]-ib", ("n099-ib", "n100-ib", "n101-ib")),
    ],
)
def test_names_of_nodes(text: str, names: tuple[str, ...]) -> None:
    assert expand_hosts(text) == names


def test_the_number_of_nodes_and_devices_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """auto takes them, the name of the run does not depend on them, and the global batch stays."""
    overrides = ["model.n_layer=2", "trainer.num_nodes=auto", "trainer.accelerator=cpu", "batch.micro=1"]
    alone = launcher.load(overrides)
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    config = launcher.load(overrides)
    assert (config.trainer.num_nodes, config.trainer.devices) == (2, 2)
    assert config.run.name == alone.run.name
    assert config.batch == alone.batch
    assert alone.trainer.machines == 1
