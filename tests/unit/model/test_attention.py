"""The kernels' choice, and the CPU kernel against a dense mask."""

import pytest
import torch

import model.attention
from model.attention import KeyValueCache, attention, cached_attention, choose_backend
from models import assert_close

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16


def random_qkv(total, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(total, heads, HEAD_DIM, generator=generator, dtype=dtype).requires_grad_()
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]


def bounds(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def dense(q, k, v, lengths):
    """The whole square of scores, masked to earlier tokens of the same document; the second oracle."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    allowed = (document[:, None] == document[None]).tril()
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
    scores = torch.einsum("qhe,khe->hqk", q, k) / HEAD_DIM**0.5
    return torch.einsum("hqk,khe->qhe", scores.masked_fill(~allowed, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize(
    "lengths",
    [[7], [1], [5, 1, 9], [1, 1, 1], [5, 0, 3, 0, 0]],
    ids=["one", "one token", "ragged", "only length 1", "empty ones"],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_sdpa_equals_a_dense_mask_in_value_and_gradients(lengths, dtype, tolerance):
    inputs = random_qkv(sum(lengths), dtype)
    upstream = torch.randn_like(inputs[0])
    ours = attention(*inputs, bounds(lengths), max(lengths), "sdpa")
    theirs = dense(*inputs, lengths)
    assert_close(ours, theirs, tolerance)
    found, expected = (torch.autograd.grad(out, inputs, upstream) for out in (ours, theirs))
    # Together, since those of q and k are zero by the formula where every document has length 1.
    found, expected = (torch.cat([gradient.flatten() for gradient in each]) for each in (found, expected))
    assert_close(found, expected, tolerance, "gradients")


def test_lengths_from_the_host_give_the_same_bits():
    inputs = random_qkv(14)
    asked, told = (attention(*inputs, bounds([5, 9, 0]), 9, "sdpa", lengths) for lengths in (None, (5, 9, 0)))
    assert torch.equal(asked, told)


def test_auto_on_a_cpu_is_sdpa():
    inputs = random_qkv(6)
    auto, sdpa = (attention(*inputs, bounds([6]), 6, name) for name in ("auto", "sdpa"))
    assert torch.equal(auto, sdpa)


@pytest.mark.parametrize(
    ("device_type", "dtype", "varlen", "flash_attn", "expected"),
    [
        ("cpu", torch.bfloat16, True, True, "sdpa"),
        ("cuda", torch.float32, True, True, "sdpa"),
        ("cuda", torch.bfloat16, True, True, "varlen"),
        ("cuda", torch.float16, True, False, "varlen"),
        ("cuda", torch.bfloat16, False, True, "flash_attn"),
        ("cuda", torch.bfloat16, False, False, "sdpa"),
    ],
)
def test_auto_picks_by_device_and_dtype(monkeypatch, device_type, dtype, varlen, flash_attn, expected):
    monkeypatch.setattr(model.attention, "_HAS_VARLEN", varlen)
    monkeypatch.setattr(model.attention, "_HAS_FLASH_ATTN", flash_attn)
    assert choose_backend("auto", device_type, dtype) == expected


@pytest.mark.parametrize(
    ("name", "device_type", "dtype", "message"),
    [
        ("flash_attn", "cpu", torch.bfloat16, "found 'flash_attn' on device 'cpu', expected a CUDA device"),
        ("varlen", "cpu", torch.bfloat16, "found 'varlen' on device 'cpu', expected a CUDA device"),
        ("varlen", "cuda", torch.float32, "found 'varlen' with torch.float32, expected torch.bfloat16"),
        ("flash_attn", "cuda", torch.float64, "found 'flash_attn' with torch.float64"),
        ("flash_attn", "cuda", torch.bfloat16, "expected the package flash-attn to be installed; install"),
        ("varlen", "cuda", torch.bfloat16, "expected torch.nn.attention.varlen; upgrade torch"),
        ("eager", "cpu", torch.float32, "found 'eager', expected one of auto, sdpa, varlen, flash_attn"),
    ],
)
def test_what_cannot_run_is_refused_with_a_remedy(monkeypatch, name, device_type, dtype, message):
    monkeypatch.setattr(model.attention, "_HAS_VARLEN", False)
    monkeypatch.setattr(model.attention, "_HAS_FLASH_ATTN", False)
    with pytest.raises(ValueError, match=f"model.attention: .*{message}"):
        choose_backend(name, device_type, dtype)


@pytest.mark.parametrize("name", ["flash_attn", "varlen"])
def test_flash_kernels_on_a_cpu_are_an_error_and_no_fallback(name):
    with pytest.raises(ValueError, match=f"found '{name}' on device 'cpu'"):
        attention(*random_qkv(4), bounds([4]), 4, name)


@pytest.mark.parametrize("takes_groups", [True, False], ids=["torch 2.12", "torch 2.11"])
def test_varlen_is_called_causal_with_heads_as_the_version_takes_them(monkeypatch, takes_groups):
    """The kernel itself needs a GPU; here stands a recorder of either version's signature."""
    calls = []

    def kernel(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, **options):
        calls.append((k, v, options))
        return q

    monkeypatch.setattr(model.attention, "varlen_attn", kernel)
    monkeypatch.setattr(model.attention, "_VARLEN_TAKES_GROUPS", takes_groups)
    q, k, v = random_qkv(6)
    model.attention._varlen(q, k, v, bounds([6]), 6)
    ((k_seen, v_seen, options),) = calls
    if takes_groups:
        assert options == {"window_size": (-1, 0), "enable_gqa": True}
        assert k_seen is k
        assert v_seen is v
    else:
        assert options == {"window_size": (-1, 0)}
        for head in range(HEADS):
            assert torch.equal(k_seen[:, head], k[:, head // 2])
            assert torch.equal(v_seen[:, head], v[:, head // 2])


@pytest.mark.parametrize(
    "steps",
    [
        [(9,)],
        [(1,)] * 9,
        [(4,), (1,), (3,), (1,)],
        [(5, 1, 3), (1, 1, 1), (1, 1, 1)],
        [(3, 3), (1, 1)],
        [(2, 4), (3, 1), (1, 2), (1, 1)],
        [(4, 0, 0), (0, 1, 6), (1, 1, 1), (0, 2, 0)],
    ],
    ids=["at once", "one by one", "in pieces", "a batch", "of one length", "continued", "begun one after another"],
)
def test_cached_attention_equals_the_uncached(steps):
    totals = [sum(counts) for counts in zip(*steps, strict=True)]
    q, k, v = random_qkv(sum(totals))
    documents = [list(x.split(totals)) for x in (q, k, v)]
    cache, found = KeyValueCache(1, len(totals)), [[] for _ in totals]
    with torch.no_grad():
        for counts in steps:
            newest = cache.newest(sum(counts), bounds(counts), max(counts))
            begins = cache.lengths
            inputs = [
                torch.cat([document[b : b + n] for document, b, n in zip(each, begins, counts, strict=True)])
                for each in documents
            ]
            out = cached_attention(*inputs, cache.layers[0], newest, "auto")
            cache.advance(newest)
            for parts, part in zip(found, out.split(counts), strict=True):
                parts.append(part)
    assert_close(torch.cat([part for parts in found for part in parts]), dense(q, k, v, totals), 1e-12)


def test_a_cache_is_cut_by_sequence_and_never_lengthened():
    cache = KeyValueCache(1, 2)
    cache.advance(cache.newest(5, bounds([2, 3]), 3))
    cache.cut([2, 1])
    assert cache.lengths == (2, 1)
    with pytest.raises(ValueError, match=r"found lengths \[2, 2\], expected at most \[2, 1\]"):
        cache.cut([2, 2])


def test_a_cache_keeps_the_sequences_that_are_named():
    _, k, v = random_qkv(6)
    cache = KeyValueCache(1, 3)
    with torch.no_grad():
        newest = cache.newest(6, bounds([1, 2, 3]), 3)
        cache.layers[0].append(k, v, newest)
        cache.advance(newest)
        cache.keep([2, 0])
        keys, values = cache.layers[0].append(k[:2], v[:2], cache.newest(2, bounds([1, 1]), 1))
    assert cache.lengths == (3, 1)
    assert torch.equal(keys[0], torch.cat([k[3:6], k[:1]]))
    assert torch.equal(values[1, :2], torch.cat([v[:1], v[1:2]]))


def test_a_cache_grows_by_more_than_a_token_at_a_time():
    cache, rooms = KeyValueCache(1), set()
    token = torch.zeros(1, KV_HEADS, HEAD_DIM)
    for _ in range(1000):
        newest = cache.newest(1, bounds([1]), 1)
        cache.layers[0].append(token, token, newest)
        cache.advance(newest)
        rooms.add(cache.layers[0]._keys.shape[1])
    assert len(rooms) < 20
    assert max(rooms) < 1500
