"""A dotted name becomes the function that it names, known by its file; anything else is said with the remedy."""

import hashlib
import importlib
import json
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data import DataError
from data.dotted import load_dotted

KEY = "data.sources.x.form"
Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Write a file of Python where modules are found; what was imported from there before is forgotten."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def forget() -> None:
        for name in [name for name in sys.modules if name.startswith("own_")]:
            del sys.modules[name]

    def write_file(path: str, text: str) -> Path:
        forget()
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        importlib.invalidate_caches()
        return file

    yield write_file
    forget()


def sha256(*files: Path) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def test_a_function_is_found_and_known_by_the_contents_of_its_file(write: Write) -> None:
    text = "def double(row):\n    return 2 * row\n"
    file = write("own_forms/rows.py", text)
    found = load_dotted("own_forms.rows.double", KEY)
    assert found.name == "own_forms.rows.double"
    assert found.function(4) == 8
    assert found.digest == sha256(file)
    assert pickle.loads(pickle.dumps(found)) == found  # it goes to worker processes
    write("own_forms/rows.py", text + "\n")
    assert load_dotted("own_forms.rows.double", KEY).digest == sha256(file) != found.digest


def test_a_function_from_elsewhere_is_known_by_both_files(write: Write) -> None:
    wrapper = write(
        "own_wrapper.py",
        "import functools\n\ndef wrapped(f):\n    @functools.wraps(f)\n    def inner(row):\n        return f(row)\n"
        "    return inner\n",
    )
    inner = write("own_inner.py", "from own_wrapper import wrapped\n\n@wrapped\ndef form(row):\n    return row\n")
    outer = write("own_outer.py", "from own_inner import form\n")
    assert load_dotted("own_inner.form", KEY).digest == sha256(inner, wrapper)
    assert load_dotted("own_outer.form", KEY).digest == sha256(outer, wrapper, inner)
    assert load_dotted("json.loads", KEY).digest == sha256(Path(json.__file__))


@pytest.mark.parametrize("name", ["form", ".form", "own.", "own..form", "own/form.py", "own.my form", "", "own.form()"])
def test_what_is_no_dotted_name_is_refused(name: str) -> None:
    with pytest.raises(DataError, match=r"expected package\.module\.function, a function's dotted name") as caught:
        load_dotted(name, KEY)
    assert str(caught.value).startswith(f"{KEY} is {name!r}; ")


REFUSED = [
    ("nowhere.form", "", "nowhere.form': no module named 'nowhere'; expected package.module.function with a module in"),
    ("own_bad.sub.form", "", "no module named 'own_bad.sub'; expected"),
    ("own_bad.Class.method", "class Class:\n    def method(self): ...\n", "no module named 'own_bad.Class'; expected"),
    (
        "own_bad.frm",
        "def form(row): ...\n",
        "own_bad.py has no 'frm'; expected a function defined there (did you mean own_b",
    ),
    ("own_folder.form", "", "own_folder.form'; own_folder has no 'form'; expected a function defined there"),
    ("sys.form", "", "sys.form'; sys has no 'form'; expected a function defined there"),
    ("own_bad.form", "form = 3\n", "which is no function but of type int; expected one written with def"),
    ("own_bad.Form", "class Form: ...\n", "which is no function but of type type; expected"),
    ("math.sqrt", "", "which is no function but of type builtin_function_or_method; expected"),
    (
        "own_bad.form",
        "x = 1\nimport own_missing.part\n",
        "and own_bad imports 'own_missing', which is not there (FILE, line 2); expected a module that can be imported",
    ),
    ("own_bad.form", "\n\nx = 1 / 0\n", "importing own_bad fails: ZeroDivisionError: division by zero (FILE, line 3)"),
    ("own_bad.form", "def form(:\n", "importing own_bad fails: SyntaxError: invalid syntax (own_bad.py, line 1); exp"),
    ("own_bad.form", "import sys\nsys.exit(0)\n", "importing own_bad fails: SystemExit: 0 (FILE, line 2); expected"),
    (
        "own_bad.form",
        "from json import nothing\n",
        "importing own_bad fails: ImportError: cannot import name 'nothing'",
    ),
    ("own_bad.form", "exec('def form(row): ...')\n", "whose source cannot be read (<string>: No such file"),
]


@pytest.mark.parametrize(("name", "text", "reason"), REFUSED)
def test_a_name_that_leads_to_no_function_is_refused_with_its_place(
    name: str, text: str, reason: str, write: Write
) -> None:
    write("own_folder/part.py", "")
    file = write("own_bad.py", text)
    with pytest.raises(DataError) as caught:
        load_dotted(name, KEY)
    assert str(caught.value).startswith(f"{KEY} is {name!r}")
    assert reason.replace("FILE", str(file)) in str(caught.value)
