"""Weights and configuration between Hugging Face's layout on disk and ours in memory.

Owns the two naming schemes, the fields of `config.json` and the safetensors files. Knows nothing of
tokenizers, templates or ranks; a sharded parameter (DTensor) is filled with its slice and gathered whole,
nothing more. The rotary convention is the same on both sides, so no weight is permuted.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

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
MAX_SHARD_BYTES = 5 * 10**9  # as published: five files for the 12B in bfloat16
# In a folder that is being written.
_LOCK = ".lock"
NO_LOCKS = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL})
"""What a file system answers that has no locks."""
# The most bytes of a file that are in memory at once while a parameter is filled.
PIECE_BYTES = 2**28
# Safetensors' names for the dtypes that weights come in.
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def hf_name(name: str) -> str:
    """Hugging Face's name for one of our parameters; `KeyError` where there is none."""
    if name.startswith("layers."):
        _, layer, rest = name.split(".", 2)
        return f"model.layers.{layer}.{_IN_LAYER[rest]}"
    return _OUTER[name]


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
    rope: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(fields.get(name) or {}, Mapping):
            raise ValueError(f"config.json: {name}: found {fields[name]!r}, expected an object")
        rope |= fields.get(name) or {}
    expectations = {
        "model_type": (fields.get("model_type"), "mistral"),
        "architectures": (fields.get("architectures") or ["MistralForCausalLM"], ["MistralForCausalLM"]),
        "hidden_act": (fields.get("hidden_act", "silu"), "silu"),
        "sliding_window": (fields.get("sliding_window"), None),
        "tie_word_embeddings": (bool(fields.get("tie_word_embeddings", False)), False),
        "attention_dropout": (fields.get("attention_dropout") or 0.0, 0.0),
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
    for ours, value in found_fields.items():
        real = ours in ("norm_eps", "rope_theta")
        if isinstance(value, bool) or not isinstance(value, (int, float) if real else int):
            kind = "a number" if real else "a whole number"
            raise ValueError(f"config.json: {_FIELDS.get(ours, ours)}: found {value!r}, expected {kind}")
        if real:
            found_fields[ours] = float(value)  # JSON does not tell 1000000 from 1000000.0
    try:
        return TransformerConfig(**found_fields)
    except ValueError as error:  # speaks of our field
        ours, _, said = str(error).removeprefix("model.").partition(": ")
        raise ValueError(f"config.json: {_FIELDS.get(ours, ours)}: {said}") from error


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


class HFFolder:
    """A checkpoint in Hugging Face's layout, whose tensors are read piece by piece under our names.

    Opening it reads the configuration and the headers, and checks all that they say: nothing is copied out of a folder
    of which a part is missing, surplus, misshapen, of a strange dtype or cut short. Safetensors files alone are
    opened; nothing is ever unpickled.

    Attributes:
        path: The folder.
        fields: Its `config.json`.
        config: The network that it describes.
        dtype: Of every tensor.
    """

    def __init__(self, path: str | Path) -> None:
        """Open and check.

        Args:
            path: With `config.json` and `model.safetensors`, or shards and their index.

        Raises:
            ValueError: A file is absent or unreadable, or the files do not hold exactly the network that `config.json`
                describes. Names the file or the tensor.
        """
        self.path = Path(path)
        self.fields = _read_json(self.path / "config.json", "the configuration beside the weights")
        try:
            self.config = config_from_hf(self.fields)
        except ValueError as error:
            raise ValueError(str(error).replace("config.json", str(self.path / "config.json"), 1)) from error
        headers = {file: _header(file, names) for file, names in _weight_files(self.path).items()}
        self._file: dict[str, Path] = {}
        for file, tensors in headers.items():
            for name in tensors:
                if name in self._file:
                    raise ValueError(
                        f"{self.path}: found {name} in {self._file[name].name} and {file.name}, expected it once"
                    )
                self._file[name] = file
        self.dtype = self._check({name: tensors[name] for tensors in headers.values() for name in tensors})

    def _check(self, found: Mapping[str, tuple[tuple[int, ...], str]]) -> torch.dtype:
        """Names and shapes must be exactly those of the network; the dtype one of three, declared and equal."""
        expected = {hf_name(name): shape for name, shape in parameter_shapes(self.config).items()}
        if missing := sorted(expected.keys() - found.keys()):
            raise ValueError(f"{self.path}: found no {_some(missing)}, expected {len(expected)} parameters")
        if surplus := sorted(found.keys() - expected.keys()):
            places = [f"{name} (in {self._file[name].name})" for name in surplus]
            raise ValueError(f"{self.path}: found {_some(places)}, expected no tensor that the network does not have")
        misshapen = [
            f"{name} of shape {list(found[name][0])} in {self._file[name].name}, expected {list(shape)}"
            for name, shape in expected.items()
            if found[name][0] != shape
        ]
        if misshapen:
            raise ValueError(f"{self.path}: found {_some(misshapen)}")
        declared = str(self.fields.get("torch_dtype") or self.fields.get("dtype")).removeprefix("torch.")
        wanted = declared if declared in _DTYPES.values() else _DTYPES.get(found["model.norm.weight"][1], "bfloat16")
        strange = [
            f"{name} of dtype {code} in {self._file[name].name}"
            for name, (_, code) in found.items()
            if _DTYPES.get(code) != wanted
        ]
        if strange:
            says = " as config.json says (torch_dtype)" if declared == wanted else ""
            raise ValueError(
                f"{self.path}: found {_some(strange)}, expected {wanted} in every tensor{says}; "
                f"weights are {', '.join(_DTYPES.values())}, neither quantised nor mixed"
            )
        dtype: torch.dtype = getattr(torch, wanted)
        return dtype

    def read(self, name: str, region: tuple[slice, ...] = ()) -> Tensor:
        """One parameter, or a region of it.

        Args:
            name: Ours.
            region: A slice of each leading dimension; all by default.

        Returns:
            In the file's dtype, on the CPU; its pages are read from the file when they are first used.

        Raises:
            ValueError: The file cannot be read.
        """
        file, name = self._file[hf_name(name)], hf_name(name)
        with _opened(file) as opened:
            tensor: Tensor = opened.get_slice(name)[region] if region else opened.get_tensor(name)
        return tensor

    @torch.no_grad()
    def copy_to(self, name: str, target: Tensor, offset: Sequence[int] | None = None) -> None:
        """Fill a tensor with a parameter's values, or with the region of it that begins at `offset`.

        The file is opened anew for every piece, because a mapped page stays in memory until its file is closed.

        Args:
            name: Ours.
            target: Of any dtype and device.
            offset: Where the region begins in the whole parameter; by default at its origin.
        """
        begins = list(offset) if offset is not None else [0] * target.dim()
        if target.numel() == 0:
            return
        row_bytes = target[0].numel() * self.dtype.itemsize
        rows = max(1, PIECE_BYTES // max(1, row_bytes))
        for first in range(0, target.shape[0], rows):
            piece = target[first : first + rows]
            starts = [begins[0] + first, *begins[1:]]
            piece.copy_(self.read(name, tuple(slice(b, b + n) for b, n in zip(starts, piece.shape, strict=True))))


@torch.no_grad()
def load_hf(model: Transformer, folder: str | Path | HFFolder, *, new_rows: bool = False) -> None:
    """Copy a checkpoint in Hugging Face's layout into the model's parameters.

    Everything is checked before anything is copied. The parameters keep their own dtype and device. A sharded
    parameter reads its own region of the file and nothing else, so host memory holds one piece (`PIECE_BYTES`) beside
    the model, however large the checkpoint.

    Args:
        model: Plain or sharded, on any device but meta; a DTensor takes its region without communication.
        folder: A path, or a folder already opened.
        new_rows: Whether the model may have a larger vocabulary than the checkpoint; its further rows become 0, for the
            caller to set.

    Raises:
        ValueError: The folder does not hold the model's network; see `HFFolder`.
    """
    folder = folder if isinstance(folder, HFFolder) else HFFolder(folder)
    check_same_network(model.config, folder.config, str(folder.path), new_rows=new_rows)
    shapes = parameter_shapes(folder.config)
    for name, parameter in _parameters(model).items():
        local, begins = local_region(parameter)
        held = max(0, min(local.shape[0], shapes[name][0] - begins[0]))
        folder.copy_to(name, local[:held], begins)
        local[held:].zero_()


def check_same_network(
    config: TransformerConfig, theirs: TransformerConfig, place: str, *, new_rows: bool = False
) -> None:
    """The shape of the network must be that of the weights: an epsilon that differs shows in no tensor.

    Args:
        config: The model's.
        theirs: The weights'.
        place: What to call the weights.
        new_rows: Whether the model's vocabulary may be larger.

    Raises:
        ValueError: Naming each field that differs, with both values.
    """
    there = vars(theirs)
    differing = [
        f"{name} {there[name]} in the weights, {value} in the model"
        for name, value in vars(config).items()
        if there[name] != value and not (name == "vocab_size" and new_rows and value > there[name])
    ]
    if differing:
        raise ValueError(
            f"{place}: found {'; '.join(differing)}, expected equal values; "
            "set model.* as in the weights, or leave it to model=from_weights"
        )


def local_region(parameter: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """What this process holds of a parameter, and where that begins in the whole.

    Args:
        parameter: Plain or a DTensor.

    Returns:
        The local tensor, sharing memory with the parameter, and an offset in each dimension.
    """
    value = parameter.detach()
    if not isinstance(value, DTensor):
        return value, (0,) * value.dim()
    _, begins = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
    return value.to_local(), tuple(begins)


def save_hf(
    model: Transformer,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    fields: Mapping[str, Any] | None = None,
    write: bool = True,
) -> None:
    """Write the model as a folder that transformers loads.

    The folder appears under its name when it is complete. Parameters are gathered and written shard by shard, so no
    more than one shard is held in memory.

    Args:
        model: Plain or sharded; where sharded, every rank calls, and all but one pass `write=False`.
        folder: To be made; must not exist.
        dtype: Of the saved weights; by default the parameters' own.
        max_shard_bytes: The most bytes in a file, a single larger tensor aside.
        fields: Further fields of `config.json`, such as token ids and `max_position_embeddings`.
        write: Whether this caller writes what it gathers.

    Raises:
        ValueError: The folder exists, or cannot be written.
    """
    parameters = _parameters(model)
    dtype = dtype or parameters["output.weight"].dtype
    if not write:
        for name in parameter_shapes(model.config):
            _whole(parameters[name])
        return
    with written_aside(folder) as aside:
        write_weights(aside, model.config, dtype, lambda name: _whole(parameters[name]), max_shard_bytes)
        write_json(aside / "config.json", config_to_hf(model.config, dtype) | dict(fields or {}))


@contextlib.contextmanager
def written_aside(folder: str | Path) -> Iterator[Path]:
    """A folder to fill, which gets its name when it is complete, and is gone if that fails.

    While it is filled it is locked, so that what a killed process has left is told from what a living one writes.

    Args:
        folder: The name; must not exist.

    Yields:
        A folder beside it with nothing in it but a hidden lock. Its files are forced to disk before the one rename that
        makes them visible.

    Raises:
        ValueError: The folder exists, another process is writing it, or the disk is full or refuses; names the place.
    """
    folder = Path(folder)
    if folder.exists() or folder.is_symlink():
        raise ValueError(f"{folder}: found it there already, expected none; name another, or move it away")
    aside = folder.with_name(f".{folder.name}.partial")
    try:
        lock = _open_aside(aside)
        try:
            yield aside
            for path in (*aside.iterdir(), aside):
                sync_to_disk(path)
            os.replace(aside, folder)  # noqa: PTH105  # a rename that a reader sees as one step
        except BaseException:
            with contextlib.suppress(OSError):  # the failure itself is what its caller has to hear of
                _remove(aside, lock)
            raise
        _unlock(folder, lock)  # not before: a second process would take the folder for its own
        sync_to_disk(folder)
        sync_to_disk(folder.parent)
    except OSError as error:
        place = error.filename or folder
        raise ValueError(f"{place}: found {error.strerror or error}, expected to write {folder} there") from error


def _open_aside(aside: Path) -> int | None:
    """Make an empty folder and lock it; the lock's descriptor, or None where the file system has no locks.

    Raises:
        ValueError: Another process has it.
    """
    while True:
        aside.mkdir(parents=True, exist_ok=True)
        try:
            lock = try_lock(aside / _LOCK)
        except FileNotFoundError:
            continue  # whoever had it is done, between the two lines
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            _clear(aside)
            _unlock(aside, None)
            return None
        if lock is None:
            raise ValueError(f"{aside}: found another process that writes there, expected one at a time; wait for it")
        _clear(aside)
        return lock


def _clear(aside: Path) -> None:
    """Remove what a process has left in a folder that it was writing; the lock stays."""
    for left in aside.iterdir():
        if left.name != _LOCK:
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def _remove(aside: Path, lock: int | None) -> None:
    """Remove a folder that is locked here. Who locks it anew the moment the lock is gone keeps it."""
    try:
        _clear(aside)
    finally:
        _unlock(aside, lock)
    with contextlib.suppress(OSError):
        aside.rmdir()


def _unlock(folder: Path, lock: int | None) -> None:
    """Remove a folder's lock, while it is held, and let go of it."""
    try:
        (folder / _LOCK).unlink(missing_ok=True)
    finally:
        if lock is not None:
            os.close(lock)


def remove_abandoned(folder: Path) -> list[Path]:
    """Remove what killed processes have left of folders that were being written in `folder`.

    What a living process writes, on any host that sees the same locks, stays; so does whatever cannot be told.

    Args:
        folder: Where `written_aside` was to give a name.

    Returns:
        What was removed.
    """
    removed = []
    for aside in sorted(folder.glob(".*.partial")):
        try:
            lock = try_lock(aside / _LOCK)
        except OSError:  # no locks here, somebody else's, or gone just now
            continue
        if lock is None:
            continue
        _remove(aside, lock)
        removed.append(aside)
    return removed


def try_lock(path: Path) -> int | None:
    """Make a file and lock it. The lock lasts until the descriptor is closed or the process ends, however it ends.

    Args:
        path: Nothing in it is read or changed.

    Returns:
        Its descriptor, which no program that is started inherits; None where another process holds the lock.

    Raises:
        OSError: It cannot be opened for writing, without which NFS locks nothing. With an `errno` in `NO_LOCKS` the
            file system has no locks at all.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                os.close(descriptor)
                raise
        os.close(descriptor)  # removed by its last holder since it was opened: another one counts now


def write_weights(
    folder: Path,
    config: TransformerConfig,
    dtype: torch.dtype,
    read: Callable[[str], Tensor],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write safetensors files, and their index where there are several.

    Args:
        folder: Exists.
        config: Which parameters there are.
        dtype: Of the saved weights.
        read: A parameter's whole value by our name; called once for each, in the network's order.
        max_shard_bytes: The most bytes in a file, a single larger tensor aside; so much is held in memory.

    Raises:
        ValueError: A file cannot be written.
    """
    shapes = parameter_shapes(config)
    shards = plan_shards(shapes, dtype.itemsize, max_shard_bytes)
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = ["model.safetensors"]
    for file, names in zip(files, shards, strict=True):
        tensors = {hf_name(name): read(name).to("cpu", dtype).contiguous() for name in names}
        try:
            save_file(tensors, folder / file, metadata={"format": "pt"})  # transformers asks for the format
            (folder / file).chmod(folder.stat().st_mode & 0o666)  # the library's own would lock other users out
        except SafetensorError as error:
            reason = str(error).rpartition(": ")[2]  # what the system said
            raise ValueError(f"{folder / file}: found {reason}, expected room to write it; free some space") from error
        del tensors  # before the next shard is read
    if len(shards) > 1:
        total = sum(prod(shape) for shape in shapes.values())
        weight_map = {hf_name(name): file for file, names in zip(files, shards, strict=True) for name in names}
        metadata = {"total_parameters": total, "total_size": total * dtype.itemsize}
        write_json(folder / INDEX, {"metadata": metadata, "weight_map": weight_map})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object as people read it."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _parameters(model: Transformer) -> dict[str, Tensor]:
    """The parameters by name; of a sharded model the sharded ones.

    A forward without a backward leaves gathered copies in their place, in the dtype of the computation:
    reading those would round the weights, and writing to them would be forgotten.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    # A block that is computed again in the backward pass has its wrapper's name in its own.
    return {name.replace("_checkpoint_wrapped_module.", ""): p for name, p in model.named_parameters()}


def _whole(parameter: Tensor) -> Tensor:
    """The full value of a parameter; for a sharded one all ranks must ask."""
    value = parameter.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def plan_shards(shapes: Mapping[str, tuple[int, ...]], itemsize: int, limit: int) -> list[list[str]]:
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


def _weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """The files that hold the weights, and the names that the index says are in each (None: no index).

    Others may lie beside them, such as Mistral's own on the hub.
    """
    index, single = folder / INDEX, folder / "model.safetensors"
    if index.is_file():
        weight_map = _read_json(index, "the index of the shards").get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index}: found no weight_map, expected the file of each tensor")
        names: dict[Path, set[str]] = {}
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file:  # an index must not lead out of its folder
                raise ValueError(f"{index}: found {file!r} for {name}, expected the name of a file beside it")
            names.setdefault(folder / file, set()).add(name)
        absent = [path.name for path in names if not path.is_file()]
        if absent:
            raise ValueError(f"{folder}: found no {_some(absent)}, expected it, since {INDEX} names it; fetch it again")
        return {path: names[path] for path in sorted(names)}
    if single.is_file():
        return {single: None}
    shards = sorted(path.name for path in folder.glob("model-*.safetensors"))
    others = sorted(path.name for path in folder.glob("pytorch_model*"))
    beside = f" beside {_some(shards or others)}" if shards or others else ""
    remedy = "; fetch it again" if shards else "; convert pickled weights to safetensors first" if others else ""
    raise ValueError(f"{folder}: found neither {INDEX} nor model.safetensors{beside}, expected one of them{remedy}")


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A safetensors file; what is wrong with it is told with its name."""
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file}: found a file that cannot be read ({error}), expected whole safetensors; fetch it again"
        ) from error


def _header(file: Path, indexed: set[str] | None) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name → shape and dtype of every tensor of a file, which must be those that the index puts there."""
    with _opened(file) as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  # not a dict
        header = {name: (tuple(part.get_shape()), str(part.get_dtype())) for name, part in slices.items()}
    if indexed is not None and (moved := sorted(indexed ^ header.keys())):
        where = "not in it" if moved[0] in indexed else "in it and not in the index"
        raise ValueError(f"{file}: found {_some(moved)} {where}, expected the tensors that {INDEX} names for it")
    return header


def _some(items: Iterable[str]) -> str:
    """The first three, and how many more."""
    items = list(items)
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")


def _read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON object from a file, or an error that names it."""
    if not path.is_file():
        raise ValueError(f"{path.parent}: found no {path.name}, expected {what}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: found {error.strerror}, expected {what}") from error
    except ValueError as error:
        raise ValueError(f"{path}: found text that is not JSON ({error}), expected an object") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: found {type(content).__name__}, expected an object")
    return content


def sync_to_disk(path: Path) -> None:
    """Have the operating system put a file or folder on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
