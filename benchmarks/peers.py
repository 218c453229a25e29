"""A training step beside those of its peers: speed, memory, and what each spends its time on.

    python benchmarks/peers.py OUT.json [--peers PYTHON] [--litgpt PYTHON] [--rounds 7] [--profile] [--tiny]

`--peers` is an interpreter with transformers and TRL, `--litgpt` one with litgpt, each with the torch that runs this; a
contestant without one is listed as not measured. All begin with the same weights, see the same documents in the same
packs, in the same precision, with AdamW of the same rates. Each works in a process of its own (`peer_worker.py`) and
waits while another works; they take turns, in another order each round, and a ratio is the median of the rounds' own.

Before the clock counts it is shown that all compute the same loss, and which of them keep the documents of a pack
apart. Prints the tables and writes the record. Exit status 1: a target was missed, or a loss was another one.
"""

import argparse
import json
import os
import platform
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

# The command stands alone, in a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from data.packing import pack
from magnum_train.environment import environment
from model import Transformer, TransformerConfig
from model.flops import parameter_count, train_flops
from model.hf import save_hf
from model.transformer import init_weights

WORKER = Path(__file__).with_name("peer_worker.py")

MEDIAN, SIGMA = 144, 1.0
"""Of the log-normal lengths of documents: as in two published files of conversations."""

STEPS = 4
"""Steps of different packs, taken in turn."""

PROFILED = 2
"""Steps that are profiled."""

WARMUP = 2
"""Rounds before the clock counts; compilation falls into the first."""

PATIENCE = 400
"""Longest wait for an answer, in seconds: compilation on a busy machine."""


@dataclass(frozen=True)
class Setting:
    """What is trained: a network, and the packs of a step."""

    config: TransformerConfig
    pack_tokens: int
    packs: int
    memory_vocab: int
    """Words of the vocabulary where memory is measured."""
    tolerance: float
    """By which losses of the same packs may differ, relative."""


CPU = Setting(
    TransformerConfig(dim=256, n_layers=8, n_heads=8, n_kv_heads=2, head_dim=40, hidden_dim=896, vocab_size=8007),
    pack_tokens=1024, packs=2, memory_vocab=131072, tolerance=1e-4,
)  # fmt: skip
TINY = Setting(
    TransformerConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=24, hidden_dim=96, vocab_size=503),
    pack_tokens=256, packs=2, memory_vocab=2048, tolerance=1e-4,
)  # fmt: skip
GPU = Setting(
    TransformerConfig(
        dim=5120, n_layers=2, n_heads=32, n_kv_heads=8, head_dim=128, hidden_dim=14336, vocab_size=131072
    ),
    pack_tokens=4096, packs=2, memory_vocab=131072, tolerance=2e-2,
)  # fmt: skip
"""Nemo's widths in bf16, with as many layers as everybody's plain step has room for."""


@dataclass(frozen=True)
class Contestant:
    """A row of the tables.

    Args:
        name: The worker's.
        title: What it is.
        python: "here", "peers" or "litgpt".
        isolates: Whether it should keep the documents of a pack apart.
    """

    name: str
    title: str
    python: str
    isolates: bool = True


CONTESTANTS = (
    Contestant("ours", "magnum_train", "here"),
    Contestant("ours_compiled", "magnum_train, blocks compiled", "here"),
    Contestant("trl", "TRL, packing", "peers"),
    Contestant("trl_accumulated", "TRL, packing, 1 pack × 2 accumulated", "peers"),
    Contestant("trl_recompute", "TRL, packing, recomputation (its default)", "peers"),
    Contestant("transformers", "transformers, packs", "peers"),
    Contestant("transformers_compiled", "transformers, packs, compiled", "peers"),
    Contestant("transformers_padded", "transformers, padded", "peers"),
    Contestant("litgpt", "litgpt's GPT, packs", "litgpt", isolates=False),
    Contestant("litgpt_compiled", "litgpt's GPT, packs, compiled", "litgpt", isolates=False),
    Contestant("products", "the step's matrix products alone", "here"),
)

TITAN = ("torchtitan", "its trainer needs CUDA")

MEMORY = ("ours", "trl", "trl_recompute", "transformers", "litgpt")
"""Contestants whose memory is measured."""

KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn", "aten::matmul"),
    "attention": ("scaled_dot_product", "flash_attention", "magnum_train::attention", "aten::_softmax", "varlen"),
    "compiled code": ("Torch-Compiled", "Compiled", "inductor", "call_"),
    "optimizer": ("adamw", "Optimizer", "foreach", "clip", "vector_norm"),
    "copies and new memory": (
        "copy_", "aten::cat", "clone", "contiguous", "fill_", "zero_", "aten::empty", "aten::index", "repeat",
        "select_backward", "slice_backward", "aten::to", "gather", "scatter", "masked_fill", "aten::where", "resize_",
    ),
    "softmax and loss": ("log_softmax", "nll_loss", "aten::exp", "logsumexp", "cross_entropy", "aten::amax"),
}  # fmt: skip
"""Operators by a part of their names, the first that fits; the rest is elementwise work and reductions."""


# What is trained


def made_packs(setting: Setting) -> dict[str, Any]:
    """Documents of random words in full packs, and what losses are compared on.

    Returns:
        `steps`; `single`, where one document fills each pack; `marked`, where the first document of each pack bears no
        loss, and `changed`, the same with other words in it: a loss that differs has seen across documents.
    """
    draw = np.random.default_rng(0)
    drawn = draw.lognormal(np.log(MEDIAN), SIGMA, 40 * STEPS * setting.packs * setting.pack_tokens // MEDIAN)
    lengths = np.clip(drawn.astype(np.int64), 2, setting.pack_tokens)
    full = [
        members
        for members in pack(lengths, setting.pack_tokens, seed=0)
        if lengths[members].sum() == setting.pack_tokens and len(members) > 1
    ]

    def words(length: int) -> list[int]:
        return draw.integers(3, setting.config.vocab_size, length).tolist()

    def documents(sizes: Sequence[int]) -> list[dict[str, Any]]:
        return [{"tokens": words(int(size)), "first": 1} for size in sizes]

    packs = [documents(lengths[members]) for members in full[: STEPS * setting.packs]]
    steps = [packs[n : n + setting.packs] for n in range(0, len(packs), setting.packs)]
    assert len(packs) == STEPS * setting.packs
    marked = [[first | {"first": len(first["tokens"])}, *rest] for first, *rest in steps[0]]
    changed = [[first | {"tokens": words(len(first["tokens"]))}, *rest] for first, *rest in marked]
    single = [documents([setting.pack_tokens]) for _ in range(setting.packs)]
    return {"steps": steps, "single": single, "marked": marked, "changed": changed}


def lay_out(folder: Path, setting: Setting, packs: dict[str, Any], dtype: torch.dtype) -> None:
    """Write what every contestant reads: the weights as transformers has them, and the packs."""
    model = Transformer(setting.config)
    init_weights(model, seed=0)
    save_hf(model, folder, dtype=dtype, max_shard_bytes=2**40)
    (folder / "packs.json").write_text(json.dumps(packs))


# Contestants at work


class LostError(Exception):
    """A worker ended or does not answer; says why."""


class Worker:
    """A contestant's process.

    Args:
        contestant: Which.
        python: The interpreter.
        folder: What `lay_out` wrote.
        threads: Of its own.
        log: Receives what it and its libraries say.
    """

    def __init__(self, contestant: Contestant, python: str, folder: Path, threads: int, log: Path) -> None:
        self.contestant, self._log, self._rest = contestant, log, b""
        quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
        with log.open("wb") as stream:
            self._process = subprocess.Popen(
                [python, str(WORKER), contestant.name, str(folder), str(threads)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stream, cwd=folder, env=os.environ | quiet,
            )  # fmt: skip
        self.facts: dict[str, Any] = {}

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise LostError(self._reason()) from error
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Wait for an answer.

        Raises:
            LostError: There is none in time, or the process has ended.
        """
        assert self._process.stdout is not None
        until = time.monotonic() + PATIENCE
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                raise LostError(f"no answer in {PATIENCE} s")
            read = os.read(self._process.stdout.fileno(), 2**20)
            if not read:
                raise LostError(self._reason())
            self._rest += read
        line, _, self._rest = self._rest.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found

    def loss(self, of: str | int) -> float:
        """The loss of named packs."""
        return float(self.ask(do="loss", of=of)["loss"])

    def close(self) -> None:
        """End the process, if it is still there."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _reason(self) -> str:
        """What the process said last, as errors stand at the end."""
        self._process.wait()
        said = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return f"ended with {self._process.returncode}: {said[-1] if said else 'nothing said'}"


@contextmanager
def workers(
    names: Sequence[str], pythons: dict[str, str | None], folder: Path, threads: int, record: dict[str, Any]
) -> Iterator[list[Worker]]:
    """Start contestants one after another, and end them.

    Args:
        names: Of those that are wanted.
        pythons: Interpreters.
        folder: What `lay_out` wrote.
        threads: For each.
        record: Receives a row for each; those that cannot run say why under `not measured`.

    Yields:
        Those that are ready.
    """
    ready: list[Worker] = []
    try:
        for contestant in CONTESTANTS:
            if contestant.name not in names:
                continue
            row = record.setdefault(contestant.name, {"title": contestant.title})
            python = pythons[contestant.python]
            if python is None:
                row["not measured"] = f"--{contestant.python} was not given"
                continue
            worker = Worker(contestant, python, folder, threads, folder / f"{contestant.name}.log")
            ready.append(worker)
            with kept(worker, row, ready):
                worker.facts = worker.answer()
                row |= {key: value for key, value in worker.facts.items() if key != "resident"}
        yield ready
    finally:
        for worker in ready:
            worker.close()


@contextmanager
def kept(worker: Worker, row: dict[str, Any], among: list[Worker]) -> Iterator[None]:
    """Go on without a worker that is lost."""
    try:
        yield
    except LostError as error:
        row["not measured"] = str(error)
        worker.close()
        among.remove(worker)
        print(f"{worker.contestant.title}: {error}", flush=True)


# What is measured


def losses(ready: list[Worker], record: dict[str, Any], when: str) -> None:
    """Ask everyone for the losses that are compared."""
    for worker in list(ready):
        row = record[worker.contestant.name]
        if worker.contestant.name == "products":
            continue
        with kept(worker, row, ready):
            row[f"loss {when}"] = worker.loss(0)
            if when == "before":
                row["loss of one document a pack"] = worker.loss("single")
                row["seen across documents"] = abs(worker.loss("marked") - worker.loss("changed"))


def rounds(ready: list[Worker], record: dict[str, Any], count: int) -> None:
    """Let everyone take steps in turn, another one first in each round."""
    for number in range(WARMUP + count):
        turn = number % max(1, len(ready))
        for worker in [*ready[turn:], *ready[:turn]]:
            row = record[worker.contestant.name]
            with kept(worker, row, ready):
                found = worker.ask(do="seconds", step=number)
                for name in ("seconds", "cpu seconds"):
                    row.setdefault(name, []).append(found[name])
        print(f"round {number + 1} of {WARMUP + count}", file=sys.stderr, flush=True)
    for row in record.values():
        for name in ("seconds", "cpu seconds"):
            if name in row:
                row[f"warmup {name}"], row[name] = row[name][:WARMUP], row[name][WARMUP:]


def profiles(ready: list[Worker], record: dict[str, Any], begin: int) -> None:
    """Milliseconds of each operator in a step: the largest, and sums by kind."""
    for worker in list(ready):
        row = record[worker.contestant.name]
        if worker.contestant.name == "products":
            continue
        with kept(worker, row, ready):
            found = [worker.ask(do="profile", step=begin + n) for n in range(PROFILED)]
            spent: dict[str, list[float]] = {}
            for name, milliseconds, calls in (operator for one in found for operator in one["operators"]):
                total = spent.setdefault(name, [0.0, 0.0])
                total[0] += milliseconds / PROFILED
                total[1] += calls / PROFILED
            ordered = sorted(spent.items(), key=lambda item: -item[1][0])
            sums = dict.fromkeys([*KINDS, "elementwise and reductions"], 0.0)
            for name, (milliseconds, _) in ordered:
                sums[kind_of(name)] += milliseconds
            step = statistics.mean(one["seconds"] for one in found) * 1e3
            sums["between operators"] = max(0.0, step - sum(sums.values()))
            row["profile"] = {
                "step ms": step,
                "by kind": {name: round(value, 2) for name, value in sums.items()},
                "operators": [[name, round(value[0], 2), round(value[1], 1)] for name, value in ordered[:16]],
            }


def kind_of(operator: str) -> str:
    """Where an operator counts."""
    for kind, parts in KINDS.items():
        if any(part.lower() in operator.lower() for part in parts):
            return kind
    return "elementwise and reductions"


def memory(
    setting: Setting, pythons: dict[str, str | None], packs: dict[str, Any], dtype: torch.dtype, threads: int
) -> dict[str, Any]:
    """What a step takes with a large vocabulary, one contestant after another, each alone."""
    large = replace(setting, config=replace(setting.config, vocab_size=setting.memory_vocab))
    parameters = parameter_count(large.config)
    record: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "weights"
        lay_out(folder, large, packs, dtype)
        for name in MEMORY:
            with workers([name], pythons, folder, threads, record) as ready:
                for worker in list(ready):
                    row = record[name]
                    with kept(worker, row, ready):
                        for number in range(2):  # moments exist then, and allocators have what they keep
                            worker.ask(do="seconds", step=number)
                        seen = worker.ask(do="memory", step=2)
                        allocated = worker.ask(do="allocations", step=3)["peak"]
                        gradients = parameters * dtype.itemsize
                        row |= {
                            "state": 4 * gradients,
                            "loaded": worker.facts["resident"],
                            "before": seen["before"],
                            "peak": seen["peak"],
                            "above state": seen["peak"] - worker.facts["resident"] - 3 * gradients,
                            "tensors at peak": 3 * gradients + allocated,
                            "tensors above state": allocated - gradients,
                            "seconds": seen["seconds"],
                        }
                        print(f"memory, {row['title']}: {row['peak'] / 2**20:,.0f} MiB", flush=True)
    return record


# What it says


def ratio(record: dict[str, Any], name: str, to: str) -> float | None:
    """How many times as long a step takes, by the median of the rounds; None where one was not measured."""
    pair = [record.get(one, {}) for one in (name, to)]
    if any("seconds" not in row or "not measured" in row for row in pair):
        return None
    return statistics.median(theirs / ours for theirs, ours in zip(*(row["seconds"] for row in pair), strict=True))


def targets(content: dict[str, Any]) -> list[dict[str, Any]]:
    """What has to hold, with what was found; None where it could not be."""
    record, spent = content["contestants"], content["memory"]
    faster = [("TRL, the fastest of its ways", ["trl", "trl_accumulated", "trl_recompute"], 1.3),
              ("transformers, packs", ["transformers"], 1.2),
              ("litgpt's GPT", ["litgpt"], 1.0),
              ("transformers, padded, in useful tokens", ["transformers_padded"], 2.0)]  # fmt: skip
    found = []
    for title, names, least in faster:
        ratios = [value for name in names if (value := ratio(record, name, "ours")) is not None]
        found.append({"target": f"tokens/s ÷ {title}", "at least": least, "found": min(ratios) if ratios else None})
    measured = [spent.get(name, {}) for name in ("ours", "trl", "trl_recompute")]
    share = None
    if all("peak" in row for row in measured[:2]):
        share = measured[0]["peak"] / min(row["peak"] for row in measured[1:] if "peak" in row)
    found.append(
        {"target": "peak memory of the step ÷ TRL's, the smallest of its ways", "at most": 0.6, "found": share}
    )
    for row in found:
        value, least, most = row["found"], row.get("at least"), row.get("at most")
        row["held"] = None if value is None else value >= least if least is not None else value <= most
    return found


def differing(content: dict[str, Any]) -> list[str]:
    """Losses that are not what they should be."""
    record, tolerance = content["contestants"], content["settings"]["tolerance"]
    mine = record["ours"]
    wrong = []
    for contestant in CONTESTANTS:
        row = record.get(contestant.name, {})
        names = ("loss of one document a pack", *["loss before", "loss after"] * contestant.isolates)
        wrong += [
            f"{contestant.title}: {name}: found {row[name]:.6f}, expected {mine[name]:.6f}"
            for name in names
            if name in row and abs(row[name] - mine[name]) > tolerance * abs(mine[name])
        ]
        if contestant.isolates and row.get("seen across documents", 0.0) > tolerance:
            wrong.append(f"{contestant.title}: sees across documents, by {row['seen across documents']:.2g}")
    return wrong


def table(lines: Sequence[Sequence[str]]) -> str:
    """Markdown; the first line is the head."""
    head, *body = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] + ["---:"] * (len(head) - 1), *body])


def speed_table(content: dict[str, Any]) -> str:
    """Step, tokens, ratios, share of the ceiling and losses."""
    record, settings = content["contestants"], content["settings"]
    head = ["", "step ms", "useful tokens/s", "× ours", "× ours compiled", "of the ceiling", "loss before", "after",
            "documents apart"]  # fmt: skip
    lines = [head]
    for name, row in record.items():
        if "not measured" in row:
            lines.append([row["title"], "not measured: " + row["not measured"], *[""] * (len(head) - 2)])
            continue
        median = statistics.median(row["seconds"])

        def times(to: str, name: str = name) -> str:
            value = ratio(record, name, to)
            return "" if value is None else f"{value:.2f}"

        reached = content["flops"] / median / content["ceiling"] if content["ceiling"] else None
        if name == "products":
            lines.append(
                [row["title"], f"{median * 1e3:.0f}", "", times("ours"), times("ours_compiled"), "1", "", "", ""]
            )
            continue
        apart = row["seen across documents"] <= settings["tolerance"]
        lines.append(
            [
                row["title"], f"{median * 1e3:.0f}", f"{settings['tokens'] / median:,.0f}", times("ours"),
                times("ours_compiled"), f"{reached:.0%}" if reached else "", f"{row['loss before']:.6f}",
                f"{row['loss after']:.6f}", "yes" if apart else "no",
            ]
        )  # fmt: skip
    lines.append([TITAN[0], "not measured: " + TITAN[1], *[""] * (len(head) - 2)])
    return table(lines)


def memory_table(spent: dict[str, Any]) -> str:
    """Peaks, absolute and above what weights, moments and gradients need."""
    lines = [["MiB", "peak of the process", "above the state", "tensors at peak", "tensors above the state"]]
    for row in spent.values():
        if "peak" not in row:
            lines.append([row["title"], "not measured: " + row["not measured"], "", "", ""])
            continue
        names = ("peak", "above state", "tensors at peak", "tensors above state")
        lines.append([row["title"], *(f"{row[name] / 2**20:,.0f}" for name in names)])
    return table(lines)


def profile_table(record: dict[str, Any]) -> str:
    """Milliseconds of a step by kind of operator."""
    profiled = [row for row in record.values() if "profile" in row]
    kinds = list(profiled[0]["profile"]["by kind"])
    rows = [[row["title"], *(f"{row['profile']['by kind'][kind]:.0f}" for kind in kinds)] for row in profiled]
    return table([["ms of a step", *kinds], *rows])


def report(content: dict[str, Any]) -> str:
    """The tables, from the record alone."""
    parts = ["## Speed", speed_table(content)]
    if content["memory"]:
        parts += [
            f"## Memory at a vocabulary of {content['settings']['memory_vocab']:,}",
            memory_table(content["memory"]),
        ]
    if any("profile" in row for row in content["contestants"].values()):
        parts += ["## Where the time goes", profile_table(content["contestants"])]
    lines = [["target", "limit", "found", ""]]
    for row in content["targets"]:
        limit = f"≥ {row['at least']}" if "at least" in row else f"≤ {row['at most']}"
        value = "not measured" if row["found"] is None else f"{row['found']:.2f}"
        lines.append([row["target"], limit, value, {True: "held", False: "MISSED", None: ""}[row["held"]]])
    parts += ["## Targets", table(lines)]
    parts += [f"WRONG: {line}" for line in content["differing"]]
    return "\n\n".join(parts)


def main() -> int:
    """Measure, print the tables, write the record.

    Returns:
        0, or 1 where a target was missed or a loss is another one.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="JSON file for the record")
    parser.add_argument("--peers", help="an interpreter with transformers and TRL")
    parser.add_argument("--litgpt", help="an interpreter with litgpt")
    parser.add_argument("--rounds", type=int, default=7, help="that count (default 7)")
    parser.add_argument("--profile", action="store_true", help="say what each spends its time on")
    parser.add_argument("--tiny", action="store_true", help="a network that shows that the parts fit together")
    given = parser.parse_args()
    cuda = torch.cuda.is_available()
    setting = TINY if given.tiny else GPU if cuda else CPU
    dtype = torch.bfloat16 if cuda else torch.float32
    cores = len(os.sched_getaffinity(0))
    pythons: dict[str, str | None] = {"here": sys.executable, "peers": given.peers, "litgpt": given.litgpt}
    names = [contestant.name for contestant in CONTESTANTS if not (given.tiny and "compiled" in contestant.name)]

    begin = time.monotonic()
    packs = made_packs(setting)
    lengths = [[len(document["tokens"]) for one in step for document in one] for step in packs["steps"]]
    flops = statistics.mean(train_flops(setting.config, step, sum(step) - len(step)) for step in lengths)
    about = environment(1, torch.device("cuda" if cuda else "cpu"))
    record: dict[str, Any] = {}
    content: dict[str, Any] = {
        "date": about["started"],
        "machine": {"device": about["device"], "processor": platform.machine(), "cores": cores,
                    "load before": os.getloadavg()},
        "versions": about["versions"] | {"python": about["python"]},
        "commit": about["commit"],
        "uncommitted changes": bool(about["uncommitted"]),
        "settings": {
            **asdict(setting),
            "parameters": parameter_count(setting.config),
            "dtype": str(dtype).removeprefix("torch."),
            "tokens": setting.pack_tokens * setting.packs,
            "document lengths": lengths,
            "rounds": given.rounds,
            "warmup": WARMUP,
            "threads": cores,
        },
        "flops": flops,
        "ceiling": None,
        "contestants": record,
        "memory": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "weights"
        lay_out(folder, setting, packs, dtype)
        with workers(names, pythons, folder, cores, record) as ready:
            losses(ready, record, "before")
            rounds(ready, record, given.rounds)
            losses(ready, record, "after")
            if given.profile:
                profiles(ready, record, WARMUP + given.rounds)
    if "seconds" in record["products"]:
        content["ceiling"] = record["products"]["flops"] / statistics.median(record["products"]["seconds"])
    content["memory"] = memory(setting, pythons, packs, dtype, cores)
    content["machine"]["load after"] = os.getloadavg()
    content["minutes"] = (time.monotonic() - begin) / 60
    content["targets"] = [] if given.tiny else targets(content)
    content["differing"] = differing(content)
    given.out.write_text(json.dumps(content, indent=1) + "\n")
    print(f"\n{report(content)}\n\n{content['minutes']:.1f} minutes; written to {given.out}")
    return 1 if content["differing"] or any(row["held"] is False for row in content["targets"]) else 0


if __name__ == "__main__":
    sys.exit(main())
