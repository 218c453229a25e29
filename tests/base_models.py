"""Small base models as one downloads them: a folder with weights, configuration, and a tokenizer without ChatML."""

import json
from dataclasses import replace
from pathlib import Path

import torch

from data.tokenizer import train_tokenizer
from model import Transformer, TransformerConfig
from model.hf import save_hf
from tiny_runs import WORDS

BASE = TransformerConfig(dim=40, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, hidden_dim=64, vocab_size=320)
LARGE = replace(BASE, dim=512, n_layers=8, hidden_dim=2048, vocab_size=10_000)
CHATML_IDS = (3, 4)
SLOTS = ["tokenizer.im_start_slot=3", "tokenizer.im_end_slot=4"]


def base_model(config: TransformerConfig = BASE, zero: tuple[int, ...] = CHATML_IDS, seed: int = 0) -> Transformer:
    """Weights as a trained network's might be, with the rows of unused ids zero in both matrices."""
    model = Transformer(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(std=1.0 if name == "tok_embeddings.weight" else 0.1, generator=generator)
            if name in ("tok_embeddings.weight", "output.weight"):
                parameter[list(zero)] = 0
    return model


def write_base(
    folder: Path,
    *,
    zero: tuple[int, ...] = CHATML_IDS,
    dtype: torch.dtype = torch.float32,
    shard: int = 60_000,
    vocab_size: int = 320,
    reserved: bool = True,
) -> Transformer:
    """Write a base model's folder.

    Args:
        folder: To be made.
        zero: Ids whose rows are zero.
        dtype: Of the weights on disk.
        shard: Bytes of a file.
        vocab_size: Rows of both matrices; the tokenizer has 320 ids, or 318 without reserved ones.
        reserved: Whether ids 3 and 4 are reserved control tokens; without, the tokenizer has none to spare.

    Returns:
        The model that was written, as it comes back from `dtype`.
    """
    model = base_model(replace(BASE, vocab_size=vocab_size), zero).to(dtype).float()
    save_hf(
        model, folder, dtype=dtype, max_shard_bytes=shard,
        fields={"max_position_embeddings": 4096, "bos_token_id": 0, "eos_token_id": 1},
    )  # fmt: skip
    texts = [f"{a} {b}" for a in WORDS for b in WORDS]
    train_tokenizer(texts, 320).save(folder / "tokenizer.json")
    spec = json.loads((folder / "tokenizer.json").read_text())
    names = {"<|im_start|>": "<SPECIAL_3>", "<|im_end|>": "<SPECIAL_4>"}
    spec["added_tokens"] = [t | {"content": names.get(t["content"], t["content"])} for t in spec["added_tokens"]]
    spec["model"]["vocab"] = {names.get(token, token): id_ for token, id_ in spec["model"]["vocab"].items()}
    if not reserved:
        spec["added_tokens"] = [t for t in spec["added_tokens"] if t["id"] not in CHATML_IDS]
        for name in names.values():
            del spec["model"]["vocab"][name]
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return model
