"""The flight recorder: the rows, losses and norms of the last steps, on disk however a run ends.

    RUN/flight/rank-00000.jsonl          rank 0's newest steps, at most 50
               rank-00000.before.jsonl   the 50 before them
               ended-001/                the same of an earlier start that did not end as it should

Nobody can write at the moment a process is killed. So each rank writes at every step, a file of its own, without
asking another rank; a whole start's record is put together when it is read. Lines reach the kernel, which survives the
process; they are not forced to the disk, which would survive the machine and cost milliseconds a step. Owns these
files. Knows nothing of what goes wrong, nor when.
"""

import contextlib
import errno
import json
import math
import re
import shutil
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, stack

from data import PackedBatch
from data.loader import StepData
from magnum_train.errors import RunError
from magnum_train.metrics import whole_rows

SEGMENT_STEPS = 50
"""Steps of a file, after which the next one begins and the last but one is gone: from 50 to 100 are on disk."""

KEPT_ENDED = 5
"""Starts that did not end as they should whose records are kept."""


class FlightRecorder:
    """One rank's record of its last steps. Files of an earlier start must be out of the way (`set_aside`).

    Args:
        folder: Where all ranks' files lie; made with the first step.
        rank: This rank.
        sources: Names of the sources, by number.
    """

    def __init__(self, folder: Path, rank: int, sources: Sequence[str]) -> None:
        self._folder, self._sources = folder, sources
        self._file = folder / f"rank-{rank:05d}.jsonl"
        self._before = folder / f"rank-{rank:05d}.before.jsonl"
        self._written = 0  # lines of the newest file
        self._waiting: deque[bytes] = deque()  # lines that a full disk did not take
        self._step, self._attempt = 0, 0

    def record(self, row: dict[str, Any], data: StepData, row_losses: list[Tensor]) -> None:
        """Write down a step, on this rank's part of the disk before the next one begins.

        A full disk is not the end of a run: what cannot be written waits for the next step. After a roll-back the same
        steps come again, as another attempt. Of ranks that share a pack, the one that has its beginning names its rows.

        Args:
            row: The step's row for metrics.jsonl; step, loss, grad_norm, lr, applied and step_seconds are taken.
            data: The step's, on the host.
            row_losses: For each of this rank's micro-batches Σ weight × cross-entropy and Σ weight of each document
                slot of the whole pack, [2, N], from which the host reads.

        Raises:
            RunError: Nothing could be written for 50 steps.
        """
        if row["step"] <= self._step:
            self._attempt += 1
        self._step = row["step"]
        losses = stack(row_losses).cpu().numpy()
        entry = {
            "step": row["step"],
            "attempt": self._attempt,
            "loss": _number(row["loss"]),
            "grad_norm": _number(row["grad_norm"]),
            "lr": row["lr"],
            "applied": row["applied"],
            "seconds": row["step_seconds"],
            "packs": [
                self._documents(batch, data.rows[number], own)
                for batch, number, own in zip(data.micro_batches, data.packs, losses, strict=True)
                if number >= 0 and batch.part == 0
            ],
        }
        self._waiting.append(json.dumps(entry).encode() + b"\n")
        try:
            while self._waiting:
                self._write(self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            if len(self._waiting) >= SEGMENT_STEPS:
                raise RunError(
                    str(self._file), f"{error.strerror} for {SEGMENT_STEPS} steps", "a folder that can be written"
                ) from error

    def close(self, *, normal: bool) -> None:
        """Leave the record where it is after an end that was not normal; nobody needs that of a normal one.

        Args:
            normal: Whether the run is complete, or has saved and can go on.
        """
        if normal:
            self._file.unlink(missing_ok=True)
            self._before.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # other ranks' files are in it, or earlier starts', or it never was
                self._folder.rmdir()

    def _documents(
        self, batch: PackedBatch, rows: NDArray[np.int64], losses: NDArray[np.float64]
    ) -> list[list[str | int | float | None]]:
        """A pack's documents: source, row, tokens and loss; None where a document has no weight and so no loss."""
        columns = rows.tolist(), batch.lengths, losses.T.tolist()  # the last goes on over padding
        return [
            [self._sources[source], row, tokens, _number(total / weight) if weight else None]
            for (source, row), tokens, (total, weight) in zip(*columns, strict=False)
        ]

    def _write(self, line: bytes) -> None:
        """Append a line whole or not at all, to the next file where the newest is full."""
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._written == SEGMENT_STEPS:
            self._file.replace(self._before)
            self._written = 0
        with self._file.open("ab", buffering=0) as file:
            start = file.tell()
            if (done := file.write(line)) != len(line):
                # The disk is full. What follows a torn line could not be read.
                file.truncate(start)
                raise OSError(errno.ENOSPC, f"only {done} of {len(line)} bytes written")
        self._written += 1


def set_aside(folder: Path) -> Path | None:
    """Move the record of an earlier start out of the way, and keep the newest five. One rank, before any records.

    A normal end leaves no record behind. So where there is one, the start before this ended as it should not.

    Args:
        folder: Where ranks record.

    Returns:
        The folder with that start's record; None where there is none.
    """
    left = sorted(folder.glob("rank-*.jsonl"))
    if not left:
        return None
    ended = _ended(folder)
    aside = folder / f"ended-{max(ended, default=0) + 1:03d}"
    aside.mkdir()
    for file in left:
        file.rename(aside / file.name)
    for number in sorted(ended)[: max(0, len(ended) + 1 - KEPT_ENDED)]:
        shutil.rmtree(ended[number])
    return aside


def read(folder: Path) -> list[dict[str, Any]]:
    """Put the ranks' records of one start together.

    Args:
        folder: RUN/flight of a run that goes on or has just ended, or one of its ended-… folders.

    Returns:
        The steps in the order in which they were trained, as they stand in the files (numbers that are not finite are
        strings), with the packs of all ranks together, and under `ranks` those that have recorded the step: a rank that
        died in the last one has not. Values that ranks have in common are the first one's.
    """
    steps: dict[tuple[int, int], dict[str, Any]] = {}
    for file in sorted(folder.glob("rank-*.jsonl")):
        rank = int(file.name.split(".")[0].removeprefix("rank-"))
        for _, row in whole_rows(file):
            step = steps.setdefault((row["attempt"], row["step"]), row | {"packs": [], "ranks": []})
            step["packs"] += row["packs"]
            step["ranks"].append(rank)
    return [steps[key] for key in sorted(steps)]


def _ended(folder: Path) -> dict[int, Path]:
    """Folders of starts that did not end as they should, by number."""
    found = ((re.fullmatch(r"ended-(\d+)", path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in found if match}


def _number(value: float) -> float | str:
    """A number as JSON can hold it, to the seven digits that a float32 has; one that is not finite is its name."""
    return float(f"{value:.7g}") if math.isfinite(value) else str(value)
