"""What one GPU gives: its tests first, then the cost of a training step by pack, document length and kernel.

    python benchmarks/gpu.py OUT_FOLDER [--minutes 8] [--layers 4] [--model nemo]

Writes `gpu.json` (the record, with every raw timing), `gpu.md` (made from the record by `markdown`) and
`gpu_tests.log` into the folder. Whatever could not be run stands there with its reason. Without a CUDA device
`--model tiny` measures a small model on the CPU, which shows that the parts fit together and nothing more.
"""

import argparse
import functools
import gc
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from xml.etree import ElementTree

# The command stands alone, in a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from data import Example, PackedBatch
from data.batch import assemble
from magnum_train import distributed, metrics
from magnum_train.environment import environment
from magnum_train.optim import build_optimizer
from magnum_train.parallelize import build
from magnum_train.step import train_step
from model import Transformer, TransformerConfig
from model.attention import BACKENDS, attention, choose_backend
from model.flops import parameter_count, train_flops

if TYPE_CHECKING:  # the type alone: the module imports Hydra, which a GPU machine may lack
    from magnum_train.config import OptimConfig

ROOT = Path(__file__).resolve().parent.parent

WARMUP, TIMED = 3, 7
"""Steps before the clock counts, and steps that count."""

TESTS_SHARE, STEPS_SHARE, LAST_SHARE = 0.4, 0.85, 0.95
"""Shares of the time after which tests are stopped, no step is begun and no attention timing is begun."""

SLOTS = 128
"""Documents that a pack has room for, as `data.pack_documents` has it; fixes the shape of cu_seqlens."""

SEED = 0

OUT_OF_TIME = "time: the time given was used up before it ended"


@dataclass(frozen=True)
class Grid:
    """What is measured: a network and the packs it is given."""

    config: TransformerConfig
    pack_tokens: tuple[int, ...]
    document_lengths: tuple[int | None, ...]
    """Tokens of each document; None: one document fills the pack."""


GRIDS = {
    "nemo": Grid(
        TransformerConfig(
            dim=5120, n_layers=40, n_heads=32, n_kv_heads=8, head_dim=128, hidden_dim=14336, vocab_size=131072
        ),
        (4096, 8192, 16384),
        (512, 2048, None),
    ),
    "tiny": Grid(
        TransformerConfig(dim=128, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=48, hidden_dim=384, vocab_size=2048),
        (256, 512),
        (64, None),
    ),
}


@dataclass(frozen=True)
class Optimizer:
    """What `build_optimizer` reads. The rate of 0 lets an update do all its work and move nothing.

    So every cell of the table sees the same weights, and on the same pack the kernels must agree on the loss.
    """

    lr: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    decay_all: bool = False


class OutOfTimeError(Exception):
    """The time given is used up; what was under way is not measured."""


class Clock:
    """The time given, counted from here.

    Args:
        minutes: For everything together.
    """

    def __init__(self, minutes: float) -> None:
        self._seconds = minutes * 60
        self._started = time.monotonic()

    def left(self, share: float) -> float:
        """Seconds until this share of the time has passed."""
        return self._started + share * self._seconds - time.monotonic()

    def used(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    def check(self, share: float, needed: float = 0.0) -> None:
        """Go on, or raise `OutOfTimeError` where fewer seconds than needed are left of this share."""
        if self.left(share) <= needed:
            raise OutOfTimeError


class Record:
    """The record and its Markdown on disk, written anew after each part, so that nothing measured is lost.

    Args:
        folder: Where to.
        content: What the record holds; changed in place by those who measure.
        clock: Says how much of the time was used.
    """

    def __init__(self, folder: Path, content: dict[str, Any], clock: Clock) -> None:
        self.folder, self.content, self._clock = folder, content, clock

    def save(self) -> None:
        """Replace both files, each as a whole."""
        self.content["minutes_used"] = self._clock.used() / 60
        for name, text in (
            ("gpu.json", json.dumps(self.content, indent=1, allow_nan=False) + "\n"),
            ("gpu.md", markdown(self.content)),
        ):
            aside = self.folder / f".{name}.tmp"
            aside.write_text(text)
            aside.replace(self.folder / name)


def describe(error: BaseException) -> str:
    """An error's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def run_tests(log: Path, seconds: float) -> dict[str, Any]:
    """Run the GPU tests in a process of their own, so that a crash of theirs ends nothing else.

    Args:
        log: Receives their whole output.
        seconds: After which they are stopped.

    Returns:
        `status` (passed, failed, none ran, stopped, broken), `seconds`, `counts`, the log's last line as
        `summary`, and the names and reasons of what failed and of what was skipped.
    """
    command = ["-m", "pytest", "-m", "gpu", "tests/gpu", "-p", "no:cacheprovider", "--tb=short"]
    shapes_checked = importlib.util.find_spec("beartype") is not None
    if not shapes_checked:
        command += ["-o", "addopts=-ra --strict-markers"]
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, log.open("wb") as output:
        report = Path(scratch) / "report.xml"
        process = subprocess.Popen(
            [sys.executable, *command, f"--junitxml={report}"],
            cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(timeout=max(1.0, seconds))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that tests started
            process.wait()
            code = None
        suite = ElementTree.parse(report).getroot().find("testsuite") if report.exists() else None
    status = "stopped" if code is None else {0: "passed", 1: "failed", 5: "none ran"}.get(code, "broken")
    if suite is None and status != "stopped":
        status = "broken"  # Python ends with 1 too, where pytest cannot be imported
    lines = log.read_text(errors="replace").splitlines()
    result: dict[str, Any] = {
        "command": " ".join(["python", *command]),
        "status": status,
        "exit_code": code,
        "seconds": time.monotonic() - begin,
        "shapes_checked": shapes_checked,
        "summary": next((line for line in reversed(lines) if line.strip()), "").strip("= "),
        "counts": {},
        "failed": [],
        "skipped": [],
    }
    if suite is not None:
        counts = {k: int(suite.get(k, 0)) for k in ("tests", "failures", "errors", "skipped")}
        result["counts"] = counts
        if status == "passed" and counts["skipped"] == counts["tests"]:
            result["status"] = "none ran"
        for case in suite.iter("testcase"):
            name = f"{case.get('classname')}.{case.get('name')}"
            for part in case:
                kind = "skipped" if part.tag == "skipped" else "failed" if part.tag in ("failure", "error") else ""
                if kind:
                    reason = (part.get("message") or "").strip().splitlines()
                    result[kind].append({"test": name, "reason": reason[0] if reason else ""})
    return result


def tests_fine(tests: dict[str, Any], cuda: bool) -> bool:
    """Whether the GPU tests passed; that none ran will do only where there is no GPU."""
    return tests["status"] == "passed" or (tests["status"] == "none ran" and not cuda)


def random_pack(vocab_size: int, pack_tokens: int, document_length: int) -> PackedBatch:
    """A full pack of random documents, every token but a document's first with weight 1.

    Args:
        vocab_size: Ids are drawn from 0 up to it.
        pack_tokens: T.
        document_length: Tokens of each document, T at most; the last takes what remains.
    """
    generator = np.random.default_rng([SEED, pack_tokens, document_length])
    documents = []
    for start in range(0, pack_tokens, document_length):
        length = min(document_length, pack_tokens - start)
        weights = np.ones(length, np.float32)
        weights[0] = 0
        documents.append(Example(generator.integers(vocab_size, size=length, dtype=np.int32), weights))
    return assemble(documents, pack_tokens, SLOTS)


def synchronize(device: torch.device) -> None:
    """Wait for the device to finish."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    """Give back the memory that nothing holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Trainee:
    """The model and its optimizer, built when first needed and once more after a cell that failed.

    After an error in the middle of a step, sharded parameters may be left gathered and gradients half made,
    so such a model is not used again.
    """

    def __init__(self, config: TransformerConfig, ranks: distributed.Ranks, dtype: torch.dtype, clock: Clock) -> None:
        self._config, self._ranks, self._dtype, self._clock = config, ranks, dtype, clock
        self._build_seconds = 0.0
        self._built: tuple[Transformer, torch.optim.Optimizer] | None = None

    def get(self) -> tuple[Transformer, torch.optim.Optimizer]:
        """Model and optimizer, made by the trainer's own functions.

        Raises:
            OutOfTimeError: Too little time is left to build them again.
        """
        if self._built is None:
            self._clock.check(STEPS_SHARE, self._build_seconds)
            begin = time.monotonic()
            model = build(
                self._config,
                attention_backend="auto",
                mesh=self._ranks.mesh,
                device=self._ranks.device,
                compute_dtype=self._dtype,
                activation_checkpointing="none",
                reshard_after_forward=True,
                seed=SEED,
            )
            self._built = model, build_optimizer(model, cast("OptimConfig", Optimizer()))
            self._build_seconds = time.monotonic() - begin
        return self._built

    def drop(self) -> None:
        """Forget both."""
        self._built = None


def measure_step(row: dict[str, Any], grid: Grid, trainee: Trainee, device: torch.device, clock: Clock) -> None:
    """Time training steps on one pack, and enter the figures into the row.

    The clock runs from the pack on the host to the end of the update on the device, as in training, less the
    loader's own work.

    Args:
        row: `backend`, `pack_tokens` and `document_length` say what to measure.
        grid: Bears the network.
        trainee: Bears the model.
        device: Where.
        clock: Looked at before each step.

    Raises:
        OutOfTimeError: The time given is used up.
        RuntimeError: Among others, if a step's loss or gradient is not finite.
    """
    clock.check(STEPS_SHARE)
    free(device)  # here, since a device that an earlier error broke says so in every row
    model, optimizer = trainee.get()
    model.attention_backend = row["backend"]
    pack = random_pack(grid.config.vocab_size, row["pack_tokens"], row["document_length"])
    weight_sum = float(pack.weights.double().sum())
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(WARMUP + TIMED):
        clock.check(STEPS_SHARE)
        synchronize(device)
        begin = time.perf_counter()
        result = train_step(
            model, optimizer, [pack.to(device)],
            weight_sum=weight_sum, n_sources=1, lr=Optimizer.lr, max_grad_norm=1.0,
        )  # fmt: skip
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
    if not result.applied.item():
        raise RuntimeError(f"loss {result.loss.item()}, gradient norm {result.grad_norm.item()}: update refused")
    median = statistics.median(seconds[WARMUP:])
    flops = train_flops(grid.config, pack.lengths, len(pack.label_positions))
    peak = metrics.peak_flops(device, None)
    row |= {
        "step_ms": median * 1e3,
        "tokens_per_second": row["pack_tokens"] / median,
        "flops": flops,
        "mfu": flops / median / peak if peak else None,
        "peak_memory_gib": metrics.peak_memory_gib(device),
        "loss": result.loss.item(),
        "warmup_seconds": seconds[:WARMUP],
        "seconds": seconds[WARMUP:],
    }


def measure_attention(row: dict[str, Any], grid: Grid, dtype: torch.dtype, device: torch.device, clock: Clock) -> None:
    """Time attention alone, forward and backward, and enter the figures into the row.

    Args:
        row: `backend`, `pack_tokens` and `document_length` say what to measure.
        grid: Bears the heads.
        dtype: Of queries, keys and values.
        device: Where.
        clock: Looked at before each repetition.

    Raises:
        OutOfTimeError: The time given is used up.
    """
    clock.check(LAST_SHARE)
    free(device)
    config, tokens = grid.config, row["pack_tokens"]
    pack = random_pack(config.vocab_size, tokens, row["document_length"])
    bounds = pack.cu_seqlens.to(device)
    generator = torch.Generator(device).manual_seed(SEED)
    heads = (config.n_heads, config.n_kv_heads, config.n_kv_heads, config.n_heads)
    q, k, v, upstream = (
        torch.randn(tokens, n, config.head_dim, generator=generator, device=device, dtype=dtype) for n in heads
    )
    inputs = [x.requires_grad_() for x in (q, k, v)]
    slots = tuple(pack.cu_seqlens.diff().tolist())  # `sdpa` has them on the host, as within the network
    forward, backward = [], []
    for _ in range(WARMUP + TIMED):
        clock.check(LAST_SHARE)
        synchronize(device)
        begin = time.perf_counter()
        out = attention(q, k, v, bounds, pack.max_seqlen, row["backend"], slots)
        synchronize(device)
        between = time.perf_counter()
        torch.autograd.grad(out, inputs, upstream)
        synchronize(device)
        forward.append(between - begin)
        backward.append(time.perf_counter() - between)
    times = [statistics.median(seconds[WARMUP:]) for seconds in (forward, backward)]
    flops = 6 * config.n_heads * config.head_dim * sum(length * length for length in pack.lengths)
    row |= {
        "forward_ms": times[0] * 1e3,
        "backward_ms": times[1] * 1e3,
        "flops": flops,
        "tflops": flops / sum(times) / 1e12,
        "forward_seconds": forward[WARMUP:],
        "backward_seconds": backward[WARMUP:],
    }


def fill_in(row: dict[str, Any], measure: Callable[[], None]) -> bool:
    """Measure one row; where that cannot be done, its reason goes into the row instead.

    Returns:
        Whether an error ended it, one other than the time.
    """
    try:
        measure()
    except OutOfTimeError:
        row["not_run"] = OUT_OF_TIME
        return False
    except Exception as error:
        row["not_run"] = describe(error)
        return True
    row["not_run"] = None
    return False


def admitted(device_type: str, dtype: torch.dtype) -> tuple[list[str], list[dict[str, str]]]:
    """The attention kernels that run here, and those that do not, each with the reason."""
    names, refused = [], []
    for name in BACKENDS:
        if name == "auto":
            continue
        try:
            names.append(choose_backend(name, device_type, dtype))
        except ValueError as error:
            refused.append({"backend": name, "reason": describe(error)})
    return names, refused


def blank_rows(grid: Grid, backends: list[str], packs: tuple[int, ...], reason: str) -> list[dict[str, Any]]:
    """A row for each cell, not run yet; kernels innermost, so that what time permits can be compared."""
    return [
        {"backend": backend, "pack_tokens": tokens, "document_length": length or tokens, "not_run": reason}
        for tokens in packs
        for length in grid.document_lengths
        for backend in backends
    ]


def say(kind: str, row: dict[str, Any]) -> None:
    """One line for one cell."""
    figure = f"{row['step_ms']:.1f} ms" if "step_ms" in row else ""
    if "forward_ms" in row:
        figure = f"{row['forward_ms']:.2f} + {row['backward_ms']:.2f} ms"
    cell = f"{kind} {row['backend']}, pack {row['pack_tokens']}, documents of {row['document_length']}"
    print(f"{cell}: {figure or 'not run: ' + row['not_run']}", flush=True)


def measure_all(record: Record, grid: Grid, dtype: torch.dtype, clock: Clock) -> None:
    """Fill in every row of the record: training steps, then attention alone."""
    content = record.content
    with distributed.start(timeout_seconds=60, replicate=1, threads=None, deterministic=False) as ranks:
        trainee = Trainee(grid.config, ranks, dtype, clock)
        for row in content["steps"]:
            if fill_in(row, functools.partial(measure_step, row, grid, trainee, ranks.device, clock)):
                trainee.drop()
            record.save()
            say("step", row)
        trainee.drop()
        for row in content["attention"]:
            fill_in(row, functools.partial(measure_attention, row, grid, dtype, ranks.device, clock))
            record.save()
            say("attention", row)


def facts(device: torch.device) -> dict[str, Any]:
    """What ran, on what, from which commit."""
    about = environment(1, device)
    versions = about["versions"] | {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}  # type: ignore[no-untyped-call]
    cuda = device.type == "cuda"
    return {
        "date": about["started"],
        "device": about["device"],
        "device_memory_gib": torch.cuda.get_device_properties(device).total_memory / 2**30 if cuda else None,
        "python": about["python"],
        "versions": versions,
        "commit": about["commit"],
        "uncommitted_changes": None if about["uncommitted"] is None else bool(about["uncommitted"]),
    }


def left_out(content: dict[str, Any]) -> list[tuple[str, str]]:
    """Everything that was not run, and why, in the order of the report."""
    tests = content["tests"]
    found = [("everything on a GPU", "no CUDA device")] if content["settings"]["device_type"] == "cpu" else []
    if tests["status"] == "stopped":
        found.append(("GPU tests, the rest of them", f"time: stopped after {tests['seconds']:.0f} s"))
    elif tests["status"] == "broken":
        found.append(("GPU tests", f"pytest ended with {tests['exit_code']}: {tests['summary']}"))
    elif tests["status"] == "none ran" and not tests["skipped"]:
        found.append(("GPU tests", "there are none"))
    skipped: dict[str, list[str]] = {}
    for case in tests["skipped"]:
        skipped.setdefault(case["reason"], []).append(case["test"])
    for reason, names in skipped.items():
        found.append((f"{len(names)} GPU tests" if len(names) > 1 else f"GPU test {names[0]}", reason))
    if not tests["shapes_checked"]:
        found.append(("tensor shapes within the GPU tests", "the package beartype is not installed"))
    found += [(f"attention kernel {entry['backend']}", entry["reason"]) for entry in content["refused_backends"]]
    for kind, rows in (("training step", content["steps"]), ("attention alone", content["attention"])):
        cells: dict[str, list[str]] = {}
        for row in rows:
            if row["not_run"]:
                cell = f"{row['backend']} {row['pack_tokens']:,} / {row['document_length']:,}"
                cells.setdefault(row["not_run"], []).append(cell)
        found += [(f"{kind}, {'; '.join(names)}", reason) for reason, names in cells.items()]
    return found


def table(columns: dict[str, Callable[[dict[str, Any]], str]], rows: list[dict[str, Any]], needs: str) -> list[str]:
    """A Markdown table; a row without the figure `needs` says "not run" in place of its figures."""
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    named = 3  # backend, pack and document length say which row it is
    for row in rows:
        cells = [
            make(row) if place < named or needs in row else "not run" for place, make in enumerate(columns.values())
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def markdown(content: dict[str, Any]) -> str:
    """The report as a person reads it, from the record alone."""
    settings, versions, tests = content["settings"], content["versions"], content["tests"]
    shape, cuda = settings["config"], settings["device_type"] == "cuda"
    changes = " with uncommitted changes" if content["uncommitted_changes"] else ""
    commit = f"commit {content['commit']}{changes}" if content["commit"] else "not from a checkout"
    memory = f" ({content['device_memory_gib']:.0f} GiB)" if cuda else ""
    peak = settings["peak_tflops"]
    lines = [
        "# GPU benchmark" if cuda else "# GPU benchmark: no CUDA device, figures of the CPU",
        "",
        f"- Device: {content['device']}{memory}; "
        + (f"peak {peak:,.0f} TFLOP/s, dense bf16" if peak else "its peak is not known, so there is no MFU"),
        f"- torch {versions['torch']}, CUDA {versions['cuda'] or 'none'}, "
        f"cuDNN {versions['cudnn'] or 'none'}, Python {content['python']}",
        f"- {content['date']}; {commit}",
        f"- Model {settings['model']}, {shape['n_layers']} layers (whole: {settings['full_layers']}), "
        f"{settings['parameters']:,} parameters",
        f"- Compute {settings['compute_dtype']}, masters and moments float32; no recomputation in backward",
        f"- Attention that `auto` takes here: {settings['auto_backend']}",
        f"- {settings['warmup_steps']} steps of warm-up, then the median of {settings['timed_steps']}; "
        f"at most {settings['minutes']:g} minutes in all, {content['minutes_used']:.1f} used",
        "",
        "## GPU tests",
        "",
        f"**{tests['status']}** after {tests['seconds']:.0f} s; the log ends: {tests['summary']}",
        "",
        f"    {tests['command']}",
    ]
    if tests["failed"]:
        lines += ["", *(f"- {case['test']}: {case['reason']}" for case in tests["failed"])]
    lines += ["", "## Training step", ""]
    lines += table(
        {
            "attention": lambda row: row["backend"],
            "pack tokens": lambda row: f"{row['pack_tokens']:,}",
            "document tokens": lambda row: f"{row['document_length']:,}",
            "step ms": lambda row: f"{row['step_ms']:,.1f}",
            "tokens/s": lambda row: f"{row['tokens_per_second']:,.0f}",
            "model TFLOP": lambda row: f"{row['flops'] / 1e12:,.4g}",
            "MFU": lambda row: "–" if row["mfu"] is None else f"{row['mfu']:.1%}",
            "peak GiB" if cuda else "process GiB": lambda row: f"{row['peak_memory_gib']:.1f}",
            "loss": lambda row: f"{row['loss']:.4f}",
        },
        content["steps"],
        "step_ms",
    )
    lines += [
        "",
        "## Attention alone",
        "",
        f"{shape['n_heads']} query and {shape['n_kv_heads']} key-value heads of {shape['head_dim']}, "
        f"{settings['compute_dtype']}; FLOPs of the causal half of each document.",
        "",
    ]
    lines += table(
        {
            "attention": lambda row: row["backend"],
            "pack tokens": lambda row: f"{row['pack_tokens']:,}",
            "document tokens": lambda row: f"{row['document_length']:,}",
            "forward ms": lambda row: f"{row['forward_ms']:.2f}",
            "backward ms": lambda row: f"{row['backward_ms']:.2f}",
            "TFLOP/s": lambda row: f"{row['tflops']:,.3g}",
        },
        content["attention"],
        "forward_ms",
    )
    lines += ["", "## What could not be run", ""]
    lines += [f"- {what}: {why}" for what, why in left_out(content)] or ["Nothing: everything was run."]
    return "\n".join(lines) + "\n"


def stop_at_the_end(clock: Clock) -> None:
    """End the process when the time given has passed, whatever hangs; the files hold what was measured."""

    def end() -> None:
        print("the time given has passed and something still runs: ending; see the files", flush=True)
        os._exit(1)

    timer = threading.Timer(max(0.0, clock.left(1.0)), end)
    timer.daemon = True
    timer.start()


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="OUT_FOLDER", help="receives gpu.json, gpu.md, gpu_tests.log")
    parser.add_argument("--minutes", type=float, default=8, help="for everything together (default 8)")
    parser.add_argument("--layers", type=int, default=4, help="depth of the network (default 4)")
    parser.add_argument("--model", choices=GRIDS, default="nemo", help="Nemo's true widths, or a tiny one")
    given = parser.parse_args()
    if given.minutes <= 0 or given.layers < 1:
        parser.error("--minutes must be above 0 and --layers at least 1")
    if distributed.launch().world_size != 1:
        parser.error(f"found {distributed.launch().world_size} processes; start one, without torchrun")
    return given


def main() -> int:
    """Run everything that can be run in the time.

    Returns:
        0, or 1 where a GPU test failed or did not end, or nothing could be measured.
    """
    given = arguments()
    clock = Clock(given.minutes)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    dtype = torch.bfloat16 if cuda else torch.float32
    whole = GRIDS[given.model]
    grid = replace(whole, config=replace(whole.config, n_layers=given.layers))
    given.folder.mkdir(parents=True, exist_ok=True)
    stop_at_the_end(clock)

    if not cuda:
        print(
            "no CUDA device" + ("" if given.model == "tiny" else "; --model tiny measures on the CPU"),
            flush=True,
        )
    tests = run_tests(given.folder / "gpu_tests.log", clock.left(TESTS_SHARE))
    print(f"GPU tests {tests['status']}: {tests['summary']}", flush=True)
    measurable = cuda or given.model == "tiny"
    backends, refused = admitted(device.type, dtype)
    reason = OUT_OF_TIME if measurable else "no CUDA device"
    peak = metrics.peak_flops(device, None)
    record = Record(
        given.folder,
        {
            **facts(device),
            "settings": {
                "minutes": given.minutes,
                "model": given.model,
                "full_layers": whole.config.n_layers,
                "config": asdict(grid.config),
                "parameters": parameter_count(grid.config),
                "device_type": device.type,
                "compute_dtype": str(dtype).removeprefix("torch."),
                "auto_backend": choose_backend("auto", device.type, dtype),
                "peak_tflops": peak / 1e12 if peak else None,
                "warmup_steps": WARMUP,
                "timed_steps": TIMED,
                "document_slots": SLOTS,
                "optimizer": asdict(Optimizer()),
                "max_grad_norm": 1.0,
                "activation_checkpointing": "none",
                "reshard_after_forward": True,
                "seed": SEED,
            },
            "tests": tests,
            "refused_backends": refused,
            "steps": blank_rows(grid, backends, grid.pack_tokens, reason),
            "attention": blank_rows(grid, backends, grid.pack_tokens[-1:], reason),
        },
        clock,
    )
    record.save()
    if measurable:
        gc.disable()  # as in training: a collection in the middle of a step is a slow step
        measure_all(record, grid, dtype, clock)
    record.save()
    print(f"\n{markdown(record.content)}\nwritten to {given.folder}", flush=True)
    measured = any(row["not_run"] is None for row in record.content["steps"])
    return 0 if measured and tests_fine(tests, cuda) else 1


if __name__ == "__main__":
    sys.exit(main())
