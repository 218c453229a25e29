"""Causal grouped-query attention within each document of a pack: one signature, several kernels.

Owns the choice of kernel, the adapters and the key-value cache of inference. Knows nothing of projections or
rotations.

Letters: T tokens in a pack, H query heads, K key-value heads, E head_dim, N documents; a tensor of `bounds`
has N + 1 entries. With a cache: B sequences, S tokens of the longest, n new ones of each.
"""

import importlib.util
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int32, Int64
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
