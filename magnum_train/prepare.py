"""Tokenise the conversations once: `python -m magnum_train.prepare experiment=…`.

Training does it by itself; this does it ahead, on a machine without GPUs, and shows the ledger. The prepared folder
may then be copied.
"""

from pathlib import Path

from data.prepared import Prepared, prepare
from magnum_train.config import TrainConfig, verb
from magnum_train.metrics import Terminal
from magnum_train.weights import vocabulary


def prepare_data(
    settings: TrainConfig, terminal: Terminal, known: str | None = None, beside: Path | None = None
) -> Prepared:
    """Find the prepared conversations of a configuration, or make them.

    Args:
        settings: Its sources, tokenizer and pack length.
        terminal: Told how far it is, and what a person should know about it.
        known: Key of the set that a run began with which goes on; decides where source files are absent and several
            sets fit.
        beside: Folder of the tokenizer of weights that are here already.

    Raises:
        CheckpointError: If the weights whose tokenizer serves are not there.
        DataError: If a file, a setting or too many rows are wrong.
    """
    tokenizer = vocabulary(settings, Path(str(settings.run_dir)) if known else None, beside)
    with terminal.preparing() as progress:
        prepared = prepare(
            settings.data.sources,
            settings.data.rules(settings.seed),
            prepared_dir=settings.data.prepared_dir,
            tokenizer=tokenizer,
            vocab_size=settings.tokenizer.vocab_size if tokenizer is None else None,
            max_loss_share=settings.data.max_loss_share,
            known=known,
            progress=progress,
            streaming=settings.data.streaming,
        )
    for note in prepared.notes:
        terminal.say(note)
    what = "conversations that validate" if settings.data.streaming else "conversations"
    terminal.say(f"{what} {'found' if prepared.reused else 'prepared'} in {prepared.folder}")
    return prepared


def main(settings: TrainConfig) -> None:
    """Prepare, and print where every row went."""
    prepared = prepare_data(settings, Terminal(is_main=True))
    if settings.data.streaming:
        print("data.streaming: the other conversations are tokenised in training\n")
    print(prepared.ledger.render())
    if prepared.rejects.stat().st_size:
        print(f"\nrows that are not kept, and why: {prepared.rejects}")


if __name__ == "__main__":
    verb(main, TrainConfig, "config")
