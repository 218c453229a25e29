"""Write weights as a folder that servers load: `python -m magnum_train.export weights=RUN out=FOLDER`.

Hugging Face's layout: safetensors in shards with their index, config.json, generation_config.json, the tokenizer's
files with the chat template. Tensors are read one at a time from wherever they lie, so that a run of eight ranks is
exported by one process that holds one shard. The folder gets its name when it is complete and has been opened again.
"""

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the imports below take seconds; Ctrl-C in them is no error to trace

import torch

from data import Tokenizer
from magnum_train import checkpoint
from magnum_train.config import ExportConfig, TokenizerFileConfig, verb
from magnum_train.errors import CheckpointError, ConfigError, UserError
from magnum_train.run_folder import size_text
from magnum_train.weights import Weights, find, open_tokenizer
from model.flops import parameter_count
from model.hf import MAX_SHARD_BYTES, HFFolder, config_to_hf, write_json, write_weights, written_aside

_BESIDE = 50 * 10**6  # bytes: room for the tokenizer's files, 17 MB for Nemo's


def export(found: Weights, tokenizer: Tokenizer, out: Path, dtype: torch.dtype, max_shard_bytes: int) -> None:
    """Write one folder.

    Args:
        found: The weights.
        tokenizer: Their tokenizer, with ChatML control tokens.
        out: To be made; must not exist.
        dtype: Of the saved weights.
        max_shard_bytes: The most bytes in a file, a single larger tensor aside; so much is held in memory.

    Raises:
        CheckpointError: The weights cannot be read, or the folder not be written; nothing is left under its name.
        ConfigError: The disk has too little room, or the tokenizer more ids than the matrices have rows.
    """
    if tokenizer.vocab_size > found.config.vocab_size:
        raise ConfigError(
            "tokenizer",
            f"{tokenizer.vocab_size:,} ids",
            f"at most the {found.config.vocab_size:,} rows of {found.name}",
        )
    need = parameter_count(found.config) * dtype.itemsize + _BESIDE
    try:
        with written_aside(out) as aside:
            if (free := shutil.disk_usage(aside).free) < need:
                raise ConfigError("out", f"{size_text(free)} free for {out}", size_text(need))
            write_weights(aside, found.config, dtype, lambda name: found.read(name, dtype), max_shard_bytes)
            write_json(aside / "config.json", config_to_hf(found.config, dtype) | _config_fields(found, tokenizer))
            write_json(aside / "generation_config.json", generation_fields(tokenizer))
            tokenizer.export(aside, max_length=found.max_positions)
            HFFolder(aside)  # raises where what was written is not what was meant
    except UserError:
        raise
    except ValueError as error:
        raise CheckpointError.of(error) from error


def _config_fields(found: Weights, tokenizer: Tokenizer) -> dict[str, Any]:
    """What config.json holds beside the network's shape."""
    fields = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.im_end_id,  # of a reply; generation_config.json lists every id that ends one
        "pad_token_id": tokenizer.pad_id,
        "max_position_embeddings": found.max_positions,
        "use_cache": True,
        # The version from which on transformers does not suspect these files of a fault that older ones had.
        "transformers_version": "5.0.0",
    }
    return {name: value for name, value in fields.items() if value is not None}


def generation_fields(tokenizer: Tokenizer) -> dict[str, Any]:
    """The fields of generation_config.json: a reply ends at any of `eos_token_id`."""
    fields = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.stop_ids,
        "pad_token_id": tokenizer.pad_id,
    }
    return {name: value for name, value in fields.items() if value is not None}


def export_newest(run_dir: Path, say: Callable[[str], None]) -> str:
    """Export a run's newest checkpoint to its own folder, in bfloat16, unless it is there. One process alone."""
    step = checkpoint.steps(run_dir)[-1]
    out = run_dir / "exports" / f"step-{step:08d}"
    if out.exists():
        return str(out)
    begin = time.perf_counter()
    with find(f"{run_dir}@{step}", "run_dir") as found:
        export(found, open_tokenizer(TokenizerFileConfig(), found.vocabulary), out, torch.bfloat16, MAX_SHARD_BYTES)
    say(f"exported {found.name} to {out} in {time.perf_counter() - begin:.1f} s")
    return str(out)


def main(settings: ExportConfig) -> None:
    """Export, and say what was written."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a half-written folder is removed then too
    out, begin, dtype = Path(settings.out).expanduser(), time.perf_counter(), getattr(torch, settings.dtype)
    with find(settings.weights, "weights") as found:
        tokenizer = open_tokenizer(settings.tokenizer, found.vocabulary)
        if said := _rounding(found, dtype):
            print(said, file=sys.stderr)
        export(found, tokenizer, out, dtype, int(settings.max_shard_gb * 1e9))
    size = sum(file.stat().st_size for file in out.iterdir()) / 1e6
    seconds = time.perf_counter() - begin
    count = parameter_count(found.config)
    said = f"{found.name}: {count:,} parameters in {settings.dtype}, {size:,.0f} MB, to {out} in {seconds:.1f} s"
    try:
        print(said, flush=True)
    except BrokenPipeError:  # nobody listens any more; the folder is there all the same
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _rounding(found: Weights, dtype: torch.dtype) -> str:
    """What a person may not expect of the values, that they lose digits here or have lost them before; else nothing."""
    theirs, ours = (str(each).removeprefix("torch.") for each in (found.dtype, dtype))
    if found.dtype.itemsize < dtype.itemsize:
        return (
            f"weights are {theirs} where they lie: {ours} holds the same values in more bytes, dtype={theirs} in fewer"
        )
    masters = found.hf is None and found.dtype == torch.float32  # of which everybody expects it
    if found.dtype == dtype or masters:
        return ""
    return f"weights are rounded from {theirs} to {ours}; dtype={theirs} keeps them"


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    verb(main, ExportConfig, "export")
