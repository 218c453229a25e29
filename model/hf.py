"""Weights and configuration between Hugging Face's layout on disk and ours in memory.

Owns the two naming schemes, the fields of `config.json` and the safetensors files. Knows nothing of
tokenizers, templates or ranks; a sharded parameter (DTensor) is filled with its slice and gathered whole,
nothing more. The rotary convention is the same on both sides, so no weight is permuted.
"""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from model.config import TransformerConfig, parameter_shapes
from model.transformer import Transformer

_OUTER = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_LAYER = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
}
_OUTER_BACK = {theirs: ours for ours, theirs in _OUTER.items()}
_IN_LAYER_BACK = {theirs: ours for ours, theirs in _IN_LAYER.items()}

# Our field → theirs. All must be present: where one is missing, transformers would put a default that is not
# Nemo's.
_FIELDS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "vocab_size": "vocab_size",
    "norm_eps": "rms_norm_eps",
}

INDEX = "model.safetensors.index.json"


def hf_name(name: str) -> str:
    """Hugging Face's name for one of our parameters; `KeyError` where there is none."""
    if name.startswith("layers."):
        _, layer, rest = name.split(".", 2)
        return f"model.layers.{layer}.{_IN_LAYER[rest]}"
    return _OUTER[name]


def our_name(name: str) -> str:
    """Our name for one of Hugging Face's parameters; `KeyError` where there is none."""
    if name.startswith("model.layers."):
        _, _, layer, rest = name.split(".", 3)
        return f"layers.{layer}.{_IN_LAYER_BACK[rest]}"
    return _OUTER_BACK[name]


def config_from_hf(fields: Mapping[str, Any]) -> TransformerConfig:
    """Read a `config.json`, in its older form or in that of transformers 5.

    Whatever this network does not compute is refused by name: a model that loads and is slightly wrong costs
    a run.

    Args:
        fields: The parsed file.

    Returns:
        The network's shape.

    Raises:
        ValueError: Another architecture, a feature that is not there, or a field that is missing.
    """
    rope = {**(fields.get("rope_scaling") or {}), **(fields.get("rope_parameters") or {})}
    expectations = {
        "model_type": (fields.get("model_type"), "mistral"),
        "architectures": (
            list(fields.get("architectures") or ["MistralForCausalLM"]),
            ["MistralForCausalLM"],
        ),
        "hidden_act": (fields.get("hidden_act", "silu"), "silu"),
        "sliding_window": (fields.get("sliding_window"), None),
        "tie_word_embeddings": (bool(fields.get("tie_word_embeddings", False)), False),
        "attention_dropout": (float(fields.get("attention_dropout") or 0.0), 0.0),
        "rope type": (rope.get("rope_type", rope.get("type", "default")), "default"),
    }
    for name, (found, expected) in expectations.items():
        if found != expected:
            raise ValueError(
                f"config.json: {name}: found {found!r}, expected {expected!r}; "
                "this network computes Mistral-Nemo and nothing else"
            )
    found_fields: dict[str, Any] = {ours: fields.get(theirs) for ours, theirs in _FIELDS.items()}
    found_fields["rope_theta"] = fields.get("rope_theta", rope.get("rope_theta"))
    missing = [_FIELDS.get(ours, ours) for ours, value in found_fields.items() if value is None]
    if missing:
        raise ValueError(
            f"config.json: found no value for {', '.join(missing)}, expected one, since defaults differ "
            "between versions and head_dim does not follow from the other fields; write it into the file"
        )
    # JSON does not tell 1000000 from 1000000.0.
    for name in ("norm_eps", "rope_theta"):
        found_fields[name] = float(found_fields[name])
    return TransformerConfig(**found_fields)


def config_to_hf(config: TransformerConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The fields of a `config.json`, in the older form: every version of transformers reads it alike.

    Args:
        config: The network's shape.
        dtype: Of the saved weights.

    Returns:
        JSON-ready fields. Token ids and the context's length are not the network's to know; the caller adds
        them.
    """
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        **{theirs: getattr(config, ours) for ours, theirs in _FIELDS.items()},
        "rope_theta": config.rope_theta,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,  # as published; nothing here reads it
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


@torch.no_grad()
def load_hf(model: Transformer, folder: str | Path) -> None:
    """Copy a checkpoint in Hugging Face's layout into the model's parameters.

    Everything is checked before anything is copied: the configuration, then names and shapes from the files'
    headers. The parameters keep their own dtype and device. Tensors are read one at a time.

    Args:
        model: Plain or sharded; a DTensor parameter takes only its slice, without communication.
        folder: With `config.json` and `model.safetensors`, or shards and their index.

    Raises:
        ValueError: A file is absent or unreadable, the shape of the network is another, or a parameter is
            missing, surplus or misshapen.
    """
    folder = Path(folder)
    _check_config(model.config, folder)
    found: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for path in _weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # not a dict
                if name in found:
                    raise ValueError(
                        f"{folder}: found {name} in {found[name][0].name} and {path.name}, expected it once"
                    )
                found[name] = path, tuple(file.get_slice(name).get_shape())
    _check_shapes(model.config, {name: shape for name, (_, shape) in found.items()}, folder)

    parameters = _parameters(model)
    for path in sorted({path for path, _ in found.values()}):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                parameter, value = parameters[our_name(name)], file.get_tensor(name)
                if isinstance(parameter, DTensor):
                    value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
                parameter.copy_(value)


def save_hf(
    model: Transformer,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
    fields: Mapping[str, Any] | None = None,
    write: bool = True,
) -> None:
    """Write the model as a folder that transformers loads.

    The folder appears under its name when it is complete: files are written beside it and moved at the end.
    Parameters are gathered and written shard by shard, so no more than one shard is held in memory.

    Args:
        model: Plain or sharded; where sharded, every rank calls, and all but one pass `write=False`.
        folder: To be made; must not exist.
        dtype: Of the saved weights; by default the parameters' own.
        max_shard_bytes: The most bytes in a file, a single larger tensor aside.
        fields: Further fields of `config.json`, such as token ids and `max_position_embeddings`.
        write: Whether this caller writes what it gathers.

    Raises:
        ValueError: The folder exists.
    """
    folder = Path(folder)
    parameters = _parameters(model)
    dtype = dtype or parameters["output.weight"].dtype
    shapes = parameter_shapes(model.config)
    shards = _plan_shards(shapes, dtype.itemsize, max_shard_bytes)
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = ["model.safetensors"]

    aside = folder.with_name(f".{folder.name}.partial")
    if write:
        if folder.exists():
            raise ValueError(f"{folder}: found a folder, expected none; name another, or move it away")
        shutil.rmtree(aside, ignore_errors=True)  # what an interrupted save has left
        aside.mkdir(parents=True)
    for file, names in zip(files, shards, strict=True):
        tensors: dict[str, Tensor] = {}
        for name in names:
            value = _whole(parameters[name])
            if write:
                tensors[hf_name(name)] = value.to("cpu", dtype).contiguous()
        if write:
            save_file(tensors, aside / file, metadata={"format": "pt"})
    if not write:
        return

    if len(shards) > 1:
        total = sum(prod(shape) for shape in shapes.values())
        weight_map = {hf_name(name): file for file, names in zip(files, shards, strict=True) for name in names}
        metadata = {"total_parameters": total, "total_size": total * dtype.itemsize}
        _write_json(aside / INDEX, {"metadata": metadata, "weight_map": weight_map})
    _write_json(aside / "config.json", config_to_hf(model.config, dtype) | dict(fields or {}))
    os.replace(aside, folder)  # noqa: PTH105  # a rename that a reader sees as one step


def _parameters(model: Transformer) -> dict[str, Tensor]:
    """The parameters by name; of a sharded model the sharded ones.

    A forward without a backward leaves gathered copies in their place, in the dtype of the computation:
    reading those would round the weights, and writing to them would be forgotten.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return dict(model.named_parameters())


def _whole(parameter: Tensor) -> Tensor:
    """The full value of a parameter; for a sharded one all ranks must ask."""
    value = parameter.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def _plan_shards(shapes: Mapping[str, tuple[int, ...]], itemsize: int, limit: int) -> list[list[str]]:
    """Names in order, cut wherever the next tensor would pass the limit."""
    shards: list[list[str]] = []
    room = 0
    for name, shape in shapes.items():
        size = prod(shape) * itemsize
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def _weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights; others may lie beside them, such as Mistral's own on the hub."""
    index, single = folder / INDEX, folder / "model.safetensors"
    if index.is_file():
        paths = sorted({folder / name for name in _read_json(index)["weight_map"].values()})
    elif single.is_file():
        paths = [single]
    else:
        raise ValueError(f"{folder}: found neither {INDEX} nor model.safetensors, expected one of them")
    absent = [path.name for path in paths if not path.is_file()]
    if absent:
        raise ValueError(f"{folder}: found no {_some(absent)}, expected it, since {INDEX} names it; fetch it again")
    return paths


def _check_config(config: TransformerConfig, folder: Path) -> None:
    """The shape of the network must be that of the weights: an epsilon that differs shows in no tensor."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder}: found no config.json, expected one beside the weights")
    theirs = config_from_hf(_read_json(path))
    differing = [
        f"{name} {getattr(theirs, name)} in the file, {value} in the model"
        for name, value in vars(config).items()
        if getattr(theirs, name) != value
    ]
    if differing:
        raise ValueError(f"{path}: found {'; '.join(differing)}, expected equal values; set model.* as in the file")


def _check_shapes(config: TransformerConfig, found: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    """Names and shapes must be exactly those of the network."""
    expected = {hf_name(name): shape for name, shape in parameter_shapes(config).items()}
    if missing := sorted(expected.keys() - found.keys()):
        raise ValueError(f"{folder}: found no {_some(missing)}, expected {len(expected)} parameters")
    if surplus := sorted(found.keys() - expected.keys()):
        raise ValueError(f"{folder}: found {_some(surplus)}, which the network does not have")
    misshapen = [
        f"{name} of shape {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if found[name] != shape
    ]
    if misshapen:
        raise ValueError(f"{folder}: found {_some(misshapen)}")


def _some(items: Iterable[str]) -> str:
    """The first three, and how many more."""
    items = list(items)
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: found text that is not JSON ({error}), expected an object") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: found {type(content).__name__}, expected an object")
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
