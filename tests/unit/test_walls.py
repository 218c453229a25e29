"""The walls between the packages: who may import what, and where the outside is touched."""

import ast
import sys
from pathlib import Path

import pytest

HOME = Path(__file__).parents[2]
ALLOWED = {
    "model": {"model", "torch", "jaxtyping", "safetensors", "flash_attn", "triton"},
    "data": {"data", "torch", "numpy", "tokenizers", "datasets", "pyarrow", "jaxtyping", "rensa"},
    "magnum_train": {
        "magnum_train",
        "model",
        "data",
        "torch",
        "hydra",
        "omegaconf",
        "rich",
        "tensorboard",
        "numpy",
        "huggingface_hub",
        "jaxtyping",
        "torchao",  # an extra, imported where it is asked for
        "triton",
    },
}


def imports(file: Path) -> set[str]:
    """Top-level names of the packages that a file imports, anywhere in it; the standard library left out."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found.add((node.module or "").split(".")[0])
    return found - set(sys.stdlib_module_names)


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_what_it_may_know(package: str) -> None:
    for file in (HOME / package).glob("*.py"):
        assert imports(file) <= ALLOWED[package], file


def test_hydra_is_imported_in_one_file() -> None:
    users = {f.name for f in (HOME / "magnum_train").glob("*.py") if imports(f) & {"hydra", "omegaconf"}}
    assert users == {"config.py"}


def test_the_environment_is_read_in_one_file() -> None:
    for file in [f for package in ALLOWED for f in (HOME / package).glob("*.py")]:
        text = file.read_text().replace('os.environ["HYDRA_FULL_ERROR"] = "1"', "")  # set, not read
        assert file.name == "distributed.py" or not ("environ" in text.replace("environment", "") or "getenv" in text)


def test_the_model_knows_no_ranks_and_the_data_no_devices() -> None:
    for file in (HOME / "data").glob("*.py"):
        assert "torch.distributed" not in file.read_text(), file
    users = {f.name for f in (HOME / "model").glob("*.py") if "torch.distributed" in f.read_text()}
    assert users <= {"hf.py"}  # a DTensor receives its slice of a loaded weight


def test_no_file_of_ours_bears_a_standard_library_name() -> None:
    names = {f.stem for package in ALLOWED for f in (HOME / package).glob("*.py")} - {"__init__"}
    assert not names & set(sys.stdlib_module_names)


@pytest.mark.parametrize("name", ["data", "model"])
def test_a_strange_package_of_our_name_is_named_at_start(name: str, tmp_path: Path) -> None:
    import subprocess

    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}]; sys.path.append({str(HOME)!r}); import magnum_train"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode != 0
    assert f"`import {name}` finds {tmp_path / name}" in done.stderr


def test_a_folder_called_data_where_one_works_does_no_harm(tmp_path: Path) -> None:
    import subprocess

    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "my.jsonl").write_text("")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import importlib.util as u;"
        f"spec = u.spec_from_file_location('magnum_train', {str(HOME / 'magnum_train' / '__init__.py')!r});"
        "spec.loader.exec_module(u.module_from_spec(spec)); import data; print(data.__file__)"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(HOME / "data" / "__init__.py")
