"""What a step cost and gave, to metrics.jsonl, TensorBoard and the terminal.

`metrics.jsonl` is the record; TensorBoard's curves are made from its rows and nothing else. So on resume the record
is cut back to the checkpoint's step and the curves are written anew from it: every step stands once in both.
"""

import contextlib
import errno
import json
import math
import os
import shutil
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from magnum_train.errors import RunError
from model.hf import sync_to_disk

PEAK_TFLOPS = {
    **{"H100 PCIe": 756.0, "H100 NVL": 835.0, "H200 NVL": 835.0},
    **{"H100": 989.0, "H200": 989.0, "A100": 312.0, "B200": 2250.0},
}
"""Dense bf16 peak of one device by a part of its name, TFLOP/s; the first that fits (NVIDIA's data sheets)."""


def peak_flops(device: torch.device, configured_tflops: float | None) -> float | None:
    """Peak FLOP/s of a device: as configured, else as known for the GPU, else None."""
    if configured_tflops is not None:
        return configured_tflops * 1e12
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak * 1e12 for part, peak in PEAK_TFLOPS.items() if part in name), None)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory that this rank has held: GPU allocations, or the process's resident set on CPU, GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes there and KiB here
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def rows(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a metrics.jsonl."""
    with file.open() as lines:
        yield from map(json.loads, lines)


def whole_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a record as they stand in the file and as objects, up to one that was cut short."""
    if not file.exists():
        return
    for line in file.read_text().splitlines(keepends=True):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            return  # only the last line can be torn, since rows are appended whole and in order
        if not isinstance(row, dict):
            return
        yield line if line.endswith("\n") else line + "\n", row


def cut_back(file: Path, step: int, owed: Collection[str] = ()) -> None:
    """Drop the rows after a step, and a last one that was cut short when the process died.

    Args:
        file: A record with one object a line.
        step: The last step whose rows stay.
        owed: What is made up for at that very step, so that an earlier try's rows go too: validation, samples.
    """
    if not file.exists():
        return
    made_anew = {"validation_loss" for what in owed if what == "validation"} | {"reply" for w in owed if w == "samples"}
    kept = [
        line
        for line, row in whole_rows(file)
        if row["step"] < step or (row["step"] == step and not made_anew & row.keys())
    ]
    aside = file.with_suffix(".tmp")
    with aside.open("w") as out:
        out.write("".join(kept))
        out.flush()
        os.fsync(out.fileno())  # rows before a visible checkpoint stay on disk
    aside.replace(file)


def _finite(value: Any) -> Any:
    """A value as JSON can hold it: what is not finite is null, inside a map too."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def validation_losses(run_dir: Path) -> dict[int, float]:
    """A run's validation losses by step."""
    found = [row for _, row in whole_rows(run_dir / "metrics.jsonl") if row.get("validation_loss") is not None]
    return {row["step"]: row["validation_loss"] for row in found}


class Lines:
    """A file that takes lines whole or not at all. Those that a full disk does not take wait for the next one.

    A save may fill a disk for a moment, and that is no reason to end a run. The thread that saves may call `sync` while
    lines are added.

    Args:
        file: Appended to.
    """

    def __init__(self, file: Path) -> None:
        self._path, self._waiting, self._lock = file, deque[bytes](), threading.Lock()

    def add(self, row: Mapping[str, Any]) -> None:
        """Append an object as JSON, if that can be done now.

        Args:
            row: What is not finite in it becomes null, as JSON asks.
        """
        line = json.dumps({key: _finite(value) for key, value in row.items()}, allow_nan=False).encode() + b"\n"
        with self._lock, contextlib.suppress(OSError):  # `sync` raises it, before anything relies on the lines
            self._waiting.append(line)
            self._settle()

    def sync(self) -> None:
        """Have every line on disk.

        Raises:
            RunError: They cannot be written.
        """
        try:
            with self._lock:
                self._settle()
            if self._path.exists():
                sync_to_disk(self._path)
        except OSError as error:
            found = error.strerror or str(error)
            raise RunError(str(self._path), found, "a file that can be written", "Free some of the disk.") from error

    def _settle(self) -> None:
        while self._waiting:
            with self._path.open("ab", buffering=0) as file:
                start = file.tell()
                if (done := file.write(self._waiting[0])) != len(self._waiting[0]):
                    file.truncate(start)  # what follows a torn line could not be read
                    raise OSError(errno.ENOSPC, f"only {done} of {len(self._waiting[0])} bytes written")
            self._waiting.popleft()


class Metrics:
    """The record of a run, written by rank 0 alone; on other ranks every method does nothing.

    Args:
        run_dir: The run's folder.
        config_text: The resolved configuration, shown as text.
        settings: Dotted key to value, for TensorBoard's table of runs.
        is_main: Whether this is rank 0.
    """

    def __init__(self, run_dir: Path, config_text: str, settings: dict[str, Any], *, is_main: bool) -> None:
        self._lines: Lines | None = None
        self._events: _Events | None = None
        self._path, self._tensorboard = run_dir / "metrics.jsonl", run_dir / "tensorboard"
        self._text, self._settings, self._curves = config_text, settings, False
        if not is_main:
            return
        self._lines = Lines(self._path)
        self._begin_curves()

    def _begin_curves(self) -> None:
        """Draw all curves from the record."""
        shutil.rmtree(self._tensorboard, ignore_errors=True)
        self._events = _Events(self._tensorboard)
        self._curves = True
        self._table(self._settings)
        self._text_of("config", f"```yaml\n{self._text}\n```", None, None)
        for _, row in whole_rows(self._path):
            self._draw(row)

    def _add(self, summary: Any, step: int | None, when: float | None) -> None:
        assert self._events is not None
        self._events.add(summary, step, when)

    def _table(self, settings: dict[str, Any]) -> None:
        from torch.utils.tensorboard.summary import hparams

        values = {key: v if isinstance(v, (bool, int, float)) else str(v) for key, v in settings.items()}
        for summary in hparams(values, {"train/loss": None, "validation/loss": None}):  # type: ignore[no-untyped-call]
            self._add(summary, None, None)

    def _text_of(self, tag: str, words: str, step: int | None, when: float | None) -> None:
        from torch.utils.tensorboard.summary import text

        self._add(text(tag, words), step, when)  # type: ignore[no-untyped-call]

    def _draw(self, row: dict[str, Any]) -> None:
        """Put one row's numbers and texts on the curves, at the time that it bears."""
        from torch.utils.tensorboard.summary import scalar

        step, when = row["step"], row["time"]
        if "reply" in row:
            self._text_of(f"samples/{row['sample']}", f"**{row['prompt']}**\n\n{row['reply']}", step, when)
            return
        kind = "validation" if "validation_loss" in row else "checkpoint" if "save_seconds" in row else "train"
        for key, value in row.items():
            name = key.removeprefix("validation_").removeprefix("save_")
            parts = {f"{name}/{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
            for part, number in parts.items():
                if part not in ("step", "time") and isinstance(number, (int, float)) and not isinstance(number, bool):
                    self._add(scalar(f"{kind}/{part}", number), step, when)  # type: ignore[no-untyped-call]

    def write(self, row: dict[str, Any]) -> None:
        """Record one row with the time, in seconds since 1970; what is not finite becomes null, as JSON asks."""
        if self._lines is None:
            return
        row = {"time": time.time()} | {key: _finite(value) for key, value in row.items()}
        self._lines.add(row)
        if self._curves:
            with self._curves_may_fail():
                self._draw(row)

    def sync(self) -> None:
        """Have every row on disk, before a checkpoint that follows them becomes visible; by whichever thread.

        Raises:
            RunError: They cannot be written.
        """
        if (lines := self._lines) is not None:
            lines.sync()

    def draw(self) -> None:
        """Draw the curves anew, where that has failed since the last time."""
        if self._lines is not None:
            with self._curves_may_fail():
                if not self._curves:
                    self._begin_curves()

    @contextlib.contextmanager
    def _curves_may_fail(self) -> Iterator[None]:
        """Curves that cannot be written are given up, until `draw` begins them anew from the record."""
        try:
            yield
        except OSError:
            self._curves = False
            if self._events is not None:
                self._events.close()

    def close(self) -> None:
        """End the record."""
        if self._lines is not None:
            self.draw()
            if self._events is not None:
                self._events.close()
            self.sync()
            self._lines = None


class _Events:
    """A file of TensorBoard's. Its own writer has a thread, in which an error is a traceback and nobody's.

    Args:
        folder: Is made.
    """

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter  # 2.6 s with what it needs; rank 0 alone pays

        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.0"
        self._event, self._file = Event, (folder / name).open("ab", buffering=0)
        self._records = RecordWriter(self._file)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def add(self, summary: Any, step: int | None, when: float | None) -> None:
        """Append one summary, at a step and a time in seconds since 1970; now where there is none."""
        self._write(self._event(summary=summary, step=step or 0, wall_time=time.time() if when is None else when))

    def _write(self, event: Any) -> None:
        self._records.write(event.SerializeToString())

    def close(self) -> None:
        """End the file."""
        self._file.close()


_PREPARING_SECONDS = 10
"""Between two lines about the preparation, where there is no terminal for a bar."""


class Terminal:
    """What a person sees of a run: lines, and a live bar where there is a terminal. Rank 0 alone speaks."""

    def __init__(self, *, is_main: bool) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=not is_main)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not (is_main and self._console.is_terminal),
        )
        self._task: Any = None
        self._total = 0

    def say(self, text: str) -> None:
        """Print text as it is, above the bar."""
        self._console.print(text, markup=False)

    def begin(self, step: int, total: int) -> None:
        """Show the bar at a step."""
        self._total = total
        self._task = self._progress.add_task("step", completed=step, total=total, loss="–", speed="–")
        self._progress.start()

    def step(self, row: dict[str, Any], seconds_left: float) -> None:
        """Show one step; without a terminal a line for about every fiftieth part of the run."""
        loss = f"{row['loss']:.4f}" + ("" if row["applied"] else ", update refused")
        speed = f"{row['tokens_per_second']:,.0f}"
        self._progress.update(self._task, completed=row["step"], loss=loss, speed=speed)
        every = max(1, self._total // 50)
        if self._progress.disable and (row["step"] % every == 0 or row["step"] == self._total):
            left = f"{int(seconds_left) // 60}:{int(seconds_left) % 60:02d}"
            self.say(f"step {row['step']}/{self._total}  loss {loss}  {speed} tokens/s  {left} left")

    def end(self) -> None:
        """Take the bar down."""
        self._progress.stop()

    @contextlib.contextmanager
    def preparing(self) -> Iterator[Callable[[str, int, int | None], None]]:
        """Show how far each source is while conversations are prepared: a bar each, or a line every ten seconds.

        Yields:
            To be told a source's name, how far it is and how far it goes; None where nobody knows.
        """
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        bars = Progress(
            *columns, TextColumn("left"), TimeRemainingColumn(), console=self._console, disable=self._progress.disable
        )
        tasks: dict[str, TaskID] = {}
        begun: dict[str, float] = {}
        said = time.perf_counter()

        def show(source: str, done: int, total: int | None) -> None:
            nonlocal said
            now = time.perf_counter()
            begun.setdefault(source, now)
            if source not in tasks:
                tasks[source] = bars.add_task(f"preparing {source}", total=total)
            bars.update(tasks[source], completed=done)
            if bars.disable and now - said > _PREPARING_SECONDS:
                said = now
                left = (now - begun[source]) * (total - done) / done if total else 0.0
                rest = f"{done / total:.0%}, {int(left) // 60}:{int(left) % 60:02d} left" if total else f"{done:,} rows"
                self.say(f"preparing {source}: {rest}")

        with bars:
            yield show
