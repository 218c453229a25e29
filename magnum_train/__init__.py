"""magnum_train: full-parameter conversation fine-tuning of Mistral-Nemo.

This package brings `model` (the network and its loss) and `data` (conversations to packs) together under a
configuration and a process group. Start reading at `train.py`.
"""

import importlib.util
import sys
from pathlib import Path


def _check_neighbours() -> None:
    """Stop at once where `import data` or `import model` would find somebody else's package.

    Both names are common. A stray folder or installed package of that name would otherwise fail much later
    and in a way that points elsewhere.
    """
    home = Path(__file__).resolve().parent.parent
    if str(home) not in sys.path:
        # A folder called data, as most people have one where they work, would hide ours where the project is installed
        # in place. A package of that name is still refused below: somebody may mean it.
        sys.path.append(str(home))
    for name in ("model", "data", "conf"):
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).resolve().parent if spec and spec.origin else None
        if found != home / name:
            raise ImportError(
                f"`import {name}` finds {found or 'nothing'}, expected {home / name}. "
                f"Start from another folder, or take the other package called {name!r} off PYTHONPATH."
            )


_check_neighbours()
