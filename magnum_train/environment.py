"""What ran, on what, from which commit: the facts behind a run's numbers."""

import importlib.metadata
import platform
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

_PACKAGES = (
    "magnum-train",
    "torch",
    "datasets",
    "tokenizers",
    "hydra-core",
    "safetensors",
    "numpy",
    "flash-attn",
)


def _git(*arguments: str) -> str | None:
    """Git's answer about the project's own checkout; None where this code does not stand in it.

    Installed in a virtual environment inside another project, it must not record that project's changes.
    """
    home = Path(__file__).resolve().parent.parent
    if not (home / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(home), *arguments], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def environment(world_size: int, device: torch.device) -> dict[str, Any]:
    """Versions, machine, commit and uncommitted changes, as a JSON object."""
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    versions["torch"] = torch.__version__  # says which build it is, as +cpu
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "world_size": world_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted": _git("diff", "HEAD"),
    }
