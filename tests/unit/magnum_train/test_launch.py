"""Who a process is among its peers: by torchrun's variables, by Slurm's, or alone; and the line that was typed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from magnum_train.distributed import _first_host, _launch, _tasks_per_host
from magnum_train.errors import ConfigError

HOME = Path(__file__).parents[3]
LINE = ["python", "-m", "magnum_train.train", "experiment=magnum_v2_12b", "data.sources={a: 1}"]
TORCHRUN = {
    "RANK": "9",
    "WORLD_SIZE": "16",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "8",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "gpu-1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_MAX_RESTARTS": "3",
}
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "20",
    "SLURM_PROCID": "17",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2),4",
    "SLURM_STEP_NODELIST": "gpu[07-08,11]",
}


def test_a_plain_process_is_alone_and_its_command_is_what_was_typed() -> None:
    me = _launch({}, LINE)
    assert (me.rank, me.world_size, me.local_rank, me.local_world_size, me.host, me.meet) == (0, 1, 0, 1, 0, "")
    assert me.command == "python -m magnum_train.train experiment=magnum_v2_12b 'data.sources={a: 1}'"


def test_torchruns_variables_win_over_slurms() -> None:
    me = _launch(SLURM | TORCHRUN, ["/env/bin/python", "-u", *LINE[1:]])
    assert (me.rank, me.world_size, me.local_rank, me.local_world_size, me.host) == (9, 16, 1, 8, 1)
    assert (me.meet, me.store_in_rank_0, me.in_slurm_step) == ("gpu-1:29500", False, False)
    assert me.command == (
        "torchrun --nnodes 2 --nproc-per-node 8 --max-restarts 3 … "
        "-m magnum_train.train experiment=magnum_v2_12b 'data.sources={a: 1}'"
    )


def test_torchrun_on_one_host_can_be_typed_again_as_it_stands() -> None:
    one = TORCHRUN | {"GROUP_WORLD_SIZE": "1", "WORLD_SIZE": "8", "TORCHELASTIC_MAX_RESTARTS": "0"}
    command = _launch(one, ["/env/bin/python", "-u", "-X", "dev", *LINE[1:3]]).command
    assert command == "torchrun --nproc-per-node 8 -m magnum_train.train"


def test_a_slurm_step_of_several_tasks_is_a_launch() -> None:
    me = _launch(SLURM, LINE)
    assert (me.rank, me.world_size, me.local_rank, me.local_world_size, me.host) == (17, 20, 1, 4, 2)
    assert (me.meet, me.store_in_rank_0, me.in_slurm_step) == (
        f"gpu07:{15_000 + (31 * 4711 + 2) % 15_000}",
        True,
        True,
    )
    assert me.command.startswith("srun … python -m magnum_train.train ")


def test_the_meeting_point_of_a_step_can_be_set() -> None:
    assert _launch(SLURM | {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "1234"}, LINE).meet == "10.0.0.7:1234"


def test_steps_and_jobs_on_one_host_meet_at_ports_of_their_own() -> None:
    meets = {
        _launch(SLURM | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}, LINE).meet
        for job in range(4711, 4731)
        for step in range(10)
    }
    assert len(meets) == 200


@pytest.mark.parametrize(
    "surroundings",
    [
        {key: value for key, value in SLURM.items() if key != "SLURM_STEP_ID"},  # a batch script
        SLURM | {"SLURM_STEP_NUM_TASKS": "1"},  # salloc's shell, which is a step of one task
    ],
)
def test_a_slurm_shell_and_a_step_of_one_task_are_one_process(surroundings: dict[str, str]) -> None:
    assert _launch(surroundings, LINE).world_size == 1


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("gpu3", "gpu3"),
        ("gpu3,gpu4", "gpu3"),
        ("node[01-04,07],gpu3", "node01"),
        ("node[7,09-11]", "node7"),
        ("rack[1-2]n[03,05]-ib", "rack1n03-ib"),
        ("a-1.example.org,b[1-2]", "a-1.example.org"),
    ],
)
def test_the_first_host_of_slurms_list(hosts: str, first: str) -> None:
    assert _first_host(hosts) == first


@pytest.mark.parametrize("hosts", ["", "node[01", "node[a-b]", ",x", "node[1-]", "a b"])
def test_a_list_of_hosts_that_is_none_is_refused(hosts: str) -> None:
    with pytest.raises(ConfigError, match="SLURM_STEP_NODELIST"):
        _first_host(hosts)


def test_tasks_of_each_host() -> None:
    assert _tasks_per_host("8(x2),4") == [8, 8, 4]
    assert _tasks_per_host("4,3") == [4, 3]
    assert _tasks_per_host("2") == [2]
    for wrong in ("", "8(x2", "8x2", "8,"):
        with pytest.raises(ConfigError, match="SLURM_STEP_TASKS_PER_NODE"):
            _tasks_per_host(wrong)


def test_the_tasks_of_a_slurm_step_meet_and_agree() -> None:
    code = (
        "from magnum_train import distributed\n"
        "with distributed.start(timeout_seconds=30, replicate=1, threads=1, deterministic=False) as ranks:\n"
        "    print(ranks.rank, ranks.world_size, ranks.agree([ranks.rank == 1]))\n"
    )
    step = SLURM | {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NODEID": "0",
        "SLURM_JOB_ID": str(os.getpid()),  # a port that no test beside this one takes
        "PATH": "/usr/bin:/bin",
        "OMP_NUM_THREADS": "1",
    }
    programs = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=step | {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)},
            cwd=HOME,
            stdout=subprocess.PIPE,
            text=True,
        )
        for task in range(2)
    ]
    try:
        said = [program.communicate(timeout=60)[0] for program in programs]
    finally:
        for program in programs:
            program.kill()
            program.wait()
    assert said == ["0 2 [True]\n", "1 2 [True]\n"]
