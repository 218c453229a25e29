"""Causal grouped-query attention within each document of a pack: one signature, several kernels.

Owns the choice of kernel, the adapters and the key-value cache of inference. Knows nothing of projections or
rotations.

Letters: T tokens in a pack, S cached and new tokens, H query heads, K key-value heads, E head_dim, N
documents; a tensor of `bounds` has N + 1 entries.
"""

import importlib.util
import inspect
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int32
from torch import Tensor

BACKENDS = ("auto", "sdpa", "varlen", "flash_attn")

_HAS_FLASH_ATTN = importlib.util.find_spec("flash_attn") is not None
_HAS_VARLEN = importlib.util.find_spec("torch.nn.attention.varlen") is not None
# torch 2.11 has varlen attention for equal numbers of heads only; later versions take grouped heads when
# asked to.
_VARLEN_TAKES_GROUPS = False
if _HAS_VARLEN:
    from torch.nn.attention.varlen import varlen_attn

    _VARLEN_TAKES_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters


def choose_backend(name: str, device_type: str, dtype: torch.dtype) -> str:
    """The kernel that will run, or an error that says why it cannot.

    What can run follows from the device and the dtype: that a kernel imports proves nothing, torch's own
    imports on a CPU and then fails. `auto` is the only name that picks; any other either runs or is refused,
    never replaced.

    Args:
        name: One of `BACKENDS`.
        device_type: "cpu", "cuda", …, the `type` of a `torch.device`.
        dtype: Of queries, keys and values.

    Returns:
        "sdpa", "varlen" or "flash_attn".

    Raises:
        ValueError: The name is unknown, or its kernel is absent or does not run on this device or dtype.
    """
    flash_runs = device_type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    if name == "auto":
        if flash_runs and _HAS_VARLEN:
            return "varlen"
        return "flash_attn" if flash_runs and _HAS_FLASH_ATTN else "sdpa"
    if name == "sdpa":
        return name
    if name not in BACKENDS:
        raise ValueError(f"model.attention: found {name!r}, expected one of {', '.join(BACKENDS)}")
    remedy = "set model.attention=auto or model.attention=sdpa"
    if device_type != "cuda":
        raise ValueError(f"model.attention: found {name!r} on device {device_type!r}, expected a CUDA device; {remedy}")
    if not flash_runs:
        raise ValueError(
            f"model.attention: found {name!r} with {dtype}, expected torch.bfloat16 or torch.float16; "
            f"compute in bfloat16, or {remedy}"
        )
    if name == "flash_attn" and not _HAS_FLASH_ATTN:
        raise ValueError(
            "model.attention: found 'flash_attn', expected the package flash-attn to be installed; "
            f"install magnum-train[flash], or set model.attention=varlen, or {remedy}"
        )
    if name == "varlen" and not _HAS_VARLEN:
        raise ValueError(
            f"model.attention: found 'varlen' with torch {torch.__version__}, "
            f"expected torch.nn.attention.varlen; upgrade torch, or {remedy}"
        )
    return name


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
    chosen = choose_backend(backend, q.device.type, q.dtype)
    if chosen == "sdpa":
        return cast(Tensor, _sdpa(q, k, v, document_lengths(cu_seqlens) if lengths is None else lengths))
    if chosen == "varlen":
        return _varlen(q, k, v, cu_seqlens, max_seqlen)
    return _flash_attn(q, k, v, cu_seqlens, max_seqlen)


def document_lengths(cu_seqlens: Int32[Tensor, " bounds"]) -> tuple[int, ...]:
    """Lengths of the documents on the host, empty ones included; waits for the device."""
    return tuple(cu_seqlens.diff().tolist())


# Lengths change with every pack, and a compiler would specialise on them.
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


def _varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """FlashAttention as torch ships it."""
    causal = (-1, 0)  # a window: everything before and nothing after
    cu, most = cu_seqlens, max_seqlen
    output: Any
    if _VARLEN_TAKES_GROUPS:
        output = varlen_attn(q, k, v, cu, cu, most, most, window_size=causal, enable_gqa=True)
    else:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        output = varlen_attn(q, k, v, cu, cu, most, most, window_size=causal)
    return cast(Tensor, output)


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """FlashAttention from its own package."""
    from flash_attn import flash_attn_varlen_func  # optional, and slow to import

    output: Tensor = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, causal=True)
    return output


class LayerCache:
    """Keys and values of one layer for one document, in room reserved once.

    The room is taken at the first `append`, because only then dtype and device are known: under mixed
    precision the parameters' own dtype is not that of the computation.

    Args:
        capacity: The most tokens that it will hold.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(
        self, k: Float[Tensor, "T K E"], v: Float[Tensor, "T K E"]
    ) -> tuple[Float[Tensor, "S K E"], Float[Tensor, "S K E"]]:
        """Store the newest tokens and return all, oldest first.

        Raises:
            ValueError: There is no room for so many.
        """
        end = self.length + k.shape[0]
        if end > self.capacity:
            raise ValueError(f"key-value cache: found {end} tokens, expected at most {self.capacity}")
        if self._keys is None or self._values is None:
            self._keys = k.new_empty(self.capacity, *k.shape[1:])
            self._values = v.new_empty(self.capacity, *v.shape[1:])
        self._keys[self.length : end] = k
        self._values[self.length : end] = v
        self.length = end
        return self._keys[:end], self._values[:end]


class KeyValueCache:
    """One `LayerCache` for each layer; for one document, without gradients.

    Args:
        n_layers: Layers of the network.
        capacity: The most tokens that it will hold.
    """

    def __init__(self, n_layers: int, capacity: int) -> None:
        self.layers = [LayerCache(capacity) for _ in range(n_layers)]


def cached_attention(
    q: Float[Tensor, "T H E"], k: Float[Tensor, "S K E"], v: Float[Tensor, "S K E"]
) -> Float[Tensor, "T H E"]:
    """Attention of a document's newest T tokens to all of its S tokens so far.

    Args:
        q: Queries of the newest tokens.
        k: Keys of all, those of the newest last.
        v: Values of all.

    Returns:
        Attention's output for the newest tokens.
    """
    new, total = q.shape[0], k.shape[0]
    mask = None
    if 1 < new < total:  # the kernel's own causal mask would count from the first key, not from the last
        mask = torch.ones(new, total, dtype=torch.bool, device=q.device).tril(total - new)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    causal = new > 1 and mask is None
    output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)
    return output[0].transpose(0, 1)
