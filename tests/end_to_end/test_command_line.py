"""The programs as a person starts them: what they print, how they end, what they leave behind."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tiny_runs import metrics, overrides, uneven_rows, write_rows

HOME = Path(__file__).parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]


def program(
    cwd: Path,
    *arguments: str,
    timeout: float = 110,
    path: Path = HOME,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run Python in an empty folder with the project importable; `environment` is added to the process's own."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("HYDRA", "RANK", "WORLD"))}
    whole = own | {"PYTHONPATH": str(path)} | dict(environment or {})
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=whole, capture_output=True, text=True, timeout=timeout,
        check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def assert_refused(done: subprocess.CompletedProcess[str], *said: str) -> None:
    """One message, no traceback, status 2."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert done.stderr.count("error:") == 1, done.stderr
    for words in said:
        assert words in done.stderr, done.stderr


def test_a_sweep_over_two_rates_alone_and_under_torchrun_leaves_run_folders_only(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    work = tmp_path / "work"
    work.mkdir()
    line = [o for o in overrides(tmp_path, "train.max_steps=2") if not o.startswith("run_dir")]
    sweep = [*line, "optim.lr=1e-3,2e-3", "--multirun"]
    alone = program(work, "-m", "magnum_train.train", *sweep)
    assert alone.returncode == 0, alone.stderr
    assert [entry.name for entry in work.iterdir()] == ["runs"]
    folders = sorted((work / "runs").iterdir())
    assert len(folders) == 2
    first = {folder.name: metrics(folder)[-1]["lr"] for folder in folders}
    assert len(set(first.values())) == 2
    again = program(work, *TORCHRUN, "magnum_train.train", "--multirun", *sweep[:-1])
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("is complete: 2 of 2 steps") == 2

    other = tmp_path / "other"
    other.mkdir()
    ranks = program(other, *TORCHRUN, "magnum_train.train", *sweep)
    assert ranks.returncode == 0, ranks.stderr
    assert [entry.name for entry in other.iterdir()] == ["runs"]
    assert {folder.name: metrics(folder)[-1]["lr"] for folder in (other / "runs").iterdir()} == first


def test_a_typo_is_answered_once_under_torchrun_and_nothing_is_written(tmp_path: Path) -> None:
    done = program(tmp_path, *TORCHRUN, "magnum_train.train", "learning_rate=1e-5")
    assert done.returncode == 1  # torchrun's own
    assert done.stderr.count("error: learning_rate: found an unknown setting") == 1
    assert "Did you mean optim.lr" in done.stderr
    assert f'File "{HOME}/magnum_train' not in done.stderr
    assert list(tmp_path.iterdir()) == []


BAD_ROWS = {
    "malformed JSON": ('{"messages": [\n', "rows.jsonl", "line 2"),
    "not UTF-8": (b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}\n', "rows.jsonl", "UTF-8"),
    "no such file": (None, "rows.jsonl", "no"),
}


@pytest.mark.parametrize("fault", BAD_ROWS)
def test_a_broken_file_is_refused_with_its_place(fault: str, tmp_path: Path) -> None:
    content, *said = BAD_ROWS[fault]
    line = overrides(tmp_path)
    file = tmp_path / "rows.jsonl"
    good = json.dumps(uneven_rows(1)[0]) + "\n"
    if content is None:
        file.unlink()
    elif isinstance(content, bytes):
        file.write_bytes(good.encode() + content)
    else:
        file.write_text(good + content)
    done = program(tmp_path, "-m", "magnum_train.train", *line)
    assert_refused(done, *said)
    assert not (tmp_path / "run").exists()
    assert not any((tmp_path / "prepared").glob("*")) or not any((tmp_path / "prepared").glob("[!.]*"))


UNUSABLE = [
    {"rows": []},
    {"messages": []},
    {"messages": [{"role": "wizard", "content": "x"}]},
    {"messages": [{"role": "user", "content": "nobody answers"}]},
]


def test_rows_that_cannot_be_used_stop_a_run_that_would_lose_too_many(tmp_path: Path) -> None:
    line = overrides(tmp_path)
    write_rows(tmp_path / "rows.jsonl", [*uneven_rows(16), *UNUSABLE])
    done = program(tmp_path, "-m", "magnum_train.train", *line)
    assert_refused(done, "data.max_loss_share", "numbers")
    assert not (tmp_path / "run").exists()


def test_rows_that_cannot_be_used_are_accounted_for_and_the_rest_trains(tmp_path: Path) -> None:
    line = overrides(tmp_path, "data.max_loss_share=0.5", "train.max_steps=2")
    write_rows(tmp_path / "rows.jsonl", [*uneven_rows(16), *UNUSABLE])
    done = program(tmp_path, "-m", "magnum_train.train", *line)
    assert done.returncode == 0, done.stderr
    ledger = json.loads((tmp_path / "run" / "ledger.json").read_text())["numbers"]
    ended = {gate: rows for gate, rows in ledger["rows"].items() if rows}
    # The validation file is the first seven of the sixteen that can be used.
    assert ended == {"read": 27, "invalid": 3, "unweighted": 1, "in_validation": 7, "validation": 7, "packed": 9}
    assert ledger["reasons"]["invalid"] == {"empty conversation": 1, "missing field": 1, "unknown role": 1}
    assert "numbers: 1 invalid, unknown role" in done.stderr
    [rejects] = (tmp_path / "prepared").glob("*/rejects.jsonl")
    lines = rejects.read_text().splitlines()
    assert len(lines) == 4 + 7
    assert any("wizard" in line and "rows.jsonl" in line for line in lines)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("important")
    done = program(tmp_path, "-m", "magnum_train.train", *overrides(tmp_path))
    assert_refused(done, "run_dir", "which holds other files")
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(("setting", "file"), [("run_dir", "run"), ("data.prepared_dir", "prepared")])
def test_a_file_where_a_folder_should_be_is_refused(setting: str, file: str, tmp_path: Path) -> None:
    line = overrides(tmp_path)
    (tmp_path / file).write_text("in the way")
    assert_refused(program(tmp_path, "-m", "magnum_train.train", *line), setting, str(tmp_path / file))


def test_a_users_own_experiment_lives_in_a_folder_of_his(tmp_path: Path) -> None:
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    file = tmp_path / "mine" / "experiment" / "small.yaml"
    file.write_text("# @package _global_\noptim:\n  lr: 7e-4\n")
    line = ["experiment=small", "--config-dir", str(tmp_path / "mine"), "--cfg", "job"]
    done = program(tmp_path, "-m", "magnum_train.train", *line)
    assert done.returncode == 0, done.stderr
    assert "lr: 0.0007" in done.stdout
    file.write_text("optim:\n  lr: 7e-4\n")
    assert_refused(program(tmp_path, "-m", "magnum_train.train", *line[:-2]), "@package _global_")


def test_flash_attention_on_a_cpu_is_refused(tmp_path: Path) -> None:
    done = program(tmp_path, "-m", "magnum_train.train", *overrides(tmp_path, "model.attention=flash_attn"))
    assert_refused(done, "model.attention", "CUDA")


def test_a_prompt_is_answered_from_a_run_and_a_wrong_step_is_named(tmp_path: Path) -> None:
    line = overrides(
        tmp_path, "train.max_steps=4", "checkpoint.every_steps=2", "profile.steps=[2]", "samples.every_steps=2",
        "samples.max_new_tokens=4",
    )  # fmt: skip
    done = program(tmp_path, *TORCHRUN, "magnum_train.train", *line)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    assert (run / "profile" / "step-00000002.trace.json.gz").stat().st_size > 1000
    replies = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    assert sum("reply" in row for row in replies) == 6  # three prompts, twice
    environment = json.loads((run / "environment.json").read_text())[-1]
    assert environment["world_size"] == 2
    assert environment["versions"]["torch"]
    ask = "prompt=It's 1=1, isn't it?"
    answer = program(tmp_path, "-m", "magnum_train.chat", "weights=run@2", ask, "max_new_tokens=5")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.endswith("\n")
    wrong = program(tmp_path, "-m", "magnum_train.chat", "weights=run@3", "prompt=Hello", "max_new_tokens=5")
    assert_refused(wrong, "no checkpoint run@3", "2, 4")
