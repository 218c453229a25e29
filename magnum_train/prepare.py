"""Tokenise the conversations once: `python -m magnum_train.prepare experiment=…`.

Training does it by itself; this does it ahead, on a machine without GPUs, and shows the ledger. The prepared folder
may then be copied.
"""

import sys
from collections.abc import Callable

from data import Tokenizer
from data.prepared import Prepared, prepare
from magnum_train.config import TrainConfig, verb


def prepare_data(settings: TrainConfig, say: Callable[[str], None], known: str | None = None) -> Prepared:
    """Find the prepared conversations of a configuration, or make them.

    Args:
        settings: Its sources, tokenizer and pack length.
        say: Told what a person should know about it.
        known: Key of the set that the run began with; decides where source files are absent and several sets fit.

    Raises:
        DataError: If a file, a setting or too many rows are wrong.
    """
    vocabulary = settings.tokenizer
    tokenizer = None
    if vocabulary.path is not None:
        tokenizer = Tokenizer.from_file(
            vocabulary.path, im_start_slot=vocabulary.im_start_slot, im_end_slot=vocabulary.im_end_slot
        )
    prepared = prepare(
        settings.data.sources,
        prepared_dir=settings.data.prepared_dir,
        tokenizer=tokenizer,
        vocab_size=vocabulary.vocab_size if tokenizer is None else None,
        max_tokens=settings.data.pack_tokens,
        seed=settings.seed,
        max_loss_share=settings.data.max_loss_share,
        known=known,
    )
    for note in prepared.notes:
        say(note)
    say(f"conversations {'found' if prepared.reused else 'prepared'} in {prepared.folder}")
    return prepared


def main(settings: TrainConfig) -> None:
    """Prepare, and print where every row went."""
    prepared = prepare_data(settings, lambda text: print(text, file=sys.stderr))
    print(prepared.ledger.render())
    print(f"\nrows that were lost: {prepared.rejects}")


if __name__ == "__main__":
    verb(main, TrainConfig, "config")
