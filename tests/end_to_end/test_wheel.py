"""The wheel is whole: installed in an empty folder it composes its configuration and trains."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from test_command_line import program

from tiny_runs import TINY_MODEL, metrics

HOME = Path(__file__).parents[2]


@pytest.mark.slow  # builds, installs and trains, which is what it is about
def test_the_wheel_trains_from_an_empty_folder(tmp_path: Path) -> None:
    tree, site, work = tmp_path / "tree", tmp_path / "site", tmp_path / "work"
    tree.mkdir()
    work.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(HOME / name, tree)
    for name in ("magnum_train", "model", "data", "conf"):
        shutil.copytree(HOME / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    built = subprocess.run(
        [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(tmp_path), str(tree)],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    [wheel] = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in ("magnum_train", "model", "data", "conf"):
        here = {
            f.relative_to(HOME).as_posix() for f in (HOME / name).rglob("*") if f.suffix in (".py", ".yaml", ".jsonl")
        }
        assert here <= names
    assert {"magnum_train/py.typed", "model/py.typed", "data/py.typed"} <= names
    assert not any(name.startswith(("tests", "docs", "benchmarks")) for name in names)

    installed = subprocess.run(
        [*pip, "install", "--quiet", "--no-deps", "--no-index", "--target", str(site), str(wheel)],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert installed.returncode == 0, installed.stderr
    where = "import conf, data, magnum_train, model; print(*(m.__file__ for m in (conf, data, magnum_train, model)))"
    found = program(work, "-c", where, path=site).stdout.split()
    assert [Path(file).parent.parent for file in found] == [site] * 4
    line = [*TINY_MODEL[:-1], "train.max_steps=2", "data.pack_tokens=1152", "train.tokens_per_step=2304", "run_dir=run"]
    done = program(work, "-m", "magnum_train.train", "experiment=demo", *line, path=site)
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in metrics(work / "run")] == [1, 2]
    assert sorted(entry.name for entry in work.iterdir()) == ["prepared", "run"]
