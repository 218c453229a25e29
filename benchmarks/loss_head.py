"""The loss head beside the plain one at Nemo's vocabulary: time, peak memory, and whether both say the same.

    python benchmarks/loss_head.py OUT.json [--rounds 7]

Forward and backward from hidden states to the gradients of hidden states and output matrix. Plain: all logits, float32
cross-entropy. Ours: `model.loss`. On CUDA also Liger's fused linear cross-entropy, where it can be imported. In turns
in one process, medians; memory is what the allocator hands out beyond what was there before, once by itself. Float32 on
a CPU (1,024 tokens), bfloat16 on CUDA (8,192). Exit status 1: a target was missed, or numbers differ.
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# The command stands alone, in a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from magnum_train.environment import environment
from model.loss import linear_cross_entropy

VOCABULARY = 131_072
WARMUP = 1
MOST_TIME, MOST_MEMORY, VALUE, GRADIENT = 1.2, 0.3, 1e-6, 1e-5
"""Targets on a CPU in float32: time and peak of ours over the plain head's; relative errors."""
MEMORY_DIM = 256
"""Where the target for memory counts: the width of the small model. The wider the network, the more of the peak is the
matrix's gradient, which no head can do without."""

Head = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""The weighted sum, of hidden states, output matrix, labels and weights."""


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    return (F.cross_entropy((hidden @ weight.t()).float(), labels, reduction="none") * weights).sum()


def ours(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, weight, labels, weights).total


def liger(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """With its sums over chunks in float32, as ours; it knows no weights but 0, and where that is it skips labels."""
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    head = LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)
    total: Tensor = head(weight, hidden, labels.where(weights != 0, -100))
    return total


def contenders(device: torch.device) -> dict[str, Head]:
    there = device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None
    return {"plain": plain, "ours": ours} | ({"liger": liger} if there else {})


def inputs(tokens: int, dim: int, share: float, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Weights are 1 for a share of the tokens, in spans as replies are, and 0 for the others."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, dim, generator=generator)
    weight = torch.randn(VOCABULARY, dim, generator=generator) / dim**0.5
    labels = torch.randint(VOCABULARY, (tokens,), generator=generator)
    weights = (torch.arange(tokens) % 128 >= 128 * (1 - share)).float()
    hidden, weight = (x.to(device, dtype).requires_grad_() for x in (hidden, weight))
    return [hidden, weight, labels.to(device), weights.to(device)]


def outcome(head: Head, given: list[Tensor]) -> list[Tensor]:
    total = head(*given)
    return [total.detach(), *torch.autograd.grad(total, given[:2])]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(head: Head, given: list[Tensor], device: torch.device) -> tuple[float, float]:
    """By the wall's clock, and of processors; on a busy machine the second says more."""
    synchronize(device)
    begin, worked = time.perf_counter(), time.process_time()
    outcome(head, given)
    synchronize(device)
    return time.perf_counter() - begin, time.process_time() - worked


def peak_bytes(head: Head, given: list[Tensor], device: torch.device) -> int:
    """The most that was held at once, beyond what was there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        outcome(head, given)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as looked:
        outcome(head, given)
    events = [event for event in looked.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def measure(row: dict[str, Any], rounds: int, device: torch.device, dtype: torch.dtype) -> None:
    given = inputs(row["tokens"], row["dim"], row["share"], device, dtype)
    heads = contenders(device)
    reference = outcome(plain, given)
    names = ("value", "hidden", "weight")
    row["heads"] = {
        name: {"peak_bytes": peak_bytes(head, given, device), "seconds": [], "processor_seconds": []}
        for name, head in heads.items()
    }
    for name, head in heads.items():
        found = outcome(head, given)
        row["heads"][name]["errors"] = dict(zip(names, map(error, found, reference), strict=True))
    del reference
    for number in range(WARMUP + rounds):
        order = list(heads.items())
        for name, head in order if number % 2 else order[::-1]:
            took, worked = seconds(head, given, device)
            if number >= WARMUP:
                row["heads"][name]["seconds"].append(took)
                row["heads"][name]["processor_seconds"].append(worked)
    plain_one = row["heads"]["plain"]
    for found in row["heads"].values():
        found["median_seconds"] = statistics.median(found["seconds"])
        found["memory_ratio"] = found["peak_bytes"] / plain_one["peak_bytes"]
        # By the round, so that whatever slows the machine down for a while slows both.
        for kind, ratio in (("seconds", "time_ratio"), ("processor_seconds", "processor_ratio")):
            pairs = zip(found[kind], plain_one[kind], strict=True)
            found[ratio] = statistics.median(mine / theirs for mine, theirs in pairs)


def missed(row: dict[str, Any], device_type: str) -> list[str]:
    """Targets that a row does not hold; they are the CPU's."""
    if device_type != "cpu":
        return []
    found = row["heads"]["ours"]
    held = {
        f"time {found['time_ratio']:.2f}": found["time_ratio"] <= MOST_TIME,
        f"memory {found['memory_ratio']:.2f}": found["memory_ratio"] <= MOST_MEMORY or row["dim"] != MEMORY_DIM,
        f"value off by {found['errors']['value']:.1g}": found["errors"]["value"] <= VALUE,
        "gradients": max(found["errors"]["hidden"], found["errors"]["weight"]) <= GRADIENT,
    }
    return [f"D={row['dim']}, {row['share']:.0%} labelled: {what}" for what, fine in held.items() if not fine]


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| head | labelled | D | seconds | × plain | × plain, processors | peak MiB | × plain | value | gradients |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        for name, found in row["heads"].items():
            errors = found["errors"]
            lines.append(
                f"| {name} | {row['share']:.0%} | {row['dim']:,} | {found['median_seconds']:.3f} | "
                f"{found['time_ratio']:.2f} | {found['processor_ratio']:.2f} | {found['peak_bytes'] / 2**20:,.0f} | "
                f"{found['memory_ratio']:.2f} | {errors['value']:.1e} | {max(errors['hidden'], errors['weight']):.1e} |"
            )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT.json")
    parser.add_argument("--rounds", type=int, default=7, help="of each row, after one of warm-up (default 7)")
    given = parser.parse_args()
    cuda = torch.cuda.is_available()
    device, dtype = (torch.device("cuda", 0), torch.bfloat16) if cuda else (torch.device("cpu"), torch.float32)
    tokens, dims = (8192, (4096, 5120)) if cuda else (1024, (256, 512))
    rows: list[dict[str, Any]] = [
        {"tokens": tokens, "vocabulary": VOCABULARY, "dim": dim, "share": share, "dtype": str(dtype)}
        for dim in dims
        for share in (1.0, 0.5)
    ]
    about = environment(1, device)
    content = {"date": about["started"], "device": about["device"], "threads": about["threads"],
               "python": about["python"], "versions": about["versions"], "commit": about["commit"],
               "uncommitted_changes": bool(about["uncommitted"]), "rounds": given.rounds,
               "load_before": os.getloadavg(), "rows": rows}  # fmt: skip
    for row in rows:
        measure(row, given.rounds, device, dtype)
    content["load_after"] = os.getloadavg()
    content["missed"] = [what for row in rows for what in missed(row, device.type)]
    given.out.write_text(json.dumps(content, indent=1) + "\n")
    print(table(rows))
    print("\n".join(["", *(f"missed: {what}" for what in content["missed"]), f"written to {given.out}"]))
    return 1 if content["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())
