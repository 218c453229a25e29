"""Which packs a rank sees at a step, as pure functions of (seed, epoch, step), and their batches.

Nothing is replayed to resume: the state of the data is the step's number. Owns the packing of each epoch, the
sharing out over ranks and the scaling of loss weights. Rank and world size are plain numbers handed in; knows
no process groups and no devices.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64
from numpy.typing import NDArray

from data.batch import PackedBatch, assemble
from data.packing import pack
from data.prepared import Documents

LOSS_NORMS = ("tokens", "sequences", "micro_batch_2024")

_KEPT_PACKINGS = 2
"""Packings kept in memory: the ledger asks for the epoch before the one that is trained."""


class Schedule:
    """Packs of each step of a run, each document exactly once an epoch.

    Every epoch is packed anew. Its last step may have fewer packs than the others; it is trained all the
    same.

    Args:
        lengths: tokens of each document.
        pack_tokens: tokens of a pack.
        pack_documents: most documents in a pack.
        packs_per_step: packs of a step on all ranks together.
        seed: the run's seed.
        epochs: number of passes; None where `max_steps` alone decides.
        max_steps: most steps; None for all of the epochs'.

    Attributes:
        total_steps: steps of the run, known before the first.

    Raises:
        ValueError: a number below 1, neither epochs nor max_steps, or no documents.
    """

    def __init__(
        self,
        lengths: NDArray[np.int64],
        *,
        pack_tokens: int,
        pack_documents: int,
        packs_per_step: int,
        seed: int,
        epochs: int | None,
        max_steps: int | None,
    ) -> None:
        if epochs is None and max_steps is None:
            raise ValueError("neither epochs nor max_steps is given; expected at least one of them")
        limits = {"packs_per_step": packs_per_step, "epochs": epochs, "max_steps": max_steps}
        for name, value in limits.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")
        if not len(lengths):
            raise ValueError("there are no documents to pack; expected at least one")
        self.pack_tokens, self.pack_documents, self.packs_per_step = (
            pack_tokens,
            pack_documents,
            packs_per_step,
        )
        self._lengths, self._seed = np.asarray(lengths, np.int64), seed
        self._packings: dict[int, list[list[int]]] = {}
        self._starts = [0]  # first step of each epoch whose packing is known, and the first after them
        if epochs is None:
            assert max_steps is not None
            self.total_steps = max_steps
        else:
            for epoch in range(epochs):
                self._starts.append(self._starts[-1] + self._steps_in(epoch))
                if max_steps is not None and self._starts[-1] >= max_steps:
                    break
            self.total_steps = self._starts[-1] if max_steps is None else min(self._starts[-1], max_steps)

    def packing(self, epoch: int) -> list[list[int]]:
        """All packs of an epoch, in order, as lists of document numbers."""
        if epoch not in self._packings:
            name = f"packing {self._seed} {epoch}"
            seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
            packs = pack(self._lengths, self.pack_tokens, seed, max_documents=self.pack_documents)
            while len(self._packings) >= _KEPT_PACKINGS:
                del self._packings[next(iter(self._packings))]
            self._packings[epoch] = packs
        return self._packings[epoch]

    def locate(self, step: int) -> tuple[int, list[list[int]]]:
        """What a step trains.

        Args:
            step: from 0 to below `total_steps`.

        Returns:
            Its epoch, from 0, and its packs: `packs_per_step` of them, or fewer at an epoch's end.

        Raises:
            ValueError: the step is out of range.
        """
        if not 0 <= step < self.total_steps:
            raise ValueError(f"step is {step}; expected from 0 to below {self.total_steps}")
        epoch, first = self._epoch_of(step)
        start = (step - first) * self.packs_per_step
        return epoch, self.packing(epoch)[start : start + self.packs_per_step]

    def done(self, steps: int) -> tuple[int, list[list[int]]]:
        """What the first steps train.

        Args:
            steps: number of steps, from 1 to `total_steps`.

        Returns:
            The number of whole epochs before the last of these steps' own, and that epoch's packs up to it.
        """
        epoch, _ = self.locate(steps - 1)
        return epoch, self.packing(epoch)[: (steps - self._starts[epoch]) * self.packs_per_step]

    def _epoch_of(self, step: int) -> tuple[int, int]:
        """The epoch in which a step lies, and that epoch's first step."""
        while self._starts[-1] <= step:
            self._starts.append(self._starts[-1] + self._steps_in(len(self._starts) - 1))
        epoch = int(np.searchsorted(self._starts, step, side="right")) - 1
        return epoch, self._starts[epoch]

    def _steps_in(self, epoch: int) -> int:
        return -(-len(self.packing(epoch)) // self.packs_per_step)


def assign(costs: Sequence[float] | NDArray[Any], ranks: int, per_rank: int) -> list[list[int]]:
    """Share packs out over ranks.

    In order of cost, to and fro: each rank gets one of the first `ranks`, one of the next, and so on. Ranks
    wait for each other in every micro-batch, so packs that run at the same time should cost alike; going to
    and fro evens out the sums as well.

    Args:
        costs: cost of each pack.
        ranks: number of ranks.
        per_rank: packs that each rank gets, padding included.

    Returns:
        For each rank `per_rank` indices into `costs`; -1 stands for a pack of padding.

    Raises:
        ValueError: more packs than places.
    """
    places = ranks * per_rank
    if len(costs) > places:
        raise ValueError(f"{len(costs)} packs do not fit {ranks} ranks × {per_rank}")
    order = np.full(places, -1, np.int64)
    order[: len(costs)] = np.argsort(-np.asarray(costs, np.float64), kind="stable")
    rounds = order.reshape(per_rank, ranks)
    rounds[1::2] = rounds[1::2, ::-1].copy()
    return [[int(index) for index in rounds[:, rank]] for rank in range(ranks)]


@dataclass(frozen=True, eq=False)
class StepData:
    """One rank's micro-batches of a step, and what is true of the whole step on all ranks.

    Args:
        micro_batches: this rank's, as many as on any other rank.
        weight_sum: Σ of all label weights of the step on all ranks, which the loss is divided by.
        tokens: tokens of documents, padding apart, on all ranks.
        weighted_tokens: positions with a label, on all ranks.
        documents: documents on all ranks.
        fill: share of its packs' tokens that are documents', from 0 to 1; packs of padding alone do not
            count.
        epoch: from 0.
        lengths: tokens of each document on all ranks, for counting operations.
        source_weight_sums: the part of `weight_sum` that is each source's, [sources].
        rows: for each pack on all ranks, in the schedule's order, the source's number and the row's of each
            document, [documents, 2].
    """

    micro_batches: list[PackedBatch]
    weight_sum: float
    tokens: int
    weighted_tokens: int
    documents: int
    fill: float
    epoch: int
    lengths: Int64[np.ndarray, "documents"]
    source_weight_sums: Float64[np.ndarray, "sources"]
    rows: list[Int64[np.ndarray, "_ 2"]]


class Loader:
    """Batches of training steps and of validation.

    How losses are averaged is decided here, as a factor on each document's token weights, so that the step
    knows one formula, Σ w'·ce / Σ w'. With s a document's own weight and w its token weights:

    - tokens: w' = s·w. Each weighted token counts alike.
    - sequences: w' = s·w / Σw over the document. Each conversation counts alike.
    - micro_batch_2024: w' = s·w / Σ s·w over the pack. A mean of the packs' means, as trainers did it in
      2024.

    Args:
        train: documents that `schedule` was made for.
        validation: documents to validate on; may be none.
        num_sources: number of sources.
        schedule: the packs of each step.
        loss_norm: one of `LOSS_NORMS`.

    Raises:
        ValueError: an unknown loss_norm.
    """

    def __init__(
        self,
        train: Documents,
        validation: Documents,
        num_sources: int,
        schedule: Schedule,
        loss_norm: str = "tokens",
    ) -> None:
        if loss_norm not in LOSS_NORMS:
            raise ValueError(f"loss_norm is {loss_norm!r}; expected one of {', '.join(LOSS_NORMS)}")
        self.schedule = schedule
        self._train, self._validation, self._num_sources = train, validation, num_sources
        self._loss_norm = loss_norm
        self._slots = schedule.pack_documents + 2  # a full pack of documents still has room for padding
        self._validation_packs: list[list[int]] | None = None

    def step(self, step: int, rank: int, world: int) -> StepData:
        """Build a step's batches for one rank.

        Args:
            step: from 0 to below `schedule.total_steps`.
            rank: from 0 to below `world`.
            world: number of ranks; the set of packs does not depend on it.

        Returns:
            As many micro-batches on each rank, as few as hold the step's packs, and the step's sums.

        Raises:
            ValueError: `world` does not divide packs_per_step.
        """
        per_step = self.schedule.packs_per_step
        if per_step % world:
            raise ValueError(
                f"a step of {per_step} packs does not divide by {world} ranks; change tokens per step or ranks"
            )
        epoch, packs = self.schedule.locate(step)
        return self._build(self._train, packs, rank, world, -(-len(packs) // world), epoch)

    def validation(self, rank: int, world: int) -> StepData:
        """Build one rank's part of the validation, the same packs at all times.

        Args:
            rank: from 0 to below `world`.
            world: number of ranks.

        Returns:
            As many micro-batches on each rank (none where there are no documents), and the sums over all.
        """
        if self._validation_packs is None:
            lengths, schedule = self._validation.lengths, self.schedule
            self._validation_packs = pack(lengths, schedule.pack_tokens, 0, max_documents=schedule.pack_documents)
        packs = self._validation_packs
        return self._build(self._validation, packs, rank, world, -(-len(packs) // world), 0)

    def trained(self, steps: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Count what the first steps train, for the ledger.

        Args:
            steps: number of steps done.

        Returns:
            Documents and tokens per source, each visit counted, [sources] both.
        """
        if not steps:
            return np.zeros(self._num_sources, np.int64), np.zeros(self._num_sources, np.int64)
        epoch, packs = self.schedule.done(steps)
        visits = np.full(len(self._train), epoch, np.int64)  # whole epochs before this one
        visits[np.concatenate([np.asarray(p) for p in packs])] += 1
        documents, tokens = (
            np.bincount(self._train.sources, weights=values, minlength=self._num_sources)
            for values in (visits, visits * self._train.lengths)
        )
        return documents.astype(np.int64), tokens.astype(np.int64)

    def _build(
        self, documents: Documents, packs: list[list[int]], rank: int, world: int, per_rank: int, epoch: int
    ) -> StepData:
        sizes = [len(p) for p in packs]
        members = np.array([index for p in packs for index in p], np.int64)
        pack_of = np.repeat(np.arange(len(packs)), sizes)
        lengths = documents.offsets[members + 1] - documents.offsets[members]
        sources = documents.sources[members]
        factors, shares = self._scaling(documents, members, pack_of, len(packs))
        mine = assign(np.bincount(pack_of, weights=lengths**2.0, minlength=len(packs)), world, per_rank)[rank]
        starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        batches = []
        for number in mine:
            where = slice(0, 0) if number < 0 else slice(starts[number], starts[number + 1])
            examples = [
                documents.example(index, factor)
                for index, factor in zip(members[where].tolist(), factors[where].tolist(), strict=True)
            ]
            batches.append(assemble(examples, self.schedule.pack_tokens, self._slots, members[where], sources[where]))
        by_source = np.bincount(sources, weights=shares, minlength=self._num_sources)
        pairs = np.stack([sources, documents.rows[members]], axis=1)
        return StepData(
            micro_batches=batches,
            weight_sum=float(shares.sum()),
            tokens=int(lengths.sum()),
            weighted_tokens=int(documents.weighted_tokens[members].sum()),
            documents=len(members),
            fill=float(lengths.sum() / (len(packs) * self.schedule.pack_tokens)) if packs else 0.0,
            epoch=epoch,
            lengths=lengths,
            source_weight_sums=by_source.astype(np.float64),  # of nothing, bincount counts integers
            rows=np.split(pairs, starts[1:-1]) if packs else [],
        )

    def _scaling(
        self, documents: Documents, members: NDArray[np.int64], pack_of: NDArray[np.int64], packs: int
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """For each document the factor on its token weights, and the sum that they then have."""
        own, sums = documents.scales[members], documents.weight_sums[members]
        if self._loss_norm == "tokens":
            return own, own * sums
        if self._loss_norm == "sequences":
            return own / sums, own
        in_pack = np.bincount(pack_of, weights=own * sums, minlength=packs)[pack_of]
        return own / in_pack, own * sums / in_pack
