"""A run's batches, from its settings: of a prepared set, or of sources that are read as training goes on.

Owns what of the configuration decides the order of the data, and reading a step ahead. What a batch is stands in
`data`.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.ledger import Ledger
from data.loader import Cost, Loader, Repeats, Schedule, StepData, StepMaker, Validation
from data.prepared import Prepared, streamed
from data.stream import Stream
from magnum_train.config import TrainConfig
from magnum_train.errors import ConfigError
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


class Batches:
    """One rank's batches of each step, and where every row went.

    Args:
        settings: The run's.
        prepared: Its conversations; of a streamed run those that validate.
        config: The network's shape, for the cost of packs.
        rank: This process.
        world: Number of processes.

    Attributes:
        total_steps: Steps of the run.
        schedule: The packs of each step; None where sources are streamed.

    Raises:
        ConfigError: If no document is ever visited.
        DataError: If a streamed source's settings cannot be meant.
    """

    def __init__(
        self, settings: TrainConfig, prepared: Prepared, config: TransformerConfig, rank: int, world: int
    ) -> None:
        data = settings.data
        maker = StepMaker(
            len(prepared.sources), data.pack_tokens, data.pack_documents, settings.train.loss_norm, cost(config)
        )
        self._prepared, self._rank, self._world = prepared, rank, world
        self._validation = Validation(prepared.validation, maker)
        self.schedule: Schedule | None = None
        if data.streaming:
            assert settings.train.max_steps is not None, "checked with the configuration"
            sources, left_out, held_out = streamed(prepared, data.sources)
            self._steps: Loader | Stream = Stream(
                sources,
                left_out,
                data.rules(settings.seed),
                prepared.tokenizer,
                maker,
                held_out=held_out,
                documents=data.stream_documents,
                packs_per_step=settings.packs_per_step,
                total_steps=settings.train.max_steps,
                seed=settings.seed,
                max_loss_share=data.max_loss_share,
                rejects=Path(str(settings.run_dir)) / "rejects.jsonl" if rank == 0 else None,
            )
        else:
            try:
                self.schedule = schedule(settings, prepared)
            except ValueError as error:  # documents are repeated so rarely that none is ever visited
                raise ConfigError("data.sources.*.repeat", str(error), "at least one step in the run") from error
            self._steps = Loader(prepared.train, self.schedule, maker)
        self.total_steps = self._steps.total_steps
        self._pool = ThreadPoolExecutor(1, "batches")
        self._ahead: tuple[int, Future[StepData]] | None = None

    def step(self, step: int) -> StepData:
        """This rank's batches of a step, from 0; the next one's are made while this one is trained."""
        if self._ahead is None or self._ahead[0] != step:
            self._ahead = step, self._made(step)
        data = self._ahead[1].result()
        self._ahead = (step + 1, self._made(step + 1)) if step + 1 < self.total_steps else None
        return data

    def _made(self, step: int) -> "Future[StepData]":
        return self._pool.submit(self._steps.step, step, self._rank, self._world)

    def validation(self) -> StepData:
        """This rank's part of the validation."""
        return self._validation.batches(self._rank, self._world)

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
        """Files that belong into a checkpoint after so many steps; of a prepared set none, since the step says all."""
        return {STREAM: self._steps.save(steps)} if isinstance(self._steps, Stream) else {}

    def restore(self, folder: Path) -> None:
        """Go back to where a checkpoint was saved.

        Args:
            folder: The checkpoint's.
        """
        if isinstance(self._steps, Stream):
            self._steps.restore((folder / STREAM).read_bytes())

    def close(self) -> None:
        """Let go of what is being read ahead."""
        self._pool.shutdown(cancel_futures=True)
