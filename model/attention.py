"""Causal grouped-query attention within each document of a pack: one signature, several kernels.

Owns the choice of kernel, the adapters and the key-value cache of inference. Knows nothing of projections or
rotations.

Letters: T tokens in a pack, H query heads, K key-value heads, E head_dim, N documents; a tensor of `bounds`
has N + 1 entries. With a cache: B sequences, S tokens of the longest, n new ones of each.
"""

import importlib.util
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor
from torch.nn.attention import (
    activate_flash_attention_impl,
    current_flash_attention_impl,
    restore_flash_attention_impl,
)

BACKENDS = ("auto", "sdpa", "varlen", "varlen_fa3", "varlen_fa4", "cudnn", "flash_attn")
"""Beside auto: torch's kernels document by document, FlashAttention 2, 3 and 4 behind torch's operators for packs,
cuDNN's by torch, and the package flash-attn."""

FUSED = BACKENDS[2:]
"""Those that take a whole pack in one call: on a GPU, in bfloat16 or float16."""

_flash_attn_spec = importlib.util.find_spec("flash_attn")
# FlashAttention 4 comes into the folder of flash-attn, which without flash-attn itself is a bare namespace.
_HAS_FLASH_ATTN = _flash_attn_spec is not None and _flash_attn_spec.origin is not None
_HAS_FA4 = _flash_attn_spec is not None and any(
    (Path(folder) / "cute").is_dir() for folder in _flash_attn_spec.submodule_search_locations or ()
)
_HAS_FA3 = importlib.util.find_spec("flash_attn_interface") is not None

_FLASH = {"varlen": "FA2", "varlen_fa3": "FA3", "varlen_fa4": "FA4"}
"""Implementations behind torch's FlashAttention operators, by the name that torch knows them by."""

_LEAST_CUDNN = 91_800
"""9.18, from which on torch 2.15 uses these kernels by itself."""


def choose_backend(name: str, device_type: str, dtype: torch.dtype) -> str:
    """The kernel that will run, or an error that says why it cannot.

    What can run follows from the device and the dtype: that a kernel imports proves nothing, torch's own
    imports on a CPU and then fails. `auto` is the only name that picks; any other either runs or is refused,
    never replaced. `auto` takes what torch itself has: which kernel is the fastest is measured where it matters,
    at the start of a training run.

    Args:
        name: One of `BACKENDS`.
        device_type: "cpu", "cuda", …, the `type` of a `torch.device`.
        dtype: Of queries, keys and values.

    Returns:
        One of `BACKENDS` other than "auto".

    Raises:
        ValueError: The name is unknown, or its kernel is absent, does not run on this device or dtype, or has no
            deterministic backward where that is asked for (`torch.use_deterministic_algorithms`).
    """
    fused_runs = device_type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    if name == "auto":
        return "varlen" if fused_runs else "sdpa"
    if name == "sdpa":
        return name
    if name not in BACKENDS:
        raise ValueError(f"model.attention: found {name!r}, expected one of {', '.join(BACKENDS)}")
    remedy = "set model.attention=auto or model.attention=sdpa"
    if device_type != "cuda":
        raise ValueError(f"model.attention: found {name!r} on device {device_type!r}, expected a CUDA device; {remedy}")
    if not fused_runs:
        raise ValueError(
            f"model.attention: found {name!r} with {dtype}, expected torch.bfloat16 or torch.float16; "
            f"compute in bfloat16, or {remedy}"
        )
    if lack := _lack(name):
        raise ValueError(f"model.attention: found {name!r} with {lack}, or {remedy}")
    return name


def _lack(name: str) -> str:
    """What a fused backend needs and this machine, its torch or its settings do not have; empty where all is there."""
    major, minor = _capability()
    gpu = f"a GPU of compute capability {major}.{minor}"
    if name == "flash_attn" and not _HAS_FLASH_ATTN:
        return "no such package, expected flash-attn to be installed; install magnum-train[flash]"
    if name == "varlen_fa3" and not (_HAS_FA3 and major == 9):
        found = "no package flash_attn_interface" if major == 9 else gpu
        return f"{found}, expected FlashAttention 3 on compute capability 9; set model.attention=varlen"
    if name == "varlen_fa4" and not (_HAS_FA4 and major in (9, 10)):
        found = "no package flash_attn.cute" if major in (9, 10) else gpu
        return f"{found}, expected FlashAttention 4 on compute capability 9 or 10; set model.attention=varlen"
    if name != "cudnn":
        return ""
    if (version := _cudnn_version()) < _LEAST_CUDNN or major not in (9, 10):
        found = f"cuDNN {version or 'absent'}" if version < _LEAST_CUDNN else gpu
        return f"{found}, expected cuDNN {_LEAST_CUDNN} on compute capability 9 or 10; set model.attention=varlen"
    if torch.are_deterministic_algorithms_enabled():  # then torch does not take it for SDPA either
        return "train.deterministic=true, expected a kernel with a deterministic backward; set model.attention=varlen"
    return ""


def _capability() -> tuple[int, int]:
    """The current GPU's; (0, 0) without one."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)


def _cudnn_version() -> int:
    """As 91900 for 9.19.0; 0 without it."""
    version: int | None = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return version or 0


def attention(
    q: Float[Tensor, "T H E"],
    k: Float[Tensor, "T K E"],
    v: Float[Tensor, "T K E"],
    cu_seqlens: Int32[Tensor, " bounds"],
    max_seqlen: int,
    backend: str,
    lengths: tuple[int, ...] | None = None,
) -> Float[Tensor, "T H E"]:
    """softmax(q kᵀ / √E) v, where a token sees itself and the earlier tokens of its own document.

    Args:
        q: Queries, rotated.
        k: Keys, rotated; query head h reads key-value head h // (H / K).
        v: Values.
        cu_seqlens: Where documents begin, from 0 and ending in T; an entry that repeats is an empty document.
        max_seqlen: At least the longest document, in tokens. Flash kernels size their grid by it.
        backend: One of `BACKENDS`.
        lengths: The documents' lengths, where the caller has them on the host already; `sdpa` needs them
            there, and asking the device in every layer would stall it.

    Returns:
        Attention's output, in the dtype of `q`.

    Raises:
        ValueError: The backend cannot run here (`choose_backend`).
    """
    # Within a compiled block the network has chosen already, and a compiler cannot look at the machine.
    chosen = backend
    if backend == "auto" or not torch.compiler.is_compiling():
        chosen = choose_backend(backend, q.device.type, q.dtype)
    if chosen == "sdpa" and q.device.type == "cpu":
        return cast(Tensor, _on_cpu(q, k, v, cu_seqlens)[0])
    if chosen == "sdpa":
        return cast(Tensor, _sdpa(q, k, v, document_lengths(cu_seqlens) if lengths is None else lengths))
    if chosen in _FLASH:
        return cast(Tensor, _flash(q, k, v, cu_seqlens, max_seqlen, _FLASH[chosen])[0])
    if chosen == "cudnn":
        return cast(Tensor, _cudnn(q, k, v, cu_seqlens)[0])
    return _flash_attn(q, k, v, cu_seqlens, max_seqlen)


def document_lengths(cu_seqlens: Int32[Tensor, " bounds"]) -> tuple[int, ...]:
    """Lengths of the documents on the host, empty ones included; waits for the device."""
    return tuple(cu_seqlens.diff().tolist())


# On a GPU only: lengths change with every pack, and a compiler would specialise on them.
@torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
def _sdpa(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """One kernel call for each document that is not empty."""
    # Split and not sliced: a slice's backward fills a whole tensor of zeros, one for each document.
    full = [n for n in lengths if n]
    documents = zip(*(torch.split(x.transpose(0, 1), full, dim=1) for x in (q, k, v)), strict=True)
    outputs = [
        F.scaled_dot_product_attention(q_i[None], k_i[None], v_i[None], is_causal=True, enable_gqa=True)[0]
        for q_i, k_i, v_i in documents
    ]
    return torch.cat(outputs, dim=1).transpose(0, 1)


@torch.library.custom_op("magnum_train::attention_on_cpu", mutates_args=())
def _on_cpu(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """The kernel behind SDPA on a CPU, called for each document; an operator, so that a compiler sees no lengths.

    Returns:
        The output [T, H, E], and the logarithm of each softmax's denominator [T, H] for the backward.
    """
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
    for document in _slices(cu_seqlens):
        q_i, k_i, v_i = _as_heads(q, k, v, document)
        out_i, lse_i = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q_i, k_i, v_i, is_causal=True)
        out[document], lse[document] = out_i[0].transpose(0, 1), lse_i[0].transpose(0, 1)
    return out, lse


@torch.library.custom_op("magnum_train::attention_on_cpu_backward", mutates_args=())
def _on_cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values."""
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for document in _slices(cu_seqlens):
        heads = _as_heads(q, k, v, document)
        grad_i, out_i, lse_i = (x[document].transpose(0, 1)[None] for x in (grad, out, lse))
        of_heads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_i, *heads, out_i, lse_i, 0.0, True
        )
        for whole, part in zip(grads, of_heads, strict=True):  # heads that share keys add their gradients up
            whole[document] = part[0].unflatten(0, (whole.shape[1], -1)).sum(1).transpose(0, 1)
    return grads


def _slices(cu_seqlens: Tensor) -> list[slice]:
    """Where the documents that are not empty lie."""
    bounds = cu_seqlens.tolist()
    return [slice(begin, end) for begin, end in itertools.pairwise(bounds) if begin < end]


def _as_heads(q: Tensor, k: Tensor, v: Tensor, document: slice) -> list[Tensor]:
    """A document's queries, keys and values as [1, H, n, E]: the kernel knows no grouped heads."""
    groups = q.shape[1] // k.shape[1]
    grouped = (q[document], *(x[document].repeat_interleave(groups, dim=1) for x in (k, v)))
    return [x.transpose(0, 1)[None] for x in grouped]


@_on_cpu.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))


@_on_cpu_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """For all of the operators: queries, keys, values and bounds come first, then what is no tensor."""
    q, k, v, cu_seqlens, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return (*_on_cpu_backward(grad, *ctx.saved_tensors), None)


_on_cpu.register_autograd(_gradients, setup_context=_keep_for_backward)


@torch.library.custom_op("magnum_train::flash_attention", mutates_args=())
def _flash(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, version: str) -> tuple[Tensor, Tensor]:
    """FlashAttention by torch's operators, as torch's `varlen_attn` calls them.

    An operator of ours around them, since torch has one implementation active in the whole process: here the one that
    is meant is made so at every call, in the backward too, whatever ran in between. Grouped heads are passed as they
    are; that of torch 2.11 takes them as well, although its `varlen_attn` does not say so.

    Returns:
        The output [T, H, E], and the logarithm of each softmax's denominator [H, T] for the backward.
    """
    _activate(version)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, 0.0, True, False,
        window_size_left=-1, window_size_right=0,
    )  # fmt: skip
    return out, lse


@torch.library.custom_op("magnum_train::flash_attention_backward", mutates_args=())
def _flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    version: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients; deterministic where `torch.use_deterministic_algorithms` asks for it: all versions look at that."""
    _activate(version)
    no_seed = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of dropout, as torch passes it
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, 0.0, True, no_seed, q.new_empty(0),
        window_size_left=-1, window_size_right=0,
    )  # fmt: skip
    return grads


def _activate(version: str) -> None:
    """Let torch's FlashAttention operators be implemented by this version; by its own, FA2, without a package."""
    active = current_flash_attention_impl() or "FA2"
    if active == version:
        return
    if version == "FA2":
        restore_flash_attention_impl()
    else:
        activate_flash_attention_impl(version)


@_flash.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, version: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@_flash_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    version: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _flash_gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*_flash_backward(grad, *ctx.saved_tensors, *ctx.settings), None, None, None)


_flash.register_autograd(_flash_gradients, setup_context=_keep_for_backward)


@torch.library.custom_op("magnum_train::cudnn_attention", mutates_args=())
def _cudnn(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """The kernels of cuDNN for ragged packs, which torch has and whose `varlen_attn` uses them from torch 2.15 on.

    A plan is built for every new shape, which takes a second. So the longest document is always said to be the whole
    pack. Keys and values are written out for every query head, since torch 2.15 passes no grouped heads either.

    Returns:
        The output [T, H, E], and the logarithm of each softmax's denominator [T, H] for the backward.
    """
    k, v = (_for_all_heads(x, q) for x in (k, v))
    out, lse, *_ = torch.ops.aten._cudnn_attention_forward(
        query=q.contiguous(), key=k, value=v, attn_bias=None, cum_seq_q=cu_seqlens, cum_seq_k=cu_seqlens,
        max_q=q.shape[0], max_k=q.shape[0], compute_log_sumexp=True, dropout_p=0.0, is_causal=True,
        return_debug_mask=False,
    )  # fmt: skip
    return out, lse.reshape(q.shape[:2])


@torch.library.custom_op("magnum_train::cudnn_attention_backward", mutates_args=())
def _cudnn_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values.

    By name, since torch 2.11 and 2.13 call this operator with its arguments in another order than it has.
    """
    wide_k, wide_v = (_for_all_heads(x, q) for x in (k, v))
    no_seed = torch.zeros(2, dtype=torch.int64, device=q.device)  # of dropout
    grad_q, *others = torch.ops.aten._cudnn_attention_backward(
        grad_out=grad.contiguous(), query=q.contiguous(), key=wide_k, value=wide_v, out=out, logsumexp=lse[..., None],
        philox_seed=no_seed, philox_offset=no_seed, attn_bias=None, cum_seq_q=cu_seqlens, cum_seq_k=cu_seqlens,
        max_q=q.shape[0], max_k=q.shape[0], dropout_p=0.0, is_causal=True,
    )  # fmt: skip
    grad_k, grad_v = (x.unflatten(1, (k.shape[1], -1)).sum(2) for x in others)
    return grad_q, grad_k, grad_v


def _for_all_heads(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values, written out for every head of the queries."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


@_cudnn.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


@_cudnn_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _cudnn_gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*_cudnn_backward(grad, *ctx.saved_tensors), None)


_cudnn.register_autograd(_cudnn_gradients, setup_context=_keep_for_backward)


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """FlashAttention from its own package."""
    from flash_attn import flash_attn_varlen_func  # optional, and slow to import

    output: Tensor = flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, causal=True,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return output


@dataclass(frozen=True, eq=False)
class Newest:
    """What one forward adds to a cache: the same for every layer.

    Attributes:
        cu_seqlens: Where each sequence's new tokens begin in the pack, int32 [B + 1].
        max_seqlen: At least the most new tokens of a sequence.
        counts: New tokens of each sequence, [B].
        totals: Tokens of each sequence with the new ones, [B].
        rows: Each new token's sequence, int64 [T].
        places: Its place in that sequence, int64 [T].
        first: Whether nothing lies before any new token.
        single: Whether each sequence has one new token.
        mask: Where it has one, which places it sees, bool [B, 1, S]; None where it sees all.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    counts: tuple[int, ...]
    totals: tuple[int, ...]
    rows: Tensor
    places: Tensor
    first: bool
    single: bool
    mask: Tensor | None


class LayerCache:
    """Keys and values of one layer, [B, room, K, E].

    Room is taken when tokens come, because only then dtype and device are known (under mixed precision the
    parameters' own dtype is not that of the computation), and grows by half, so that copying costs a constant
    share of each token's time.
    """

    def __init__(self) -> None:
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(
        self, k: Float[Tensor, "T K E"], v: Float[Tensor, "T K E"], newest: Newest
    ) -> tuple[Float[Tensor, "B S K E"], Float[Tensor, "B S K E"]]:
        """Store the newest tokens and return all; a shorter sequence ends in what means nothing."""
        sequences, longest = len(newest.totals), max(newest.totals)
        self._keys = _with_room(self._keys, k, sequences, longest)
        self._values = _with_room(self._values, v, sequences, longest)
        self._keys[newest.rows, newest.places] = k
        self._values[newest.rows, newest.places] = v
        return self._keys[:, :longest], self._values[:, :longest]

    def keep(self, rows: Int64[Tensor, " B"]) -> None:
        """Drop all other sequences."""
        if self._keys is not None and self._values is not None:
            rows = rows.to(self._keys.device)
            self._keys = self._keys.index_select(0, rows)
            self._values = self._values.index_select(0, rows)


def _with_room(stored: Tensor | None, new: Tensor, sequences: int, length: int) -> Tensor:
    """The tensor itself where it holds so many tokens, else a larger one that begins with it."""
    room = 0 if stored is None else stored.shape[1]
    if stored is not None and length <= room:
        return stored
    # Zeros, since a masked place has the weight 0, and 0 x NaN is NaN.
    larger = new.new_zeros(sequences, max(length, room + room // 2), *new.shape[1:])
    if stored is not None:
        larger[:, :room] = stored
    return larger


class KeyValueCache:
    """Keys and values of B sequences in every layer; without gradients.

    The lengths are on the host, so that no layer asks the device. They move on when a forward has come
    through, not before: one that was interrupted leaves the cache as it was.

    Args:
        n_layers: Layers of the network.
        sequences: B.

    Attributes:
        lengths: Tokens held of each sequence, [B].
        layers: One `LayerCache` each.
    """

    def __init__(self, n_layers: int, sequences: int = 1) -> None:
        self.lengths = (0,) * sequences
        self.layers = [LayerCache() for _ in range(n_layers)]

    def newest(self, tokens: int, cu_seqlens: Int32[Tensor, " bounds"], max_seqlen: int) -> Newest:
        """Where a pack of `tokens` new tokens goes, a document to each sequence; an empty one adds nothing.

        Raises:
            ValueError: There are not as many documents as sequences.
        """
        sequences = len(self.lengths)
        if cu_seqlens.numel() != sequences + 1:
            raise ValueError(
                f"cu_seqlens: found {cu_seqlens.numel() - 1} documents, expected {sequences}, as the cache has"
            )
        counts: tuple[int, ...]
        if sequences == 1:
            counts = (tokens,)
        elif max_seqlen == 1 and tokens == sequences:
            counts = (1,) * sequences
        else:
            counts = document_lengths(cu_seqlens)  # only where new sequences begin: the newest ids need no answer
        spans = [(held, held + n) for n, held in zip(counts, self.lengths, strict=True)]
        rows = [i for i, (begin, end) in enumerate(spans) for _ in range(begin, end)]
        device = cu_seqlens.device
        places = torch.tensor([place for span in spans for place in range(*span)], device=device)
        single = max(counts) == min(counts) == 1
        mask = None
        if single and len(set(self.lengths)) > 1:
            mask = (torch.arange(max(self.lengths) + 1, device=device) <= places[:, None])[:, None]
        return Newest(
            cu_seqlens, max_seqlen, counts, tuple(end for _, end in spans), torch.tensor(rows, device=device), places,
            first=not any(0 < begin < end for begin, end in spans), single=single, mask=mask,
        )  # fmt: skip

    def advance(self, newest: Newest) -> None:
        """Count the tokens that every layer has stored."""
        self.lengths = newest.totals

    def cut(self, lengths: Sequence[int]) -> None:
        """Forget the end of each sequence.

        Raises:
            ValueError: A sequence is shorter than that.
        """
        if any(not 0 <= n <= held for n, held in zip(lengths, self.lengths, strict=True)):
            raise ValueError(f"key-value cache: found lengths {list(lengths)}, expected at most {list(self.lengths)}")
        self.lengths = tuple(lengths)

    def keep(self, sequences: Sequence[int]) -> None:
        """Drop all sequences but these, which take their order; one copy of what stays."""
        rows = torch.tensor(list(sequences))
        for layer in self.layers:
            layer.keep(rows)
        self.lengths = tuple(self.lengths[i] for i in sequences)


def cached_attention(
    q: Float[Tensor, "T H E"],
    k: Float[Tensor, "T K E"],
    v: Float[Tensor, "T K E"],
    cache: LayerCache,
    newest: Newest,
    backend: str,
) -> Float[Tensor, "T H E"]:
    """Store each sequence's newest tokens, and let them attend to all of its tokens so far.

    Where there is nothing before them they are an ordinary pack. One new token each is one call of the kernel.
    Several, on top of a past, are a call for each sequence.

    Args:
        q: Queries of the newest tokens, rotated, sequence after sequence.
        k: Their keys, rotated.
        v: Their values.
        cache: The layer's.
        newest: Where they go.
        backend: For the ordinary pack, one of `BACKENDS`.

    Returns:
        Attention's output for the newest tokens.
    """
    keys, values = cache.append(k, v, newest)
    if newest.first:
        if backend == "cudnn":  # it would build a plan for every length of prompt
            backend = "varlen"
        return attention(q, k, v, newest.cu_seqlens, newest.max_seqlen, backend, newest.counts)
    if newest.single:
        return _grouped(q[:, None], keys, values, newest.mask)[:, 0]
    outputs = []
    for i, (q_i, total) in enumerate(zip(torch.split(q, list(newest.counts)), newest.totals, strict=True)):
        if new := len(q_i):  # the kernel's own causal mask would count from the first key, not from the last
            mask = torch.ones(1, new, total, dtype=torch.bool, device=q.device).tril(total - new)
            outputs.append(_grouped(q_i[None], keys[i : i + 1, :total], values[i : i + 1, :total], mask)[0])
    return torch.cat(outputs)


def _grouped(
    q: Float[Tensor, "B n H E"],
    k: Float[Tensor, "B S K E"],
    v: Float[Tensor, "B S K E"],
    mask: Bool[Tensor, "B n S"] | None,
) -> Float[Tensor, "B n H E"]:
    """Attention under any mask, where the query heads of one key-value head stand beside each other as queries.

    To the kernel they are then ordinary heads: those for GPUs take a mask or grouped heads, not both, and the one
    that takes both writes the keys out for every query head.
    """
    sequences, new, heads, width = q.shape
    kv_heads, groups = k.shape[2], heads // k.shape[2]
    q = q.reshape(sequences, new, kv_heads, groups, width).transpose(1, 2).flatten(2, 3)  # [B, K, n x H / K, E]
    if mask is not None:
        mask = mask.repeat_interleave(groups, dim=1)[:, None]
    out = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return out.reshape(sequences, kv_heads, new, groups, width).transpose(1, 2).flatten(2, 3)
