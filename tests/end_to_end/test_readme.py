"""What the README shows is true: its commands, its settings, its links."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from magnum_train import demo
from magnum_train.config import TrainConfig, compose, flat, setting_keys

HOME = Path(__file__).parents[2]
README = (HOME / "README.md").read_text()
PAGES = [HOME / "README.md", HOME / "CONTRIBUTING.md", HOME / "CHANGELOG.md", *(HOME / "docs").rglob("*.md")]


def commands() -> list[str]:
    """Every line that begins with `$ ` in a console block."""
    blocks = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    return [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]


def test_there_are_commands_to_check() -> None:
    kinds = " ".join(commands())
    assert all(word in kinds for word in ("make demo", "make test", "torchrun", "--multirun", "magnum_train.chat"))


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("make ")])
def test_a_make_target_exists(command: str) -> None:
    done = subprocess.run(["make", "-n", *command.split()[1:]], cwd=HOME, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [c for c in commands() if re.search(r"magnum_train\.(train|prepare|report)", c)])
def test_a_training_line_composes(command: str) -> None:
    words = shlex.split(command)
    overrides = [w for w in words[words.index("-m") + 2 :] if w != "--multirun"]
    choices = [re.sub(r"=([^,\[{]+),.*", r"=\1", w) for w in overrides]  # a sweep's first point
    settings = compose(choices)
    assert settings.packs_per_step > 0


def test_the_size_that_it_names_is_that_of_the_packages() -> None:
    named = re.search(r"Some ([\d,]+) lines of trainer, ([\d,]+) of data and ([\d,]+) of model", README)
    assert named
    for package, said in zip(("magnum_train", "data", "model"), named.groups(), strict=True):
        count = sum(len(file.read_text().splitlines()) for file in (HOME / package).glob("*.py"))
        assert abs(count - int(said.replace(",", ""))) < 0.05 * count, (package, count)


def test_the_demos_line_is_the_one_that_it_runs(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []

    def run(words: list[str], check: bool) -> subprocess.CompletedProcess[str]:
        started.append(words)
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert demo.main() == 0
    printed = [line[2:] for line in capfd.readouterr().out.splitlines() if line.startswith("$ ")]
    assert len(printed) == len(started) == 2
    for line, words in zip(printed, started, strict=True):
        assert line in commands()
        shown = line.split()[1:]
        assert words[-len(shown) :] == shown


def test_a_chat_line_composes() -> None:
    for command in (c for c in commands() if "magnum_train.chat" in c):
        words = shlex.split(command)[1:]
        environment = os.environ | {"PYTHONPATH": str(HOME)}
        done = subprocess.run(
            [sys.executable, *words, "--cfg", "job"],
            cwd=HOME, env=environment, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "weights:" in done.stdout


def test_the_table_names_settings_that_exist_with_their_defaults() -> None:
    rows = re.findall(r"^\| `([a-z_.]+)` \| `([^`]*)` \|", README, re.MULTILINE)
    assert len(rows) >= 10
    keys, defaults = set(setting_keys(TrainConfig)), flat(TrainConfig())
    for key, default in rows:
        assert key in keys
        assert default == str(defaults[key]) if key in defaults else default == "{}", key


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(HOME)))
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target).exists(), target


def test_constraints_pin_what_the_project_needs() -> None:
    pins = dict(
        line.split("==") for line in (HOME / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    )
    assert pins["torch"] == "2.13.0"
    text = (HOME / "pyproject.toml").read_text()
    names = re.findall(r'^    "([A-Za-z0-9_-]+)[><=]', text, re.MULTILINE)
    pinned = {name.lower().replace("_", "-") for name in pins}
    assert {"torch", "hydra-core", "transformers"} <= {name.lower() for name in names}
    assert {name.lower().replace("_", "-") for name in names} <= pinned
