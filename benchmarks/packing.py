"""Packing and the order of the data: speed, fill, randomness, balance over ranks, and the loader's pace.

    python benchmarks/packing.py OUT.json [--documents 1000000] [--rounds 3]

Prints tables and writes the record with every raw timing. TRL's `bfd` is timed beside ours, in turn and in the
same process, where `trl` can be imported: its environment also needs the project's numpy, torch, tokenizers,
jaxtyping and safetensors, and the project itself need not be installed. Without it that part is listed as not
run. All lengths are drawn from log-normal distributions with fixed seeds. Exit status 1: a target was missed.
"""

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The command stands alone, in a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from numpy.typing import NDArray

from data.documents import COLUMNS, Documents, map_part
from data.loader import Cost, Loader, Schedule, StepMaker, assign
from data.packing import PACKINGS, Packs, next_fit, pack, pack_flat
from model import TransformerConfig
from model.flops import block_matmul_parameters

CAPACITY = 8192

RANKS, SLOTS = 8, 16
"""Of a step, where balance is measured."""

SHUFFLES = 10
"""Of the control; their spread is its standard error."""

NEMO = TransformerConfig(
    dim=5120, n_layers=40, n_heads=32, n_kv_heads=8, head_dim=128, hidden_dim=14336, vocab_size=131072
)

NEMO_COST = Cost(
    per_token=6.0 * block_matmul_parameters(NEMO),
    per_square=6.0 * NEMO.n_layers * NEMO.n_heads * NEMO.head_dim,
    per_label=6.0 * NEMO.vocab_size * NEMO.dim,
)
"""In floating-point operations, as `model.flops` counts them."""

Ints = NDArray[np.int64]
Row = dict[str, Any]


def log_normal(count: int, median: float, sigma: float, most: int) -> Ints:
    """Lengths from 2 to `most`: a document's first token bears no loss, so one alone teaches nothing."""
    drawn = np.random.default_rng(0).lognormal(np.log(median), sigma, count)
    return np.clip(drawn.astype(np.int64), 2, most)


# Speed and fill


@dataclass(frozen=True)
class Packer:
    """One of those that are timed.

    Args:
        name: of the row.
        what: what the clock counts.
        run: packs with the seed given; returns the number of packs.
        calls: in each round.
    """

    name: str
    what: str
    run: Callable[[int], int]
    calls: int = 1


def our_packers(lengths: Ints) -> list[Packer]:
    return [
        Packer("pack", "lengths -> lists of indices", lambda seed: len(pack(lengths, CAPACITY, seed)), 2),
        Packer("pack_flat", "lengths -> arrays of indices", lambda seed: len(pack_flat(lengths, CAPACITY, seed)), 2),
        Packer("next_fit", "lengths -> lists of indices", lambda seed: len(next_fit(lengths, CAPACITY, seed)), 2),
    ]


def trl_packers(lengths: Ints) -> list[Packer]:
    """TRL's `bfd`, first as alone as it can be: on lists of nulls, whose values take no memory and no time to move."""
    import datasets
    import pyarrow as pa
    from trl.data_utils import _pack_bfd, pack_dataset

    datasets.disable_caching()
    datasets.disable_progress_bars()
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    tokens = int(lengths.sum())
    bare = pa.table({"input_ids": pa.ListArray.from_arrays(offsets, pa.nulls(tokens))})
    full = pa.table({"input_ids": pa.ListArray.from_arrays(offsets, pa.array(np.zeros(tokens, np.int8)))})
    dataset = datasets.Dataset(full)

    def mapped(batch_size: int) -> int:
        options = {"batch_size": batch_size, "keep_in_memory": True}
        return len(pack_dataset(dataset, CAPACITY, strategy="bfd", map_kwargs=options))

    return [
        Packer(
            "TRL bfd, decisions", "_pack_bfd, all rows, lists of nulls", lambda _: _pack_bfd(bare, CAPACITY).num_rows
        ),
        Packer("TRL bfd, one batch", "pack_dataset, all rows, int8 tokens in memory", lambda _: mapped(len(lengths))),
        Packer("TRL bfd, default", "pack_dataset, batches of 1,000 rows, the same", lambda _: mapped(1000)),
    ]


def speed(documents: int, rounds: int) -> list[Row]:
    lengths = log_normal(documents, 600, 1.0, CAPACITY)
    mine, theirs = our_packers(lengths), []
    if importlib.util.find_spec("trl") is not None:
        theirs = trl_packers(lengths)
    seconds: dict[str, list[float]] = {packer.name: [] for packer in [*mine, *theirs]}
    cpu: dict[str, list[float]] = {name: [] for name in seconds}
    packs: dict[str, int] = {}

    def once(packer: Packer, number: int) -> None:
        gc.collect()
        start, start_cpu = time.perf_counter(), time.process_time()
        packs[packer.name] = packer.run(number)
        seconds[packer.name].append(time.perf_counter() - start)
        cpu[packer.name].append(time.process_time() - start_cpu)

    for round_ in range(rounds):
        for other in theirs or [None]:
            for packer in mine:
                for call in range(packer.calls):
                    once(packer, round_ * packer.calls + call)
            if other is not None:
                once(other, round_)
    own = statistics.median(seconds["pack"])
    return [
        {
            "packer": packer.name,
            "timed": packer.what,
            "seconds": statistics.median(seconds[packer.name]),
            "times pack": statistics.median(seconds[packer.name]) / own,
            "CPU seconds": statistics.median(cpu[packer.name]),
            "packs": packs[packer.name],
            "fill": lengths.sum() / (packs[packer.name] * CAPACITY),
            "all seconds": seconds[packer.name],
            "all CPU seconds": cpu[packer.name],
        }
        for packer in [*mine, *theirs]
    ]


# Randomness


def order_measures(lengths: Ints, packs: Packs) -> dict[str, float]:
    """Correlations that a random order would not have; see the head of the table."""
    ordered, pack_of, sizes = lengths[packs.members].astype(np.float64), packs.pack_of(), np.diff(packs.bounds)
    same = pack_of[1:] == pack_of[:-1]
    several = sizes[pack_of] > 1
    place = (np.arange(len(ordered)) - packs.bounds[pack_of])[several] / (sizes[pack_of][several] - 1)
    means = np.add.reduceat(ordered, packs.bounds[:-1]) / sizes
    firsts = ordered[packs.bounds[:-1]]
    pairs = {
        "neighbours in a pack": (ordered[:-1][same], ordered[1:][same]),
        "the same, of log length": (np.log(ordered[:-1][same]), np.log(ordered[1:][same])),
        "length and place in the pack": (ordered[several], place),
        "mean lengths of packs in turn": (means[:-1], means[1:]),
        "first lengths of packs in turn": (firsts[:-1], firsts[1:]),
    }
    return {name: float(np.corrcoef(*both)[0, 1]) for name, both in pairs.items()}


def together(packs: Packs) -> Ints:
    """Each pair of documents that share a pack, as one number, ascending."""
    pack_of, found = packs.pack_of(), []
    for apart in range(1, int(np.diff(packs.bounds).max())):
        same = np.flatnonzero(pack_of[apart:] == pack_of[:-apart])
        one, other = packs.members[same], packs.members[same + apart]
        found.append(np.minimum(one, other) << 32 | np.maximum(one, other))
    return np.sort(np.concatenate(found))


def meeting_again(epochs: list[Packs]) -> tuple[float, float]:
    """Pairs that share a pack in two epochs ÷ those that chance brings together, and the standard error."""
    pairs, documents = [together(packs) for packs in epochs], len(epochs[0].members)
    both = [(one, other) for number, one in enumerate(pairs) for other in pairs[:number]]
    met = sum(len(np.intersect1d(*two, assume_unique=True)) for two in both)
    chance = sum(len(one) * len(other) for one, other in both) / (documents * (documents - 1) / 2)
    return met / chance, max(met, 1) ** 0.5 / chance


def randomness(documents: int) -> list[Row]:
    lengths = log_normal(documents, 600, 1.0, CAPACITY)
    rng = np.random.default_rng(1)

    def shuffled(packs: Packs) -> Packs:
        return Packs(rng.permutation(packs.members), packs.bounds)

    def row(measure: str, found: dict[str, float], control: float, error: float) -> Row:
        return {"measure": measure, **found, "best_fit's packs, shuffled": control, "standard error": error}

    packings = {way: pack_flat(lengths, CAPACITY, 1, packing=way) for way in PACKINGS}
    found = {way: order_measures(lengths, packs) for way, packs in packings.items()}
    controls = [order_measures(lengths, shuffled(packings["best_fit"])) for _ in range(SHUFFLES)]
    rows = []
    for name in controls[0]:
        values = [control[name] for control in controls]
        measured = {way: measures[name] for way, measures in found.items()}
        rows.append(row(name, measured, statistics.mean(values), statistics.stdev(values)))
    # How many pairs chance brings together does not depend on the number of documents; more epochs give more.
    some = lengths[: max(documents // 10, 1)]
    epochs = {way: [pack_flat(some, CAPACITY, seed, packing=way) for seed in range(8)] for way in PACKINGS}
    times = {way: meeting_again(packs)[0] for way, packs in epochs.items()}
    control, error = meeting_again([shuffled(packs) for packs in epochs["best_fit"]])
    rows.append(row("pairs that meet again, times chance", times, control, error))
    return rows


# Balance over ranks


def plain_documents(lengths: Ints, labels: Ints) -> Documents:
    """Documents of which nothing is known but their lengths and how many tokens bear a loss."""
    count = len(lengths)
    return Documents(
        tokens=np.zeros(0, np.int32), weights=np.zeros(0, np.float32), starts=np.zeros(count, np.int64),
        lengths=lengths, sources=np.zeros(count, np.int64), rows=np.arange(count), scales=np.ones(count),
        weight_sums=labels.astype(np.float64), weighted_tokens=labels,
    )  # fmt: skip


def excess(costs: list[Any], deal: Callable[[Any], list[list[int]]]) -> float:
    """Σ over micro-batches of the slowest rank's cost ÷ Σ of the mean. `costs`: true and dealt by, of each step."""
    slowest = mean = 0.0
    for true, believed in costs:
        slots = np.array([true[mine] for mine in deal(believed)])
        slowest += float(slots.max(axis=0).sum())
        mean += float(slots.mean(axis=0).sum())
    return slowest / mean


def balance(documents: int) -> list[Row]:
    """Packs of 16,384 under the cost of Nemo 12B, with 20 to 90 % of a document's tokens bearing a loss."""
    capacity, per_step = 16384, RANKS * SLOTS
    issue_cost = Cost(NEMO_COST.per_token, NEMO_COST.per_square)
    rows = []
    for median, sigma in ((600, 1.0), (600, 1.4), (2500, 1.0), (6000, 1.0)):
        lengths = log_normal(documents // 4, median, sigma, capacity)
        shares = np.random.default_rng(2).uniform(0.2, 0.9, len(lengths))
        made = plain_documents(lengths, np.maximum((shares * lengths).astype(np.int64), 1))
        schedule = Schedule(
            lengths, pack_tokens=capacity, pack_documents=128, packs_per_step=per_step, seed=0, epochs=1, max_steps=None
        )
        packs = schedule.packing(0)
        whole = len(packs) // per_step * per_step
        squares, full = (
            cost.of(packs, made, capacity)[:whole].reshape(-1, per_step) for cost in (issue_cost, NEMO_COST)
        )

        def by_cost(costs: Any) -> list[list[int]]:
            return assign(costs, RANKS, SLOTS)

        def as_they_come(costs: Any) -> list[list[int]]:
            return np.arange(per_step).reshape(SLOTS, RANKS).T.tolist()

        by_squares = list(zip(squares, squares, strict=True))
        by_full = list(zip(full, full, strict=True))
        rows.append(
            {
                "median": median,
                "sigma": sigma,
                "longest": int(lengths.max()),
                "steps": len(squares),
                "dealt by cost": excess(by_squares, by_cost),
                "as they come": excess(by_squares, as_they_come),
                "with labels: dealt by full cost": excess(by_full, by_cost),
                "by squares alone": excess(list(zip(full, squares, strict=True)), by_cost),
                "with labels: as they come": excess(by_full, as_they_come),
            }
        )
    return rows


# The loader


def written(folder: Path, lengths: Ints) -> None:
    """Lay documents of random tokens out on disk as prepared ones are."""
    rng, total = np.random.default_rng(3), int(lengths.sum())
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    weights = (rng.random(total, np.float32) < 0.5).astype(np.float32)
    weights[starts], weights[starts + lengths - 1] = 0.0, 1.0
    sums = np.add.reduceat(weights, starts, dtype=np.float64)
    columns: dict[str, Any] = {
        "starts": starts, "lengths": lengths, "sources": rng.integers(0, 5, len(lengths)),
        "rows": np.arange(len(lengths)), "scales": np.ones(len(lengths)), "weight_sums": sums, "weighted_tokens": sums,
    }  # fmt: skip
    (folder / "train").mkdir()
    np.save(folder / "tokens.npy", rng.integers(0, NEMO.vocab_size, total, np.int32))
    np.save(folder / "weights.npy", weights)
    for name, kind in COLUMNS.items():
        np.save(folder / "train" / f"{name}.npy", columns[name].astype(kind))


def forget(folder: Path) -> None:
    """Ask the kernel to drop these files from memory, so that the next reader waits for the disk."""
    for file in folder.rglob("*.npy"):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def loader_pace(documents: int) -> list[Row]:
    """Tokens that one process turns from mapped files into checked batches, in a second."""
    lengths = log_normal(documents, 600, 1.0, CAPACITY)
    rows = []
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        written(folder, lengths)
        for files in ("not in memory", "in memory", "in memory", "in memory", "in memory", "in memory"):
            if files == "not in memory":
                forget(folder)
            train = map_part(folder, "train", documents)
            schedule = Schedule(
                train.lengths, pack_tokens=CAPACITY, pack_documents=128, packs_per_step=16, seed=0, epochs=1,
                max_steps=None,
            )  # fmt: skip
            loader = Loader(train, schedule, StepMaker(5, CAPACITY, 128, cost=NEMO_COST))
            schedule.packing(0)
            start = time.perf_counter()
            tokens = sum(loader.step(step, 0, 1).tokens for step in range(schedule.total_steps))
            seconds = time.perf_counter() - start
            rows.append(
                {"files": files, "tokens": tokens, "seconds": seconds, "million tokens/s": tokens / seconds / 1e6}
            )
    return rows


# The whole


def table(rows: list[Row]) -> str:
    """Rows in Markdown; lists are for the record alone."""

    def cell(value: Any) -> str:
        return f"{value:.5g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)

    names = [name for name, value in rows[0].items() if not isinstance(value, list)]
    lines = [names, ["---"] * len(names), *([cell(row[name]) for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def missed(record: dict[str, Any]) -> list[str]:
    """Targets that were not met."""
    by_name = {row["packer"]: row for row in record["speed"]}
    order = {row["measure"]: row for row in record["randomness"]}
    neighbours = order["neighbours in a pack"]
    claims = {
        "pack fills at least 99.5 %": by_name["pack"]["fill"] >= 0.995,
        "pack takes under 2 s": by_name["pack"]["seconds"] < 2,
        "TRL's bfd takes at least ten times as long": all(
            row["times pack"] >= 10 for name, row in by_name.items() if name.startswith("TRL")
        ),
        "neighbours in a pack correlate as those of next fit do": abs(neighbours["best_fit"] - neighbours["next_fit"])
        < 0.05,
        "pairs meet again as chance has it": order["pairs that meet again, times chance"]["best_fit"] < 1.2,
        "the slowest rank costs at most 3 % more": all(row["dealt by cost"] <= 1.03 for row in record["balance"]),
        "a loader makes at least 0.5 million tokens/s": all(row["million tokens/s"] >= 0.5 for row in record["loader"]),
    }
    return [claim for claim, held in claims.items() if not held]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="JSON file for the record")
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    versions = {}
    for name in ("numpy", "torch", "trl", "datasets", "pyarrow"):
        if importlib.util.find_spec(name) is not None:
            versions[name] = importlib.metadata.version(name)
    record: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "load before": os.getloadavg()},
        "versions": {"python": platform.python_version()} | versions,
        "documents": args.documents,
    }
    parts = {
        "balance": lambda: balance(args.documents),
        "randomness": lambda: randomness(args.documents),
        "loader": lambda: loader_pace(max(args.documents // 20, 1)),
        "speed": lambda: speed(args.documents, args.rounds),
    }
    for name, part in parts.items():
        record[name] = part()
        print(f"\n## {name}\n\n{table(record[name])}", flush=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    if "trl" not in versions:
        print("\nTRL was not run: trl cannot be imported here")
    record["machine"]["load after"] = os.getloadavg()
    record["missed"] = missed(record)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    for claim in record["missed"]:
        print(f"MISSED: {claim}")
    sys.exit(bool(record["missed"]))


if __name__ == "__main__":
    main()
