"""The scripts for Slurm that the documentation offers, and sweeps as its jobs, as far as one machine can show them.

Slurm's commands are stood in for: `sbatch` by a start of the script with the variables that it would set, `srun` and
`scontrol` by the program below. The variables bear the names and forms of Slurm's manual pages (sbatch, srun, OUTPUT
ENVIRONMENT VARIABLES).
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import hosts
from hosts import Host
from ranks import run_ranks
from tiny_runs import metrics, overrides, run_until, series

HOME = Path(__file__).parents[2]
SCRIPTS = sorted((HOME / "docs" / "slurm").glob("*.sbatch"))
STEPS = 40

STAND_IN = f'''#!{sys.executable}
"""srun: run a command on every node of the job, each task with a step's variables; pass SIGUSR1 and SIGTERM on."""
import os, pathlib, signal, subprocess, sys, time

name, words = os.path.basename(sys.argv[0]), sys.argv[1:]
nodes = [node.split(":") for node in os.environ["STAND_IN_NODES"].split()]  # name and process of each
folder = pathlib.Path(os.environ["STAND_IN_FOLDER"])
if name == "scontrol":
    if words[:2] == ["show", "hostnames"]:
        sys.stdout.write(words[2].replace(",", "\\n") + "\\n")  # in one piece: `head` reads no further
    else:
        with (folder / "said").open("a") as said:
            print(*words, file=said)
    sys.exit()

per_node = int(os.environ["SLURM_NTASKS_PER_NODE"])
while words[0].startswith("--"):
    option, _, value = words.pop(0).partition("=")
    per_node = int(value) if option == "--ntasks-per-node" else per_node
step = len(list(folder.glob("step-*")))
(folder / f"step-{{step}}").write_text(" ".join(words))
tasks = []


def pass_on(number, frame):
    for task in tasks:  # `nsenter` is the parent of the task
        for child in pathlib.Path(f"/proc/{{task.pid}}/task/{{task.pid}}/children").read_text().split():
            os.kill(int(child), number)


signal.signal(signal.SIGUSR1, pass_on)
signal.signal(signal.SIGTERM, pass_on)
for number, (node, process) in enumerate(nodes):
    for local in range(per_node):
        variables = {{
            "SLURM_STEP_ID": step, "SLURM_STEPID": step, "SLURM_NODEID": number, "SLURM_LOCALID": local,
            "SLURM_PROCID": number * per_node + local, "SLURM_STEP_NUM_TASKS": len(nodes) * per_node,
            "SLURM_NTASKS": len(nodes) * per_node, "SLURM_STEP_NUM_NODES": len(nodes),
            "SLURM_STEP_NODELIST": ",".join(node for node, _ in nodes),
            "SLURM_STEP_TASKS_PER_NODE": f"{{per_node}}(x{{len(nodes)}})", "SLURMD_NODENAME": node,
        }}
        enter = ["nsenter", f"--target={{process}}", "--net", "--uts", "--pid", "--mount"]
        tasks.append(subprocess.Popen(
            [*enter, "env", f"--chdir={{os.getcwd()}}", *words],
            env=os.environ | {{key: str(value) for key, value in variables.items()}},
        ))
sys.exit(max(abs(task.wait()) for task in tasks))
'''


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[Host]]:
    if reason := hosts.why_not():
        pytest.skip(reason)
    with hosts.network(tmp_path, "alpha", "beta") as net:
        yield [net.host(0), net.host(1)]


def sbatch(script: Path, nodes: list[Host], folder: Path, *words: str) -> subprocess.Popen[bytes]:
    """Start a script as Slurm would on the first node; what it prints is added to folder/slurm.out."""
    commands = folder / "commands"
    commands.mkdir(exist_ok=True)
    for name in ("srun", "scontrol"):
        (commands / name).write_text(STAND_IN)
        (commands / name).chmod(0o755)
    own = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    with (folder / "slurm.out").open("ab") as out:
        return subprocess.Popen(
            ["bash", script, *words],
            env=own
            | {
                "PATH": f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}",
                "PYTHONPATH": str(HOME),
                "OMP_NUM_THREADS": "1",
                "STAND_IN_NODES": " ".join(f"{host.name}:{host.inside.pid}" for host in nodes),
                "STAND_IN_FOLDER": str(commands),
                "SLURM_JOB_ID": "4711",
                "SLURM_JOB_NODELIST": ",".join(host.name for host in nodes),
                "SLURM_JOB_NUM_NODES": str(len(nodes)),
                "SLURM_NTASKS_PER_NODE": "1",
            },
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
        )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_is_shell_and_asks_for_what_it_needs(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True, timeout=20)
    text = script.read_text()
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(\S*)$", text, re.MULTILINE))
    assert {"nodes", "ntasks-per-node", "time", "requeue"} <= asked.keys()
    assert re.fullmatch(r"B:USR1@\d+", asked["signal"])
    assert asked["open-mode"] == "append"  # a job that queues again would empty its own report


@pytest.mark.slow  # six starts of Python with torch on two nodes, twice
@pytest.mark.timeout(240)
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_before_the_time_limit_a_job_saves_queues_again_and_goes_on(
    script: Path, nodes: list[Host], tmp_path: Path
) -> None:
    line = overrides(
        tmp_path, f"train.max_steps={STEPS}", "checkpoint.every_steps=30", "validation.every_steps=20",
        "distributed.timeout_seconds=60",
    )  # fmt: skip
    run_dir, said = tmp_path / "run", tmp_path / "slurm.out"
    job = sbatch(script, nodes, tmp_path, *line)
    deadline = time.monotonic() + 100
    while not ((run_dir / "metrics.jsonl").exists() and len(metrics(run_dir)) >= 3):
        assert job.poll() is None, said.read_text()
        assert time.monotonic() < deadline, said.read_text()
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=60) == 0, said.read_text()
    assert (tmp_path / "commands" / "said").read_text() == "requeue 4711\n", said.read_text()
    saved = len(metrics(run_dir))
    assert 3 <= saved < STEPS, said.read_text()
    assert (run_dir / "checkpoints" / f"step-{saved:08d}").exists(), said.read_text()
    assert "Traceback" not in said.read_text()

    again = sbatch(script, nodes, tmp_path, *line)
    assert again.wait(timeout=100) == 0, said.read_text()
    assert (tmp_path / "commands" / "said").read_text() == "requeue 4711\n"  # the run is complete: once is enough
    assert f"after step {saved}" in said.read_text()
    run_ranks(run_until, 2, [*line, f"run_dir={tmp_path}/undisturbed"], None)
    assert series(run_dir) == series(tmp_path / "undisturbed")


def train(cwd: Path, *words: str, timeout: float = 110) -> subprocess.CompletedProcess[str]:
    own = {
        name: value for name, value in os.environ.items() if not name.startswith(("HYDRA", "SLURM", "RANK", "WORLD"))
    }
    path = os.pathsep.join([str(HOME), *filter(None, [own.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-m", "magnum_train.train", *words], cwd=cwd, env=own | {"PYTHONPATH": path},
        capture_output=True, text=True, timeout=timeout, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def test_a_sweep_for_slurm_composes_and_hands_its_jobs_over_in_a_shared_folder(tmp_path: Path) -> None:
    pytest.importorskip("submitit", reason="the extra [slurm] is not installed")
    done = train(
        tmp_path, "hydra/launcher=slurm", "hydra.launcher.partition=gpu", "--cfg", "hydra", "-p", "hydra.launcher"
    )
    assert done.returncode == 0, done.stderr
    assert "SlurmLauncher" in done.stdout
    assert "partition: gpu" in done.stdout
    assert "submitit_folder: runs/slurm/%j" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow  # submitit starts each job as a Python of its own
def test_jobs_of_a_sweep_train_each_in_a_folder_of_its_own_and_a_failing_one_is_told(tmp_path: Path) -> None:
    pytest.importorskip("submitit", reason="the extra [slurm] is not installed")
    line = [word for word in overrides(tmp_path, "train.max_steps=2") if not word.startswith("run_dir")]
    work = tmp_path / "work"
    work.mkdir()
    # The launcher that submitit has for one machine, with the folders of hydra/launcher=slurm.
    jobs = ["hydra/launcher=submitit_local", "hydra.launcher.submitit_folder=runs/slurm/%j", "hydra.sweep.subdir=."]
    done = train(work, "--multirun", *line, *jobs, "optim.lr=1e-3,2e-3")
    assert done.returncode == 0, done.stderr
    folders = sorted(folder for folder in (work / "runs").iterdir() if folder.name != "slurm")
    assert {metrics(folder)[-1]["lr"] for folder in folders} == {1e-4, 2e-4}  # min_lr_ratio of each
    assert [len(metrics(folder)) for folder in folders] == [2, 2]
    assert [entry.name for entry in work.iterdir()] == ["runs"]
    said = [file.read_text() for file in (work / "runs" / "slurm").rglob("*_log.err")]
    assert sum("done: runs/" in text for text in said) == 2

    shutil.rmtree(work / "runs")
    done = train(work, "--multirun", *line, *jobs, "optim.lr=1e-3,-1")
    assert done.returncode == 1, done.stderr
    assert "error: optim.lr: found -1.0; expected more than 0." in done.stderr
    good = [folder for folder in (work / "runs").iterdir() if folder.name != "slurm"]
    assert [len(metrics(folder)) for folder in good] == [2]
