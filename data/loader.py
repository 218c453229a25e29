"""Which packs a rank sees at a step, as pure functions of (seed, epoch, step), and their batches.

Nothing is replayed to resume: the state of the data is the step's number. Owns how often each document comes,
the packing of each epoch, the sharing out over ranks and the scaling of loss weights. Rank and world size are
plain numbers handed in; knows no process groups and no devices.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64
from numpy.typing import NDArray

from data.batch import PackedBatch, assemble
from data.documents import Documents
from data.packing import PACKINGS, Packs, pack_flat

LOSS_NORMS = ("tokens", "sequences", "micro_batch_2024")

_KEPT_PACKINGS = 2
"""Packings kept in memory: the ledger asks for the epoch before the one that is trained."""

_FINEST = 1_000_000
"""Largest denominator of a repeat: six decimals are exact, and the counts of any source fit 64 bits."""


class Repeats:
    """How often each epoch visits each document, where a source is seen more or less than once.

    The n documents of a source that is seen r times an epoch stand in an order drawn by seed; number k of them
    has had ⌊e·r + k/n⌋ visits before epoch e. So an epoch visits a document r times, rounded down or up, and
    the first e epochs visit a source ⌊e·r·n⌋ times. At r = ½ two epochs visit each document once. Whenever e·r
    is whole, all have had as many visits, and the order is drawn anew: not the same half goes together for
    ever.

    All of it is counted in integers, with the fraction nearest to r whose denominator is at most 1,000,000: r
    itself where it has up to six decimals, else off by at most 5·10⁻⁷.

    Args:
        sources: number of each document's source.
        repeats: for each source, visits of each of its documents an epoch on average, such as 2 or 0.5.
        seed: the run's seed.

    Raises:
        ValueError: a repeat that is not finite or below 0.000001, or a source that has none.
    """

    def __init__(self, sources: Int64[np.ndarray, "documents"], repeats: Sequence[float], seed: int) -> None:
        for source, repeat in enumerate(repeats):
            if not (math.isfinite(repeat) and repeat * _FINEST >= 1):
                raise ValueError(f"the repeat of source {source} is {repeat}; expected at least 0.000001")
        if len(sources) and not 0 <= sources.min() <= sources.max() < len(repeats):
            raise ValueError(f"source {sources.max()} has no repeat; there are {len(repeats)}")
        self._sources, self._seed = sources, seed
        self._repeats = [Fraction(repeat).limit_denominator(_FINEST) for repeat in repeats]

    def before(self, epoch: int) -> Int64[np.ndarray, "documents"]:
        """Visits of each document in all the epochs before this one, together."""
        visits = np.zeros(len(self._sources), np.int64)
        for source, repeat in enumerate(self._repeats):
            whole, rest = divmod(epoch * repeat.numerator, repeat.denominator)
            members = np.flatnonzero(self._sources == source)
            visits[members] = whole
            if rest:
                round_ = epoch // repeat.denominator  # at the end of each, all have had as many visits
                place = np.random.default_rng(_seed(f"repeat {self._seed} {source} {round_}")).permutation(len(members))
                visits[members] += place * repeat.denominator >= len(members) * (repeat.denominator - rest)
        return visits

    def during(self, epoch: int) -> Int64[np.ndarray, "documents"]:
        """Visits of each document in this epoch."""
        visits: NDArray[np.int64] = self.before(epoch + 1) - self.before(epoch)
        return visits


class Schedule:
    """Packs of each step of a run, each document exactly once an epoch or as often as its source asks.

    Every epoch is packed anew. Its last step may have fewer packs than the others; it is trained all the
    same. An epoch of few documents seen less than once may have no step at all.

    Args:
        lengths: tokens of each document.
        pack_tokens: tokens of a pack.
        pack_documents: most documents in a pack.
        packs_per_step: packs of a step on all ranks together.
        seed: the run's seed.
        epochs: number of passes; None where `max_steps` alone decides.
        max_steps: most steps; None for all of the epochs'.
        packing: one of `packing.PACKINGS`.
        repeats: how often each document is visited; None for once an epoch.

    Attributes:
        total_steps: steps of the run, known before the first.

    Raises:
        ValueError: a number below 1, neither epochs nor max_steps, an unknown packing, no documents, or
            epochs that visit none.
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
        packing: str = "best_fit",
        repeats: Repeats | None = None,
    ) -> None:
        if epochs is None and max_steps is None:
            raise ValueError("neither epochs nor max_steps is given; expected at least one of them")
        limits = {"packs_per_step": packs_per_step, "epochs": epochs, "max_steps": max_steps}
        for name, value in limits.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")
        if packing not in PACKINGS:
            raise ValueError(f"packing is {packing!r}; expected one of {', '.join(PACKINGS)}")
        if not len(lengths):
            raise ValueError("there are no documents to pack; expected at least one")
        self.pack_tokens, self.pack_documents, self.packs_per_step = (
            pack_tokens,
            pack_documents,
            packs_per_step,
        )
        self._lengths, self._seed = np.asarray(lengths, np.int64), seed
        self._way, self._repeats = packing, repeats
        self._packings: dict[int, Packs] = {}
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
            if not self.total_steps:
                raise ValueError(
                    f"{len(lengths)} documents are repeated so rarely that {epochs} epochs visit none of them; "
                    "expected more epochs or larger repeats"
                )

    def packing(self, epoch: int) -> Packs:
        """All packs of an epoch, in order, of document numbers; one that is visited twice stands there twice."""
        if epoch not in self._packings:
            visits = np.ones(len(self._lengths), np.int64) if self._repeats is None else self._repeats.during(epoch)
            documents = np.repeat(np.arange(len(visits)), visits)
            seed = _seed(f"packing {self._seed} {epoch}")
            packs = pack_flat(self._lengths[documents], self.pack_tokens, seed, self.pack_documents, packing=self._way)
            while len(self._packings) >= _KEPT_PACKINGS:
                del self._packings[next(iter(self._packings))]
            self._packings[epoch] = Packs(documents[packs.members], packs.bounds)
        return self._packings[epoch]

    def fill(self, epoch: int) -> float:
        """Share of an epoch's packs that is documents, from 0 to 1; 0 where it has no pack."""
        packs = self.packing(epoch)
        return float(self._lengths[packs.members].sum() / (max(len(packs), 1) * self.pack_tokens))

    def locate(self, step: int) -> tuple[int, Packs]:
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
        return epoch, self.packing(epoch).part(start, start + self.packs_per_step)

    def visits(self, steps: int) -> NDArray[np.int64]:
        """How often the first steps train each document.

        Args:
            steps: number of steps, from 0 to `total_steps`.

        Returns:
            Visits of each document, [documents].

        Raises:
            ValueError: more steps than there are.
        """
        if not steps:
            return np.zeros(len(self._lengths), np.int64)
        epoch, _ = self.locate(steps - 1)
        done = self.packing(epoch).part(0, (steps - self._starts[epoch]) * self.packs_per_step)
        here = np.bincount(done.members, minlength=len(self._lengths))
        return here + (epoch if self._repeats is None else self._repeats.before(epoch))

    def epoch_ends(self) -> list[int]:
        """Steps after which an epoch is complete, ascending, none after `total_steps`; may have to pack them all."""
        self._epoch_of(self.total_steps)
        return [end for end in self._starts[1:] if end <= self.total_steps]

    def _epoch_of(self, step: int) -> tuple[int, int]:
        """The epoch in which a step lies, and that epoch's first step."""
        while self._starts[-1] <= step:
            self._starts.append(self._starts[-1] + self._steps_in(len(self._starts) - 1))
        epoch = int(np.searchsorted(self._starts, step, side="right")) - 1
        return epoch, self._starts[epoch]

    def _steps_in(self, epoch: int) -> int:
        return -(-len(self.packing(epoch)) // self.packs_per_step)


def _seed(name: str) -> int:
    """A seed of 64 bits for each purpose, so that no two draw the same."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


@dataclass(frozen=True)
class Cost:
    """What a pack costs to train, in any one unit.

    Every pack has the same number of tokens, padding included, so `per_token` adds the same to each; what
    differs is how its tokens are cut into documents and how many of them bear a loss. The attention of
    padding is left out: its documents are of at most 64 tokens or so.

    Args:
        per_token: of each token of the pack.
        per_square: of each document's length², for attention.
        per_label: of each token that bears a loss, for the output matrix.
    """

    per_token: float = 0.0
    per_square: float = 1.0
    per_label: float = 0.0

    def of(self, packs: Packs, documents: Documents, pack_tokens: int) -> Float64[np.ndarray, "packs"]:
        """The cost of each pack of these documents."""
        own = self.per_square * documents.lengths[packs.members] ** 2.0
        own += self.per_label * documents.weighted_tokens[packs.members]
        return np.bincount(packs.pack_of(), own, len(packs)) + self.per_token * pack_tokens


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
        packs: for each of `micro_batches` the number of its pack in `rows`; -1 for a pack of padding.
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
    packs: list[int]


@dataclass(frozen=True)
class StepMaker:
    """Packs → one rank's batches of a step.

    How losses are averaged is decided here, as a factor on each document's token weights, so that the step
    knows one formula, Σ w'·ce / Σ w'. With s a document's own weight and w its token weights:

    - tokens: w' = s·w. Each weighted token counts alike.
    - sequences: w' = s·w / Σw over the document. Each conversation counts alike.
    - micro_batch_2024: w' = s·w / Σ s·w over the pack. A mean of the packs' means, as trainers did it in
      2024.

    Args:
        num_sources: number of sources.
        pack_tokens: tokens of a pack.
        pack_documents: most documents in a pack.
        loss_norm: one of `LOSS_NORMS`.
        cost: by which packs are shared out over ranks.

    Raises:
        ValueError: an unknown loss_norm.
    """

    num_sources: int
    pack_tokens: int
    pack_documents: int
    loss_norm: str = "tokens"
    cost: Cost = Cost()

    def __post_init__(self) -> None:
        if self.loss_norm not in LOSS_NORMS:
            raise ValueError(f"loss_norm is {self.loss_norm!r}; expected one of {', '.join(LOSS_NORMS)}")

    def build(self, documents: Documents, packs: Packs, rank: int, world: int, epoch: int = 0) -> StepData:
        """Build a step's batches for one rank.

        Args:
            documents: what the packs are made of.
            packs: the step's, on all ranks together.
            rank: from 0 to below `world`.
            world: number of ranks.
            epoch: noted in the result.

        Returns:
            As many micro-batches on each rank, as few as hold the packs, and the step's sums.
        """
        per_rank, slots = -(-len(packs) // world), self.pack_documents + 2  # a full pack still has room for padding
        members, bounds = packs.members, packs.bounds
        lengths = documents.lengths[members]
        sources = documents.sources[members]
        factors, shares = self._scaling(documents, packs)
        costs = self.cost.of(packs, documents, self.pack_tokens)
        batches, numbers = [], assign(costs, world, per_rank)[rank]
        for number in numbers:
            where = slice(0, 0) if number < 0 else slice(bounds[number], bounds[number + 1])
            examples = [
                documents.example(index, factor)
                for index, factor in zip(members[where].tolist(), factors[where].tolist(), strict=True)
            ]
            batches.append(assemble(examples, self.pack_tokens, slots, members[where], sources[where]))
        by_source = np.bincount(sources, weights=shares, minlength=self.num_sources)
        pairs = np.stack([sources, documents.rows[members]], axis=1)
        return StepData(
            micro_batches=batches,
            weight_sum=float(shares.sum()),
            tokens=int(lengths.sum()),
            weighted_tokens=int(documents.weighted_tokens[members].sum()),
            documents=len(members),
            fill=float(lengths.sum() / (max(len(packs), 1) * self.pack_tokens)),
            epoch=epoch,
            lengths=lengths,
            source_weight_sums=by_source.astype(np.float64),  # of nothing, bincount counts integers
            rows=[pairs[start:stop] for start, stop in pairwise(bounds.tolist())],
            packs=numbers,
        )

    def _scaling(self, documents: Documents, packs: Packs) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """For each document the factor on its token weights, and the sum that they then have."""
        own, sums = documents.scales[packs.members], documents.weight_sums[packs.members]
        if self.loss_norm == "tokens":
            return own, own * sums
        if self.loss_norm == "sequences":
            return own / sums, own
        pack_of = packs.pack_of()
        in_pack = np.bincount(pack_of, weights=own * sums, minlength=len(packs))[pack_of]
        return own / in_pack, own * sums / in_pack


class Loader:
    """Batches of training steps, of a prepared set.

    Args:
        documents: what `schedule` was made for.
        schedule: the packs of each step.
        maker: makes the batches.
    """

    def __init__(self, documents: Documents, schedule: Schedule, maker: StepMaker) -> None:
        self.schedule, self.total_steps = schedule, schedule.total_steps
        self._documents, self._maker = documents, maker

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
        return self._maker.build(self._documents, packs, rank, world, epoch)

    def trained(self, steps: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Count what the first steps train, for the ledger.

        Args:
            steps: number of steps done.

        Returns:
            Documents and tokens per source, each visit counted, [sources] both.
        """
        visits = self.schedule.visits(steps)
        documents, tokens = (
            np.bincount(self._documents.sources, weights=values, minlength=self._maker.num_sources)
            for values in (visits, visits * self._documents.lengths)
        )
        return documents.astype(np.int64), tokens.astype(np.int64)


class Validation:
    """Batches of a validation, the same packs at all times.

    Args:
        documents: what to validate on; may be none.
        maker: makes the batches.
    """

    def __init__(self, documents: Documents, maker: StepMaker) -> None:
        self._documents, self._maker = documents, maker
        self._packs = pack_flat(documents.lengths, maker.pack_tokens, 0, maker.pack_documents)

    def batches(self, rank: int, world: int) -> StepData:
        """Build one rank's part.

        Args:
            rank: from 0 to below `world`.
            world: number of ranks.

        Returns:
            As many micro-batches on each rank (none where there are no documents), and the sums over all.
        """
        return self._maker.build(self._documents, self._packs, rank, world)
