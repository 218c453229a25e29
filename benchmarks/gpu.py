"""What one GPU gives: its tests first, then the whole step, its kernels beside others', and each beside its floor.

    python benchmarks/gpu.py OUT_FOLDER [--minutes 9] [--parts step,attention] [--model nemo] [--layers N]
    python benchmarks/gpu.py OUT_FOLDER --join FOLDER [FOLDER …]

Writes `gpu.json` (the record, with every raw timing), `gpu.md` (made from the record by `markdown`) and
`gpu_tests.log` into the folder, anew after each row. Whatever was not measured stands there with its reason. Without a
CUDA device `--model tiny` measures a small model on the CPU, which shows that the parts fit together and nothing more.
`--join` makes one record and report of several.
"""

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

# The command stands alone, in a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
# Both are read when the GPU is first used. A network that nearly fills the card must not fail for gaps between tensors;
# and cuBLAS is deterministic only with a workspace of its own for each stream, here as large as Hopper's by default.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import gpu_kernels
import gpu_steps
import torch
from gpu_bench import (
    FEWEST,
    GRIDS,
    NOT_REACHED,
    ROUNDS,
    SEED,
    SLOTS,
    TOLERANCE,
    WARMUP,
    Bench,
    DeviceLostError,
    Row,
    describe,
)

from magnum_train import distributed
from magnum_train.environment import environment
from magnum_train.fp8 import mfu_name

ROOT = Path(__file__).resolve().parent.parent
TESTS_WEIGHT = 4.0
"""Share of the tests in the time, beside the parts'."""

Columns = dict[str, Callable[[Row], str]]
"""Of a table: heading, and what a measured row has under it."""


@dataclass(frozen=True)
class Part:
    """A question."""

    title: str
    about: str
    weight: float
    """Its share of the time, beside the parts that are still to come."""
    plan: Callable[[Bench], list[Row]]
    measure: Callable[[Bench, list[Row]], None]
    names: Columns
    """Columns that say which row it is."""
    figures: Columns
    """Columns that were measured."""


def number(key: str, form: str = ",.3g") -> Callable[[Row], str]:
    """A column's figure, or a dash where there is none."""
    return lambda row: "–" if row.get(key) is None else f"{row[key]:{form}}"


def yes(key: str, no: str = "no") -> Callable[[Row], str]:
    """Whether something is so."""
    return lambda row: "yes" if row.get(key) else no


def text(key: str) -> Callable[[Row], str]:
    """A column's word."""
    return lambda row: str(row.get(key, "–"))


FLOOR: Columns = {
    "ms": number("ms", ",.4g"),
    "floor ms": number("floor_ms", ",.4g"),
    "× floor": number("gap", ".2f"),
    "floor by": lambda row: row.get("floor_by") or "–",
}
SETUP: Columns = {
    "recipe": lambda row: (
        f"{row['precision']}, moments {row['moments']}" + (f", fp8 {row['fp8']}" if row["fp8"] != "none" else "")
    ),
    "activations": text("activation_checkpointing"),
    "layers": text("layers"),
    "pack / document": lambda row: f"{row['pack_tokens']:,} / {row['document_length']:,}",
    "attention": text("attention"),
}
STEP: Columns = {
    "step ms": number("ms", ",.1f"),
    "floor ms": number("floor_ms", ",.1f"),
    "× floor": number("gap", ".2f"),
    "tokens/s": number("tokens_per_second", ",.0f"),
    "MFU": number("mfu", ".1%"),
    "MFU, whole packs": number("mfu_of_whole_packs", ".1%"),
    "peak GiB": number("peak_gib", ".1f"),
    "predicted GiB": number("predicted_gib", ".1f"),
    "loss": number("loss", ".4f"),
    "waits": number("waits_for_the_device", "d"),
}
BY_PART: Columns = {"part": text("part"), **FLOOR}
BY_PART_ABOUT = (
    "Where the time of a step goes. Head and update by marks in the timed steps; attention and the gradients' norm, "
    "which is counted to the optimizer, by the profiler in one more step; blocks are what is left of forward and "
    "backward."
)
FEWER = (
    "The whole network has {} layers. Where a row has fewer, more did not fit the card's memory, or rows in turn had "
    "to fit beside each other."
)

PARTS: dict[str, Part] = {
    "ceilings": Part(
        "What the card gives",
        "Measured on random data. Floors below go by the data sheet where the card is known, else by these.",
        0.3,
        gpu_kernels.plan_ceilings,
        gpu_kernels.measure_ceilings,
        {"what": text("detail")},
        {"ms": number("ms", ",.4g"), "rate": lambda row: rate(row)},
    ),
    "agreement": Part(
        "Does the fast step give the right numbers?",
        "Two layers of the true widths, one ragged pack: loss and all gradients against float32 by torch's own "
        "attention, document by document. Errors are ‖found − exact‖ / ‖exact‖.",
        2.0,
        gpu_steps.plan_agreement,
        gpu_steps.measure_agreement,
        {"attention": text("attention"), "activations": text("activation_checkpointing"), "compiled": yes("compiled")},
        {
            "loss error": number("loss_error", ".1e"),
            "gradient error": number("gradient_error", ".1e"),
            "worst tensor": number("worst_gradient_error", ".1e"),
            "right": yes("right", "**NO**"),
        },
    ),
    "step": Part(
        "How fast is the whole step?",
        "From a pack in page-locked memory to the end of the update. Model FLOPs count matrix products and the causal "
        "half of each document's attention, nothing recomputed; MFU is these over the card's dense bf16 peak; that of "
        "whole packs counts attention without documents and mask, as others do. Waits: how often the host waited for "
        "the device within a step. The floor adds up those of the parts below.",
        6.0,
        gpu_steps.plan_step,
        gpu_steps.measure_step,
        SETUP,
        STEP,
    ),
    "attention": Part(
        "Which attention kernel, at which document length?",
        "Forward and backward at the network's heads, kernels in turn. Error: the largest of output and gradients "
        f"against float32, right up to {TOLERANCE:g}. FLOPs of the causal half of each document.",
        2.0,
        gpu_kernels.plan_attention,
        gpu_kernels.measure_attention,
        {
            "document": lambda row: f"{row['document_length']:,}" if row["document_length"] else "any",
            "pack": lambda row: f"{row['pack_tokens']:,}",
            "attention": text("attention"),
        },
        {
            "forward ms": number("forward_ms", ",.3f"),
            "backward ms": number("backward_ms", ",.3f"),
            "TFLOP/s": number("tflops", ",.4g"),
            **FLOOR,
            "error": number("error", ".1e"),
            "right": yes("right", "**NO**"),
        },
    ),
    "loss": Part(
        "The loss head against others",
        "Output matrix and cross-entropy, forward and backward, in turn. Errors against float32 from the same factors; "
        "extra GiB: beside inputs, gradients included. FLOPs of the labelled positions alone.",
        1.5,
        gpu_kernels.plan_loss,
        gpu_kernels.measure_loss,
        {"head": text("what"), "labels": lambda row: f"{row['label_share']:.0%}"},
        {
            **FLOOR,
            "TFLOP/s": number("tflops", ",.4g"),
            "extra GiB": number("extra_gib", ".2f"),
            "value error": number("value_error", ".1e"),
            "gradient error": number("gradient_error", ".1e"),
            "right": yes("right", "**NO**"),
        },
    ),
    "optimizer": Part(
        "The update against others",
        "Clipping by a known norm and AdamW over one layer's matrices, in turn. Error: of three updates at a rate of "
        "1e-3 against float64, by norm.",
        2.5,
        gpu_kernels.plan_optimizer,
        gpu_kernels.measure_optimizer,
        {"optimizer": text("what"), "parameters": text("precision"), "moments": text("moments")},
        {
            **FLOOR,
            "bytes a parameter": number("bytes_per_parameter", ".4g"),
            "GB/s": number("gb_per_second", ",.0f"),
            "ms per 10⁹ parameters": number("ms_per_billion", ",.2f"),
            "error of updates": number("error_of_updates", ".1e"),
        },
    ),
    "fp8": Part(
        "Matrix products in fp8, apart",
        "The blocks' products by torchao; steps in turn but for the last row. **Of bf16 peak: the model's operations "
        "over the peak of bf16, which is no MFU where products are in fp8.** Loss and gradient norm: difference from "
        "bf16.",
        2.5,
        gpu_steps.plan_fp8,
        gpu_steps.measure_fp8,
        {**SETUP, "in turn": yes("in_turn")},
        {
            "step ms": number("ms", ",.1f"),
            "tokens/s": number("tokens_per_second", ",.0f"),
            "of bf16 peak": lambda row: number(mfu_name(row["fp8"]), ".1%")(row),
            "× speed of bf16": number("speed_up", ".2f"),
            "loss": number("loss_differs", "+.1e"),
            "gradient norm": number("norm_differs", "+.1e"),
        },
    ),
    "save": Part(
        "What does an asynchronous save stall?",
        "The copy from the device to page-locked memory that training waits for, of one layer with embedding and head: "
        "about what a rank of eight has. The first copy makes that memory, in training beside the second step.",
        0.7,
        gpu_steps.plan_save,
        gpu_steps.measure_save,
        {"precision": text("precision"), "moments": text("moments")},
        {
            "GB": number("gigabytes", ",.4g"),
            **FLOOR,
            "GB/s": number("gb_per_second", ",.4g"),
            "first ms": number("first_ms", ",.0f"),
        },
    ),
    "deterministic": Part(
        "What do deterministic kernels cost?",
        "Steps of packs of short documents, in turn. Same bits: whether five gradient norms of one pack were equal.",
        1.5,
        gpu_steps.plan_deterministic,
        gpu_steps.measure_deterministic,
        {"step": text("what"), "attention": text("attention"), "layers": text("layers")},
        {
            "step ms": number("ms", ",.1f"),
            "tokens/s": number("tokens_per_second", ",.0f"),
            "same bits": yes("same_bits"),
        },
    ),
    "recompute": Part(
        "What does recomputation cost and save?",
        "Ways to keep activations, one after another; predicted is the memory model.",
        2.0,
        gpu_steps.plan_recompute,
        gpu_steps.measure_recompute,
        {**SETUP, "compiled": yes("compiled")},
        STEP,
    ),
}
"""In the order in which they are asked."""


def rate(row: Row) -> str:
    """A ceiling in its unit."""
    return f"{row['rate'] / 1e12:,.4g} TFLOP/s" if "products" in row["what"] else f"{row['rate'] / 1e9:,.0f} GB/s"


class Record:
    """The record and its Markdown on disk, written anew after each row, so that nothing measured is lost.

    Args:
        folder: Where to.
        content: What the record holds; changed in place by those who measure.
    """

    def __init__(self, folder: Path, content: dict[str, Any]) -> None:
        self.folder, self.content, self._begun = folder, content, time.monotonic()
        self._used_before = content["runs"][-1]["minutes_used"]

    def save(self) -> None:
        """Replace both files, each as a whole."""
        self.content["runs"][-1]["minutes_used"] = self._used_before + (time.monotonic() - self._begun) / 60
        for name, written in (
            ("gpu.json", json.dumps(_plain(self.content), indent=1, allow_nan=False) + "\n"),
            ("gpu.md", markdown(self.content)),
        ):
            aside = self.folder / f".{name}.tmp"
            aside.write_text(written)
            aside.replace(self.folder / name)


def _plain(value: Any) -> Any:
    """A value as JSON can hold it: what is not finite is named by a word, so that a NaN stays visible."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


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


def facts(device: torch.device, given: argparse.Namespace) -> dict[str, Any]:
    """What ran, on what, from which commit, and how."""
    about = environment(1, device)
    packages = {}
    for name in ("triton", "torchao", "liger-kernel", "flash-attn", "flash-attn-3", "flash-attn-4"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = None
    cuda = device.type == "cuda"
    return {
        "date": about["started"],
        "device": about["device"],
        "device_type": device.type,
        "device_memory_gib": torch.cuda.get_device_properties(device).total_memory / 2**30 if cuda else None,
        "python": about["python"],
        "versions": about["versions"]
        | packages
        | {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()},  # type: ignore[no-untyped-call]
        "commit": about["commit"],
        "uncommitted_changes": None if about["uncommitted"] is None else bool(about["uncommitted"]),
        "command": " ".join(["python", "benchmarks/gpu.py", *sys.argv[2:]]),
        "minutes": given.minutes,
        "minutes_used": 0.0,
        "avoided": [],
        "model": given.model,
        "network": asdict(GRIDS[given.model].config),
        "warmup": WARMUP,
        "rounds": ROUNDS,
        "fewest_rounds": FEWEST,
        "document_slots": SLOTS,
        "seed": SEED,
        "allocator": os.environ["PYTORCH_CUDA_ALLOC_CONF"],
        "cublas_workspace": os.environ["CUBLAS_WORKSPACE_CONFIG"],
    }


def table(columns: Columns, names: int, rows: list[Row]) -> list[str]:
    """A Markdown table; a row that was not measured says so in place of its figures."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * names + "---:|" * (len(columns) - names)]
    for row in rows:
        cells = []
        for place, make in enumerate(columns.values()):
            missing = row["not_measured"] is not None and place >= names
            cells.append(("not measured" if place == names else "") if missing else make(row))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def left_out(content: dict[str, Any]) -> list[tuple[str, str]]:
    """Everything that was not measured, and why, in the order of the report."""
    found = []
    for run in content["runs"]:
        tests = run["tests"]
        if run["device_type"] == "cpu":
            found.append(("everything on a GPU", "no CUDA device"))
        if tests is None:
            found.append(("GPU tests", "they were not asked for" if run["device_type"] == "cuda" else "no CUDA device"))
            continue
        if tests["status"] == "stopped":
            found.append(("GPU tests, the rest of them", f"time: stopped after {tests['seconds']:.0f} s"))
        elif tests["status"] == "broken":
            found.append(("GPU tests", f"pytest ended with {tests['exit_code']}: {tests['summary']}"))
        skipped: dict[str, list[str]] = {}
        for case in tests["skipped"]:
            skipped.setdefault(case["reason"], []).append(case["test"])
        found += [(f"{len(names)} GPU tests, such as {names[0]}", reason) for reason, names in skipped.items()]
        if not tests["shapes_checked"]:
            found.append(("tensor shapes within the GPU tests", "the package beartype is not installed"))
    for entry in content["parts"]:
        part, reasons = PARTS[entry["name"]], dict[str, list[str]]()
        for row in entry["rows"]:
            if row["not_measured"] is not None:
                reasons.setdefault(row["not_measured"], []).append(", ".join(make(row) for make in part.names.values()))
        found += [(f"{entry['name']}: {'; '.join(rows)}", reason) for reason, rows in reasons.items()]
    asked = {entry["name"] for entry in content["parts"]}
    found += [(part.title, "it was not asked for") for name, part in PARTS.items() if name not in asked]
    return found


def wrong(content: dict[str, Any]) -> list[str]:
    """Rows whose numbers are not right, by name."""
    return [
        f"{entry['name']}: {', '.join(make(row) for make in PARTS[entry['name']].names.values())}"
        for entry in content["parts"]
        for row in entry["rows"]
        if row.get("right") is False
    ]


def of_run(run: dict[str, Any]) -> list[str]:
    """What ran, as a person reads it."""
    versions, memory = run["versions"], run["device_memory_gib"]
    changes = " with uncommitted changes" if run["uncommitted_changes"] else ""
    commit = f"commit {run['commit']}{changes}" if run["commit"] else "not from a checkout"
    named = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    network = run["network"]
    return [
        f"- **{run['device']}**" + (f", {memory:.1f} GiB" if memory else "") + f"; {run['date']}; {commit}",
        f"  - `{run['command']}`: {run['minutes_used']:.1f} of {run['minutes']:g} minutes",
        f"  - Python {run['python']}, {named}",
        f"  - {run['model']}: {network['n_layers']} layers, width {network['dim']}; a row says how many layers it had",
        f"  - {run['warmup']} runs of warm-up, then the median of {run['rounds']}, of {run['fewest_rounds']} where the "
        "time ended; what is told as in turn ran in rounds, each once in a round",
    ]


def of_tests(tests: dict[str, Any]) -> list[str]:
    """The GPU tests, as a person reads them."""
    lines = [f"**{tests['status']}** after {tests['seconds']:.0f} s; the log ends: {tests['summary']}", ""]
    lines += [f"    {tests['command']}", ""]
    return lines + [f"- {case['test']}: {case['reason']}" for case in tests["failed"]]


def markdown(content: dict[str, Any]) -> str:
    """The report as a person reads it, from the record alone."""
    runs = content["runs"]
    on_gpu = any(run["device_type"] == "cuda" for run in runs)
    lines = ["# GPU benchmark" if on_gpu else "# GPU benchmark: no CUDA device, figures of the CPU", ""]
    for run in runs:
        lines += of_run(run)
    if found := wrong(content):
        lines += ["", "**Wrong numbers:** " + "; ".join(found)]
    for run in runs:
        if run["tests"] is not None:
            lines += ["", f"## GPU tests ({run['device']})", "", *of_tests(run["tests"])]
    for name, part in PARTS.items():
        for entry in (entry for entry in content["parts"] if entry["name"] == name):
            run = runs[entry["run"]]
            lines += ["", f"## {part.title} ({run['device']})", "", part.about, ""]
            whole = run["network"]["n_layers"]
            if {row.get("layers", whole) for row in entry["rows"]} - {whole}:
                lines += [FEWER.format(whole), ""]
            lines += table({**part.names, **part.figures}, len(part.names), entry["rows"])
            every = [
                {**row, "floor_by": None, **of_part} for row in entry["rows"] for of_part in row.get("by_part", ())
            ]
            if every and name == "step":
                lines += ["", BY_PART_ABOUT, "", *table({**SETUP, **BY_PART}, len(SETUP) + 1, every), ""]
            lines += [f"- {row['remark']}" for row in entry["rows"] if "remark" in row]
    lines += ["", "## What was not measured", ""]
    lines += [f"- {what}: {why}" for what, why in left_out(content)] or ["Nothing: everything was."]
    return "\n".join(lines) + "\n"


def stop_at_the_end(seconds: float) -> None:
    """End the process after these seconds, whatever hangs; the files hold what was measured."""

    def end() -> None:
        print("the time given has passed and something still runs: ending; see the files", flush=True)
        os._exit(1)

    timer = threading.Timer(max(0.0, seconds), end)
    timer.daemon = True
    timer.start()


def go_on_without_the_device(given: argparse.Namespace, record: Record, ends: float) -> None:
    """Become a new process, with a new GPU context, that goes on with what is left."""
    record.save()
    left = (ends - time.monotonic()) / 60
    print(f"the device failed; going on in a new process for {left:.1f} minutes", flush=True)
    words = [str(given.folder), "--resume", "--minutes", f"{left:.3f}", "--model", given.model]
    words += ["--parts", ",".join(given.parts)]
    words += ["--layers", str(given.layers)] if given.layers else []
    os.execv(sys.executable, [sys.executable, str(Path(__file__).resolve()), *words])


def measure(given: argparse.Namespace, record: Record, ends: float) -> None:
    """Ask every question that was asked for, each within its share of the time that is left."""
    gc.disable()  # as in training: a collection in the middle of a step is a slow step
    # So small a model on several threads would measure how they wait for each other.
    threads = None if torch.cuda.is_available() else 1
    with distributed.start(timeout_seconds=60, replicate=1, threads=threads, deterministic=False) as ranks:
        avoided = record.content["runs"][-1]["avoided"]
        bench = Bench(GRIDS[given.model], ranks.device, ranks, record.save, layers=given.layers, avoided=avoided)
        entries = {entry["name"]: entry for entry in record.content["parts"]}
        for name in given.parts:  # planned at once, so that what is not reached is in the record
            if name in PARTS and name not in entries:
                entries[name] = {"name": name, "run": 0, "rows": PARTS[name].plan(bench)}
                record.content["parts"].append(entries[name])
        record.save()
        for row in entries.get("ceilings", {"rows": []})["rows"]:
            if "rate" in row:
                bench.ceilings[row["what"]] = row["rate"]
        waiting = [name for name in PARTS if name in entries]
        while waiting:
            name = waiting.pop(0)
            part, entry = PARTS[name], entries[name]
            share = part.weight / (part.weight + sum(PARTS[other].weight for other in waiting))
            now = time.monotonic()
            bench.deadline = now + share * (ends - now)
            try:
                part.measure(bench, entry["rows"])
                bench.free()
            except DeviceLostError:
                go_on_without_the_device(given, record, ends)
            except Exception as error:
                for row in entry["rows"]:  # planned, and no row's own fault
                    if row["not_measured"] == NOT_REACHED:
                        row["not_measured"] = describe(error)
            record.save()
            done = sum(row["not_measured"] is None for row in entry["rows"])
            print(f"{name}: {done} of {len(entry['rows'])} rows in {time.monotonic() - now:.0f} s", flush=True)


def joined(folders: list[Path]) -> dict[str, Any]:
    """One record of several."""
    content: dict[str, Any] = {"runs": [], "parts": []}
    for folder in folders:
        one = json.loads((folder / "gpu.json").read_text())
        content["parts"] += [{**entry, "run": entry["run"] + len(content["runs"])} for entry in one["parts"]]
        content["runs"] += one["runs"]
    return content


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="OUT_FOLDER", help="receives gpu.json, gpu.md, gpu_tests.log")
    parser.add_argument("--minutes", type=float, default=9, help="for everything together (default 9)")
    parser.add_argument("--parts", default=",".join(["tests", *PARTS]), help="tests, " + ", ".join(PARTS))
    parser.add_argument("--layers", type=int, help="depth of the network (default: the whole one, or what fits)")
    parser.add_argument("--model", choices=GRIDS, default="nemo", help="Nemo, or a tiny one")
    parser.add_argument("--join", type=Path, nargs="+", metavar="FOLDER", help="measure nothing: one report of several")
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    asked = given.parts.split(",")
    given.parts = [name for name in ("tests", *PARTS) if name in asked]
    if set(given.parts) - {"tests", "ceilings"}:  # which others are held against
        given.parts = [name for name in ("tests", *PARTS) if name in asked or name == "ceilings"]
    if given.minutes <= 0 or not set(asked) <= {"tests", *PARTS} or (given.layers is not None and given.layers < 1):
        parser.error(f"--minutes must be above 0, --layers at least 1, --parts some of tests, {', '.join(PARTS)}")
    if distributed.launch().world_size != 1:
        parser.error(f"found {distributed.launch().world_size} processes; start one, without torchrun")
    return given


def main() -> int:
    """Measure everything that can be measured in the time.

    Returns:
        0, or 1 where a GPU test failed or did not end, numbers are wrong, or nothing could be measured.
    """
    given = arguments()
    ends = time.monotonic() + given.minutes * 60
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.join:
        Record(given.folder, joined(given.join)).save()
        print((given.folder / "gpu.md").read_text())
        return 0
    stop_at_the_end(ends - time.monotonic())
    if given.resume:
        content = joined([given.folder])
    else:
        content = {"runs": [{**facts(device, given), "tests": None}], "parts": []}
        if cuda and "tests" in given.parts:
            weights = sum(PARTS[name].weight for name in given.parts if name in PARTS)
            share = TESTS_WEIGHT / (TESTS_WEIGHT + weights)
            tests = run_tests(given.folder / "gpu_tests.log", share * given.minutes * 60)
            content["runs"][0]["tests"] = tests
            print(f"GPU tests {tests['status']}: {tests['summary']}", flush=True)
    record = Record(given.folder, content)
    record.save()
    if cuda or given.model == "tiny":
        measure(given, record, ends)
    else:
        print("no CUDA device; --model tiny measures on the CPU", flush=True)
    record.save()
    print(f"\n{markdown(content)}\nwritten to {given.folder}", flush=True)
    tests = content["runs"][0]["tests"]
    measured = any(row["not_measured"] is None for entry in content["parts"] for row in entry["rows"])
    fine = (tests is None or tests["status"] == "passed") and not wrong(content)
    return 0 if fine and (measured or given.parts == ["tests"]) else 1


if __name__ == "__main__":
    sys.exit(main())
