"""`PackedBatch`: one micro-batch, a flat pack of documents, and what the host knows about it.

Dimension letters: T tokens in the pack (of a part of it: T / parts), N document slots, n positions with a label.
Owns the layout and its invariants. Knows no files, no steps and no ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int32, Int64
from numpy.typing import NDArray
from torch import Tensor

from data.chatml import Example

PADDING_TOKENS = 64
"""Length of a padding document where slots allow: short, so that attention over padding costs next to
nothing."""


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """A pack of exactly T tokens, without a batch dimension, or a part of one. Checked at construction on the CPU.

    A part holds the tokens of one of `parts` equal slices, and what there is for each of them; what is said of
    documents (`cu_seqlens`, `max_seqlen`, `rows`, `lengths`) is said of the whole pack's.

    Args:
        tokens: ids, [T]; 0 in padding.
        labels: the token that follows in the same document, [T]; 0 at a document's last position and in
            padding.
        weights: weight of the loss on `labels`, [T]; 0 where there is none.
        positions: place in the document, from 0, [T].
        cu_seqlens: starts of the document slots in the pack, and its end, [N + 1]. N is the same for every batch of a
            run; slots that are not used lie at the end and are empty.
        max_seqlen: upper bound on a document's length: the pack's, so that compiled kernels see one value.
        rows: number of each slot's document in the prepared set, [N]; -1 for padding and empty slots.
        label_positions: where `weights` is not 0, ascending, [n]; known here so that the device is never
            asked.
        sources: number of each token's source, [T]; -1 in padding (never at a label position).
        lengths: tokens of each real document (on the host), in order.
        part: which slice of the pack this is, from 0.
        parts: number of its slices; 1 for a whole pack.
    """

    tokens: Int64[Tensor, "T"]
    labels: Int64[Tensor, "T"]
    weights: Float32[Tensor, "T"]
    positions: Int64[Tensor, "T"]
    cu_seqlens: Int32[Tensor, "bounds"]
    max_seqlen: int
    rows: Int64[Tensor, "N"]
    label_positions: Int64[Tensor, "n"]
    sources: Int64[Tensor, "T"]
    lengths: tuple[int, ...]
    part: int = 0
    parts: int = 1

    def __post_init__(self) -> None:
        if self.tokens.device.type == "cpu":
            self._check()

    def _check(self) -> None:
        size = len(self.tokens)
        whole, here = size * self.parts, slice(size * self.part, size * (self.part + 1))
        bounds, weights = self.cu_seqlens.numpy(), self.weights.numpy()
        if not 0 <= self.part < self.parts:
            raise ValueError(f"part is {self.part}; expected from 0 to below the {self.parts} parts")
        if any(len(t) != size for t in (self.labels, self.weights, self.positions, self.sources)):
            raise ValueError(f"tokens, labels, weights, positions and sources must all have {size} entries")
        if len(bounds) != len(self.rows) + 1:
            raise ValueError(f"cu_seqlens has {len(bounds)} entries for {len(self.rows)} rows; expected one more")
        if bounds[0] != 0 or bounds[-1] != whole or (np.diff(bounds) < 0).any():
            raise ValueError(f"cu_seqlens must rise from 0 to {whole}; found {bounds.tolist()}")
        if not 0 < np.diff(bounds).max() <= self.max_seqlen:
            raise ValueError(f"a document has {np.diff(bounds).max()} tokens, more than max_seqlen {self.max_seqlen}")
        starts = np.repeat(bounds[:-1], np.diff(bounds))
        if not np.array_equal(self.positions.numpy(), (np.arange(whole) - starts)[here]):
            raise ValueError("positions must count from 0 in each document")
        if not np.isfinite(weights).all() or (weights < 0).any():
            raise ValueError("weights must be finite and not negative")
        last = bounds[1:][np.diff(bounds) > 0] - 1 - here.start
        if weights[last[(last >= 0) & (last < size)]].any():
            raise ValueError("a document's last position has no label, so its weight must be 0")
        if not np.array_equal(self.label_positions.numpy(), np.flatnonzero(weights)):
            raise ValueError("label_positions must be where weights is not 0")
        if (self.sources.numpy()[self.label_positions.numpy()] < 0).any():
            raise ValueError("a label position has no source")
        used = np.diff(bounds)[self.rows.numpy() >= 0]
        if tuple(used.tolist()) != self.lengths:
            raise ValueError(f"lengths must be those of the slots with a row, {used.tolist()}")

    @property
    def documents(self) -> int:
        """Number of real documents."""
        return len(self.lengths)

    def cut(self, part: int, parts: int) -> "PackedBatch":
        """One of the equal slices of a whole pack, for whoever computes only that one.

        A document may begin in one slice and end in another: its positions go on counting.

        Args:
            part: which slice, from 0.
            parts: their number; divides T.

        Raises:
            ValueError: it does not, or this is no whole pack.
        """
        size, rest = divmod(len(self.tokens), parts)
        if rest or self.parts != 1:
            raise ValueError(f"a pack of {len(self.tokens)} tokens in {self.parts} parts cannot be cut into {parts}")
        begin, end = size * part, size * (part + 1)
        first, last = np.searchsorted(self.label_positions.numpy(), (begin, end))
        names = ("tokens", "labels", "weights", "positions", "sources")
        slices: dict[str, Any] = {name: getattr(self, name)[begin:end] for name in names}
        slices["label_positions"] = self.label_positions[first:last] - begin
        return replace(self, **slices, part=part, parts=parts)

    def to(self, device: torch.device | str) -> "PackedBatch":
        """Copy all tensors to a device; from pinned memory without waiting for the copy."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "PackedBatch":
        """Copy all tensors to page-locked memory, from which a copy to the device overlaps with computing."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> "PackedBatch":
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        values |= {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        return PackedBatch(**values)


def assemble(
    documents: Sequence[Example],
    capacity: int,
    slots: int,
    rows: Sequence[int] | NDArray[np.int64] | None = None,
    sources: Sequence[int] | NDArray[np.int64] | None = None,
) -> PackedBatch:
    """Lay documents one after another and fill the tail with short documents without weight.

    The tail is covered too, because kernels leave rows outside every document undefined, and NaN × 0 is NaN.

    Args:
        documents: what goes in; the weight of a label is its token's weight × the example's, in float64,
            rounded once.
        capacity: T.
        slots: N. With one slot more than documents or the pack full, there is always room for the padding.
        rows: number of each document in the prepared set; by default 0, 1, ….
        sources: number of each document's source; by default 0.

    Returns:
        The batch. Without documents it is padding alone, for a rank that has no pack left.

    Raises:
        ValueError: more tokens than `capacity` or more documents (with padding) than `slots`.
    """
    lengths = [len(document.tokens) for document in documents]
    real = sum(lengths)
    tail = capacity - real
    if tail < 0:
        raise ValueError(f"{len(documents)} documents have {real} tokens; the pack holds {capacity}")
    if len(documents) + (tail > 0) > slots:
        raise ValueError(f"{len(documents)} documents and {tail} tokens of padding do not fit into {slots} slots")
    pads = min(-(-tail // PADDING_TOKENS), slots - len(documents))
    padding = [tail // pads + (n < tail % pads) for n in range(pads)]
    empty = slots - len(documents) - pads
    sizes = np.array([*lengths, *padding, *[0] * empty], dtype=np.int64)
    bounds = np.concatenate([[0], np.cumsum(sizes)])

    tokens = np.zeros(capacity, np.int64)
    labels = np.zeros(capacity, np.int64)
    weights = np.zeros(capacity, np.float64)
    token_sources = np.full(capacity, -1, np.int64)
    if documents:
        tokens[:real] = np.concatenate([document.tokens for document in documents])
        scale = np.repeat([document.weight for document in documents], lengths)
        weighted = np.concatenate([document.weights for document in documents]) * scale
        labels[: real - 1] = tokens[1:real]
        weights[: real - 1] = weighted[1:]
        last = bounds[1 : len(documents) + 1] - 1
        labels[last] = 0
        weights[last] = 0
        token_sources[:real] = np.repeat([0] * len(documents) if sources is None else sources, lengths)
    rounded = weights.astype(np.float32)
    own = np.arange(len(documents)) if rows is None else np.asarray(rows, np.int64)
    return PackedBatch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        weights=torch.from_numpy(rounded),
        positions=torch.from_numpy(np.arange(capacity) - np.repeat(bounds[:-1], sizes)),
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        max_seqlen=capacity,
        rows=torch.from_numpy(np.concatenate([own, np.full(pads + empty, -1, np.int64)])),
        label_positions=torch.from_numpy(np.flatnonzero(rounded)),
        sources=torch.from_numpy(token_sources),
        lengths=tuple(lengths),
    )
