"""A function of the user's own by dotted name, and the digest of the file that it stands in.

Owns how such a name becomes a function, and what is said where it does not. Knows not what the function is for.
"""

import difflib
import hashlib
import importlib
import inspect
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from data.errors import DataError


@dataclass(frozen=True)
class Dotted:
    """A function and what it is known by.

    Args:
        name: package.module.function, as the user wrote it.
        function: what stands there.
        digest: sha256 of the file that the function stands in, in hexadecimal; where the name's own module took it
            from elsewhere, of both files. What these files import is not in it.
    """

    name: str
    function: Callable[..., Any]
    digest: str


def load_dotted(name: str, key: str) -> Dotted:
    """Import a module and take a function from it.

    Args:
        name: package.module.function; the module is found as Python finds any, so in the current folder too when
            a program is run by `python -m`.
        key: the configuration key, for messages.

    Returns:
        The function and its digest.

    Raises:
        DataError: the name has no dot, its module is not there or fails when imported, or holds no such function;
            or there is no source file to tell the function by.
    """
    found = f"{key} is {name!r}"
    module_name, _, attribute = name.rpartition(".")
    if not module_name or not all(part.isidentifier() for part in name.split(".")):
        raise DataError(f"{found}; expected package.module.function, a function's dotted name")
    module = _imported(module_name, found)
    file = getattr(module, "__file__", None)  # folders without __init__.py and built-in modules have none
    function = getattr(module, attribute, None)
    if function is None:
        near = difflib.get_close_matches(attribute, [n for n, v in vars(module).items() if inspect.isfunction(v)], 1)
        hint = f" (did you mean {module_name}.{near[0]}?)" if near else ""
        raise DataError(f"{found}; {file or module_name} has no {attribute!r}; expected a function defined there{hint}")
    if not inspect.isfunction(function):
        raise DataError(
            f"{found}, which is no function but of type {type(function).__name__}; expected one written with def in "
            "a file of Python"
        )
    return Dotted(name, function, _digest(file, function, found))


def _imported(name: str, found: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if name != missing and not name.startswith(f"{missing}."):
            raise DataError(
                f"{found}, and {name} imports {missing!r}, which is not there{_last_line(error)}; expected a module "
                "that can be imported: install what it needs"
            ) from error
        raise DataError(
            f"{found}: no module named {missing!r}; expected package.module.function with a module in the current "
            "folder, on PYTHONPATH or installed (methods and nested functions have no such name)"
        ) from error
    except (Exception, SystemExit) as error:  # whatever the user's file does when imported
        raise DataError(
            f"{found}, and importing {name} fails: {type(error).__name__}: {error}{_last_line(error)}; expected a "
            "module that can be imported"
        ) from error


def _last_line(error: BaseException) -> str:
    """Where it happened, if anywhere in the user's own files; the import machinery's frames are not."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen ")]
    frames = [f for f in frames if f.filename not in (__file__, importlib.__file__)]
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""


def _digest(file: str | None, function: Callable[..., Any], found: str) -> str:
    # A function that its module imported from another, or that another's decorator wraps, depends on both files.
    codes = [inspect.getsourcefile(part) for part in (function, inspect.unwrap(function))]
    files = dict.fromkeys((file, *codes))
    try:
        return hashlib.sha256(b"".join(Path(str(file)).read_bytes() for file in files)).hexdigest()
    except OSError as error:
        raise DataError(
            f"{found}, whose source cannot be read ({error.filename}: {error.strerror}); expected a file of Python, "
            "whose contents tell whether prepared data is still good"
        ) from error
