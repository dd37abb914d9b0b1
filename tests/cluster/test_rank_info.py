"""The rank of a process, from the variables that SLURM 22 and 23, torchrun and Lightning set."""

from __future__ import annotations

import dataclasses

import pytest

from rwkv_train.cli import launcher
from rwkv_train.cluster.rank_info import PARENT, RankInfo, expand_hosts, placement_errors, rank_info_of
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
    assert (rank_info.nodes, rank_info.per_node, rank_info.node, rank_info.node_names) == (
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
    assert (rank_info.starter, rank_info.rank, rank_info.local_rank, rank_info.ranks, rank_info.nodes) == (
        "torchrun",
        5,
        1,
        8,
        2,
    )
    assert (rank_info.address, rank_info.port, rank_info.agent_store, rank_info.job) == ("h", 29400, True, "4711")


TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
TORCHRUN |= {"MASTER_ADDR": "h", "MASTER_PORT": "29400"}


def test_whatever_sets_torchruns_variables_counts_as_torchrun() -> None:
    rank_info = rank_info_of(TORCHRUN)
    assert (rank_info.starter, rank_info.rank, rank_info.ranks, rank_info.nodes) == ("torchrun", 5, 8, 2)
    assert problems(rank_info, num_nodes=2, devices=4) == ""
    assert "torchrun starts 4 processes a node (WORLD_SIZE=8)" in problems(rank_info, num_nodes=2, devices=2)
    alone = rank_info_of(TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"})
    assert (alone.starter, alone.ranks) == ("torchrun", 1)  # in a notebook under torchrun
    assert "trainer.devices=2, and torchrun starts 1 processes a node (WORLD_SIZE=1)" in problems(alone, devices=2)


@pytest.mark.parametrize(("local_rank", "node_rank"), [(1, 0), (1, 2), (0, 0)])
def test_ranks_that_the_run_starts_itself(local_rank: int, node_rank: int) -> None:
    """Lightning passes its own environment on, ours names the parent; without it the variables are left over."""
    own = {"LOCAL_RANK": str(local_rank), "NODE_RANK": str(node_rank), "WORLD_SIZE": "4", "MASTER_ADDR": "h"}
    rank_info = rank_info_of({**own, PARENT: "77"}, parent=77)
    assert (rank_info.starter, rank_info.rank, rank_info.ranks) == ("plain", max(local_rank, node_rank), 1)
    assert rank_info.local_rank == local_rank
    assert problems(rank_info, num_nodes=4, devices=4) == ""
    assert rank_info_of({**own, PARENT: "77"}, parent=78).unusable is not None
    assert rank_info_of({}) == rank_info_of({PARENT: "77"}, parent=1)
    assert (rank_info_of({}).starter, rank_info_of({}).rank, rank_info_of({}).job) == ("plain", 0, None)


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"RANK": "3"}, "RANK=3 set without LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "0"}, "RANK=0 set without"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0 set without RANK"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK= set without RANK"),
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2"}, "LOCAL_RANK=1, WORLD_SIZE=2 set without RANK, LOCAL_WORLD_SIZE"),
        ({"NODE_RANK": "1"}, "NODE_RANK=1 set without MASTER_ADDR, MASTER_PORT"),
        ({"NODE_RANK": "x", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, "NODE_RANK=x contradict"),
        ({"GROUP_RANK": "1"}, "GROUP_RANK=1 set without"),
        (TORCHRUN | {"RANK": "8"}, "RANK=8, WORLD_SIZE=8 contradict each other"),
        (TORCHRUN | {"RANK": "-1"}, "RANK=-1, WORLD_SIZE=8 contradict each other"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE=3, MASTER_ADDR=h"),
        ({"TORCHELASTIC_RUN_ID": "x", "RANK": "0"}, "RANK=0 set without LOCAL_RANK"),
    ],
)
def test_left_over_variables(environment: dict[str, str], named: str) -> None:
    """Rank 0 refuses them: another rank would print and record nothing, and exit with 0."""
    rank_info = rank_info_of(environment)
    assert (rank_info.first, rank_info.ranks) == (True, 1)
    found = problems(rank_info)
    assert found.startswith("the environment has ")
    assert named in found
    assert "env -u RANK -u LOCAL_RANK" in found


def test_several_nodes_without_a_launcher() -> None:
    alone = problems(rank_info_of({}), num_nodes=2, devices=1)
    assert "trainer.num_nodes=2, but this process was started alone" in alone
    assert "sbatch scripts/slurm/train.sbatch …, torchrun --nnodes=2 …, or the same command on every node" in alone
    assert problems(rank_info_of({}), submits=True, num_nodes=2) == ""  # launcher=slurm
    node = rank_info_of({"NODE_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "4000"})
    assert (node.first, node.node_rank, node.starter) == (False, 1, "plain")
    assert problems(node, num_nodes=2, devices=2) == ""
    assert "NODE_RANK=1, and trainer.num_nodes=1 has no such node" in problems(node, num_nodes=1)


def test_a_step_of_one_task_is_a_shell() -> None:
    """srun --pty bash, and what is started in it."""
    shell = {**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1", "SLURM_PROCID": "0"}
    rank_info = rank_info_of(shell)
    assert (rank_info.starter, rank_info.rank, rank_info.job) == ("plain", 0, "4711")
    assert rank_info_of({**shell, "LOCAL_RANK": "1", PARENT: "9"}, parent=9).rank == 1
    assert rank_info.without_srun is None


TRAINER = TrainerSettings("auto", "auto", 1, "32-true")


def problems(rank_info: RankInfo, submits: bool = False, **trainer: object) -> str:
    settings = dataclasses.replace(TRAINER, **trainer)  # type: ignore[arg-type]
    return "\n".join(map(str, placement_errors(rank_info, settings, submits)))


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
    assert alone.trainer.node_count == 1
