"""A run's batches, from its settings: of a prepared set, or of sources that are read as training goes on.

Owns what of the configuration decides the order of the data, reading a step ahead, and whether all ranks read the
same from a stream. What a batch is stands in `data`.
"""

import contextlib
import hashlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data import DataError
from data.ledger import Ledger
from data.loader import Cost, Loader, Repeats, Schedule, StepData, StepMaker, Validation
from data.prepared import Prepared, streamed
from data.stream import Stream, StreamOptions
from magnum_train.config import TrainConfig
from magnum_train.distributed import Attempt, ElsewhereError, Ranks
from magnum_train.errors import CheckpointError, ConfigError, RunError
from model import TransformerConfig
from model.flops import block_matmul_parameters

STREAM = "stream.npz"
"""The file beside a checkpoint that says how far a stream has been read, with the conversations that wait."""


def cost(config: TransformerConfig) -> Cost:
    """What a pack costs to train, in operations of forward and backward (see `model.flops.train_flops`)."""
    return Cost(
        per_token=6.0 * block_matmul_parameters(config),
        per_square=6.0 * config.n_layers * config.n_heads * config.head_dim,
        per_label=6.0 * config.vocab_size * config.dim,
    )


def schedule(settings: TrainConfig, prepared: Prepared) -> Schedule:
    """Which packs each step of a run trains."""
    repeats = [settings.data.sources[name].repeat for name in prepared.sources]
    return Schedule(
        prepared.train.lengths,
        pack_tokens=settings.data.pack_tokens,
        pack_documents=settings.data.pack_documents,
        packs_per_step=settings.packs_per_step,
        seed=settings.seed,
        epochs=settings.train.epochs if settings.train.max_steps is None else None,
        max_steps=settings.train.max_steps,
        packing=settings.data.packing,
        repeats=Repeats(prepared.train.sources, repeats, settings.seed),
    )


def _mark(data: StepData) -> str:
    """By what ranks tell whether they read the same step."""
    read = hashlib.sha256(repr((len(data.rows), data.documents, data.weight_sum)).encode())
    for numbers in (*data.rows, data.lengths):
        read.update(np.ascontiguousarray(numbers, np.int64).data)
    return read.hexdigest()


class Batches:
    """One rank's batches of each step, and where every row went.

    Where ranks share packs (`parallel.sequence`), they are given packs as one, and each its part of them.

    Args:
        settings: The run's.
        prepared: Its conversations; of a streamed run those that validate.
        config: The network's shape, for the cost of packs.
        ranks: This process among the others. Of a streamed run all of them ask for the same steps.

    Attributes:
        total_steps: Steps of the run.
        schedule: The packs of each step; None where sources are streamed.
        shares: Each source's share of the rows that are read from a stream; empty where nothing is streamed.
        failed: Whether a rank could not read the step that was asked for last. All ranks know, and have done the same.

    Raises:
        ConfigError: If no document is ever visited.
        DataError: If a streamed source's settings cannot be meant.
    """

    def __init__(self, settings: TrainConfig, prepared: Prepared, config: TransformerConfig, ranks: Ranks) -> None:
        data = settings.data
        maker = StepMaker(
            len(prepared.sources), data.pack_tokens, data.pack_documents, settings.train.loss_norm, cost(config)
        )
        self._prepared, self._ranks = prepared, ranks
        parts = settings.parallel.sequence
        self._among = ranks.rank // parts, ranks.world_size // parts
        self._part = ranks.rank % parts, parts
        self._validation = Validation(prepared.validation, maker)
        self.schedule: Schedule | None = None
        self.shares: dict[str, float] = {}
        self.failed = False
        if data.streaming:
            assert settings.train.max_steps is not None, "checked with the configuration"
            sources, left_out, held_out = streamed(prepared, data.sources)
            options = StreamOptions(
                documents=data.stream_documents,
                packs_per_step=settings.packs_per_step,
                total_steps=settings.train.max_steps,
                seed=settings.seed,
                max_loss_share=data.max_loss_share,
            )
            rules, rejects = data.rules(settings.seed), Path(str(settings.run_dir)) / "rejects.jsonl"
            self._steps: Loader | Stream = Stream(
                sources, left_out, held_out, rules, prepared.tokenizer, maker, options,
                rejects if ranks.is_main else None,
            )  # fmt: skip
            self.shares = self._steps.shares
        else:
            try:
                self.schedule = schedule(settings, prepared)
            except ValueError as error:  # documents are repeated so rarely that none is ever visited
                raise ConfigError("data.sources.*.repeat", str(error), "at least one step in the run") from error
            self._steps = Loader(prepared.train, self.schedule, maker)
        self.total_steps = self._steps.total_steps
        self._pool = ThreadPoolExecutor(1, "batches")
        self._ahead: tuple[int, Callable[[], StepData]] | None = None
        self._restored = 0  # how often; names what ranks tell each other of a stream

    def step(self, step: int) -> StepData:
        """This rank's batches of a step, from 0; the next one's are made while this one is trained.

        Raises:
            DataError: A stream cannot be read here, or loses too much; on another rank than 0 a HostError.
            ElsewhereError: So it is on another rank, which says why.
            RunError: Ranks read different rows from a stream.
        """
        if self._ahead is None or self._ahead[0] != step:
            self._ahead = step, self._made(step)
        data = self._ahead[1]()
        self._ahead = (step + 1, self._made(step + 1)) if step + 1 < self.total_steps else None
        return data

    def _made(self, step: int) -> Callable[[], StepData]:
        """Have a step's batches made, in the order of the steps."""
        if isinstance(self._steps, Stream):
            return partial(self._agreed, step, self._pool.submit(self._attempt, step))
        return self._pool.submit(self._own, step).result

    def _attempt(self, step: int) -> Attempt[StepData]:
        """Read a step from the stream and tell the other ranks how it went, so that no one trains where one cannot."""
        # This rank has heard from all of the step before, so all of them have settled the one before that.
        self._ranks.forget(self._told(step - 2))
        return self._ranks.attempt(self._told(step), partial(self._own, step), _mark)

    def _own(self, step: int) -> StepData:
        return self._cut(self._steps.step(step, *self._among))

    def _cut(self, data: StepData) -> StepData:
        """This rank's part of the packs that it shares with others."""
        return replace(data, micro_batches=[batch.cut(*self._part) for batch in data.micro_batches])

    def _told(self, step: int) -> str:
        """What a step's reading is called among the ranks; a step that is read again has another name."""
        return f"stream {self._restored}/{step}"

    def _agreed(self, step: int, made: "Future[Attempt[StepData]]") -> StepData:
        """A step that every rank has read, and the same rows of it."""
        try:
            data, marks = self._ranks.settle(self._told(step), made.result())
        except Exception:  # of any kind, here or on another rank; it goes on to whoever asked for the step
            self.failed = True
            raise
        usual = marks.index(Counter(marks).most_common(1)[0][0])
        if others := [str(rank) for rank, mark in enumerate(marks) if mark != marks[usual]]:
            raise RunError(
                f"step {step + 1}", f"other rows on rank {', '.join(others)} than on rank {usual}",
                "the same on all ranks, each of which reads the sources for itself",
                "Look for a predicate or a form of your own that answers by more than the row (chance, the clock, the "
                "rank), and for a source's file that is another one on that rank's host.",
            )  # fmt: skip
        return data

    def validation(self) -> StepData:
        """This rank's part of the validation."""
        return self._cut(self._validation.batches(*self._among))

    def ledger(self, steps: int, refused: list[int]) -> Ledger:
        """Where every row went, down to what has been trained.

        Args:
            steps: Steps done.
            refused: Of these, from 1, the ones whose update was refused: they trained nothing.
        """
        ledger = self._prepared.ledger
        if isinstance(self._steps, Stream):
            ledger = ledger.plus(self._steps.ledger(steps))
        documents, tokens = self._trained(steps)
        for step in refused:
            after, before = self._trained(step), self._trained(step - 1)
            documents, tokens = documents - after[0] + before[0], tokens - after[1] + before[1]
        ledger.trained(documents.tolist(), tokens.tolist())
        return ledger

    def _trained(self, steps: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        # By the one thread that reads ahead, so that no two look at the schedule at once.
        return self._pool.submit(self._steps.trained, steps).result()

    def saved(self, steps: int) -> dict[str, bytes]:
        """Files that rank 0 adds to a checkpoint after so many steps; of a prepared set none: the step says all."""
        return {STREAM: self._steps.save(steps)} if isinstance(self._steps, Stream) and self._ranks.is_main else {}

    def epoch_ends(self) -> list[int]:
        """The last step, from 1, of each epoch that ends in the run; none where sources are streamed."""
        return [] if self.schedule is None else self.schedule.epoch_ends()

    def restore(self, folder: Path, step: int) -> None:
        """Go back to where a checkpoint was saved.

        Args:
            folder: The checkpoint's.
            step: Its step.

        Raises:
            CheckpointError: It does not say how far a stream had been read.
        """
        if not isinstance(self._steps, Stream):
            return
        if self._ahead is not None:  # being read now, from where the stream has come to
            with contextlib.suppress(DataError, ElsewhereError, RunError):
                self._ahead[1]()
            self._ahead = None
        self._restored += 1
        self.failed = False
        file = folder / STREAM
        try:
            found = self._steps.restore(file.read_bytes())
            if found != step:
                raise ValueError(f"what was read until step {found}")
        except (OSError, ValueError) as error:
            raise CheckpointError(
                str(file), error.strerror or str(error) if isinstance(error, OSError) else str(error),
                "how far the sources had been read, and the conversations that waited",
                "Remove this checkpoint to go on from the one before, or choose another run_dir.",
            ) from error  # fmt: skip

    def close(self) -> None:
        """Let go of what is being read ahead."""
        self._pool.shutdown(cancel_futures=True)
