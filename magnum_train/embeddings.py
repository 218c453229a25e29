"""Rows of control tokens in a checkpoint's embedding and output matrices: measured, and mended where untrained.

A base model has ids that no text ever used. Their rows are zero, or what a random start has left; a conversation is
full of two of them. A zero row meets a norm whose epsilon is all that is left of it, and the first gradients explode.
So at load, once, before the first step, such rows are set to the mean of the rows of ordinary text. Runs under the
process group, on weights that are already sharded by rows.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from data import Tokenizer
from magnum_train.errors import CheckpointError
from model import Transformer
from model.hf import local_region

MATRICES = ("tok_embeddings", "output")
NOISE = 0.01
"""Spread of the noise that tells mended rows apart, as a share of the root mean square of ordinary rows."""
_ROWS_AT_ONCE = 4096  # of a matrix, in float64: 160 MiB at Nemo's width


@dataclass(frozen=True)
class Mended:
    """What was found in one matrix, and what was done.

    Args:
        ordinary: Rows of ordinary text that are not zero.
        measured: Rows that no text yields: control tokens', and those beyond the vocabulary.
        median: Median norm of the ordinary rows.
        low: Below this norm a ChatML row counts as untrained.
        high: Above this norm too.
        mean: Norm of the mean of the ordinary rows.
        norms: Norm of each control token's row as it was found, by name.
        mended: Ids whose rows were set anew.
    """

    ordinary: int
    measured: int
    median: float
    low: float
    high: float
    mean: float
    norms: dict[str, float]
    mended: list[int]

    def record(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """As a JSON object: the tokens that conversations use by name, the others by spans of ids, ends included."""
        used = {n: i for n, i in tokenizer.controls.items() if i in (tokenizer.bos_id, *_chatml(tokenizer))}
        return {
            "ordinary_rows": self.ordinary,
            "median_norm": self.median,
            "mean_row_norm": self.mean,
            "trained_between": [self.low, self.high],
            "norm_found": {name: self.norms[name] for name in used},
            "mended": {name: id_ for name, id_ in used.items() if id_ in self.mended},
            "others_mended": _spans(id_ for id_ in self.mended if id_ not in used.values()),
        }


def _spans(ids: Iterable[int]) -> list[list[int]]:
    """Ascending ids as [first, last] of each run of neighbours."""
    spans: list[list[int]] = []
    for id_ in ids:
        if spans and spans[-1][1] == id_ - 1:
            spans[-1][1] = id_
        else:
            spans.append([id_, id_])
    return spans


def _chatml(tokenizer: Tokenizer) -> tuple[int, int]:
    """The ids that open and close a message."""
    return tokenizer.im_start_id, tokenizer.im_end_id


@torch.no_grad()
def mend(model: Transformer, tokenizer: Tokenizer, seed: int, *, new_chatml: bool) -> dict[str, Mended]:
    """Measure the rows of all control tokens in both matrices, and set the untrained ones. All ranks call.

    A row counts as untrained where its norm is below a thousandth of the ordinary rows' median. Where `<|im_start|>`
    and `<|im_end|>` are new to these weights, theirs count as untrained too where the norm is far off: below half of
    the least, or above twice the most, that ordinary rows have (a hundredth of them on each side left out). Other
    control tokens are spared that second test: the row of `<s>` may well be unlike all others, and is trained. So are
    ChatML tokens that came with the weights: a row that a first stage of training began at the mean is short as well.

    The new value is the mean of the ordinary rows that are not zero, in float64, plus normal noise of `NOISE` times
    their root mean square, from a generator seeded by the run's seed, the matrix and the id: the same whatever the
    number of ranks. Rows beyond the tokenizer's vocabulary are treated as other control tokens.

    Args:
        model: With weights loaded, sharded by rows.
        tokenizer: Its control tokens are the ones measured.
        seed: The run's.
        new_chatml: Whether the ChatML tokens were given to these weights just now.

    Returns:
        By matrix, what was found and done; the same on all ranks.

    Raises:
        CheckpointError: A matrix has a row that is not finite, or none that is trained.
    """
    return {
        matrix: _mend(getattr(model, matrix).weight, matrix, tokenizer, seed, new_chatml=new_chatml)
        for matrix in MATRICES
    }


def _mend(weight: Tensor, matrix: str, tokenizer: Tokenizer, seed: int, *, new_chatml: bool) -> Mended:
    local, (first, *_) = local_region(weight)
    size, dim = weight.shape
    controls = torch.zeros(size, dtype=torch.bool)
    controls[sorted(tokenizer.control_ids)] = True
    controls[tokenizer.vocab_size :] = True  # no text yields them
    mine = controls[first : first + local.shape[0]].to(local.device)

    # One sum over ranks carries all: each row's square norm, then the sum over ordinary rows of each column.
    sums = torch.zeros(size + dim, dtype=torch.float64, device=local.device)
    if not isinstance(weight, DTensor) or all(
        weight.device_mesh.get_local_rank(i) == 0 or p.is_shard() for i, p in enumerate(weight.placements)
    ):  # copies of a shard must not be added up
        for start in range(0, local.shape[0], _ROWS_AT_ONCE):
            part = local[start : start + _ROWS_AT_ONCE].double()
            sums[first + start : first + start + part.shape[0]] = part.square().sum(dim=1)
            sums[size:] += part[~mine[start : start + _ROWS_AT_ONCE]].sum(dim=0)
    dist.all_reduce(sums)
    norms, total = sums[:size].sqrt().cpu(), sums[size:]

    if not bool(norms.isfinite().all()):
        row = int(norms.isfinite().logical_not().nonzero()[0])
        raise CheckpointError(
            f"{matrix} of the weights, row {row}", f"norm {norms[row]}", "a finite one", "Fetch them again."
        )
    ordinary = norms[~controls & (norms > 0)]
    if not len(ordinary):
        raise CheckpointError(f"{matrix} of the weights", "zeros alone", "rows of trained tokens", "Fetch them again.")
    mean = total / len(ordinary)
    low, high = 0.5 * float(ordinary.quantile(0.01)), 2 * float(ordinary.quantile(0.99))
    untrained = controls & (norms < ordinary.median() / 1000)
    for id_ in _chatml(tokenizer) if new_chatml else ():
        untrained[id_] |= not low <= float(norms[id_]) <= high

    spread = NOISE * float((ordinary.square().mean() / dim).sqrt())
    for id_ in untrained.nonzero().flatten().tolist():
        if first <= id_ < first + local.shape[0]:
            digest = hashlib.sha256(f"{seed}/{matrix}/{id_}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)  # 63 bits: a signed seed
            noise = torch.randn(dim, generator=generator, dtype=torch.float64) * spread
            local[id_ - first] = (mean + noise.to(mean.device)).to(local.dtype)
    return Mended(
        ordinary=len(ordinary), measured=int(controls.sum()), median=float(ordinary.median()), low=low, high=high,
        mean=float(mean.norm()), norms={name: float(norms[id_]) for name, id_ in tokenizer.controls.items()},
        mended=untrained.nonzero().flatten().tolist(),
    )  # fmt: skip


def summary(found: dict[str, Mended], tokenizer: Tokenizer) -> str:
    """What a person should know of it, in one line a matrix."""
    lines = []
    for matrix, rows in found.items():
        used = [tokenizer.decode([id_]) for id_ in _chatml(tokenizer) if id_ in rows.mended]
        what = f"{len(rows.mended):,} of {rows.measured:,} rows that no text yields were untrained"
        named = f" ({', '.join(used)} among them)" if used else ""
        done = " and begin at the mean of the others" if rows.mended else ""
        lines.append(f"{matrix}: {what}{named}{done}; median norm of {rows.ordinary:,} ordinary rows {rows.median:.3f}")
    return "\n".join(lines)
