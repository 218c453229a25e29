"""What every test shares: a reason printed for what cannot run here, and quiet, equal thread settings."""

import signal

import pytest
import torch


def pytest_configure() -> None:
    """Let SIGINT reach the programs that tests start, also where the tests run in a shell's background.

    There it is ignored, children inherit that, and a run respects it.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests, with the reason, where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))
