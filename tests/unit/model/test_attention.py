"""The kernels' choice, and the CPU kernel against a dense mask."""

import contextlib
import inspect

import pytest
import torch
import torch.nn.attention

import model.attention
from model.attention import FUSED, KeyValueCache, attention, cached_attention, choose_backend
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
    ("device_type", "dtype", "expected"),
    [
        ("cpu", torch.bfloat16, "sdpa"),
        ("cuda", torch.float32, "sdpa"),
        ("cuda", torch.bfloat16, "varlen"),
        ("cuda", torch.float16, "varlen"),
    ],
)
def test_auto_picks_by_device_and_dtype(device_type, dtype, expected):
    assert choose_backend("auto", device_type, dtype) == expected


@pytest.fixture
def machine(monkeypatch):
    """Says what there is, on a machine that has nothing of it."""

    def there(capability, packages, cudnn):
        monkeypatch.setattr(model.attention, "_capability", lambda: capability)
        monkeypatch.setattr(model.attention, "_cudnn_version", lambda: cudnn)
        for name in ("FLASH_ATTN", "FA3", "FA4"):
            monkeypatch.setattr(model.attention, f"_HAS_{name}", name in packages)

    return there


@pytest.mark.parametrize(
    ("capability", "packages", "cudnn", "expected"),
    [
        ((9, 0), {"FLASH_ATTN", "FA3", "FA4"}, 91900, ["varlen", "varlen_fa3", "varlen_fa4", "cudnn", "flash_attn"]),
        ((10, 0), {"FLASH_ATTN", "FA3", "FA4"}, 91900, ["varlen", "varlen_fa4", "cudnn", "flash_attn"]),
        ((8, 0), {"FLASH_ATTN", "FA3", "FA4"}, 91900, ["varlen", "flash_attn"]),
        ((9, 0), set(), 91701, ["varlen"]),
    ],
    ids=["Hopper", "Blackwell", "Ampere", "bare"],
)
def test_what_runs_follows_from_the_gpu_and_the_packages(machine, capability, packages, cudnn, expected):
    machine(capability, packages, cudnn)
    found = []
    for name in FUSED:
        with contextlib.suppress(ValueError):
            found.append(choose_backend(name, "cuda", torch.bfloat16))
    assert found == expected


@pytest.mark.parametrize(
    ("name", "device_type", "dtype", "message"),
    [
        ("flash_attn", "cpu", torch.bfloat16, "found 'flash_attn' on device 'cpu', expected a CUDA device"),
        ("varlen", "cpu", torch.bfloat16, "found 'varlen' on device 'cpu', expected a CUDA device"),
        ("varlen", "cuda", torch.float32, "found 'varlen' with torch.float32, expected torch.bfloat16"),
        ("cudnn", "cuda", torch.float64, "found 'cudnn' with torch.float64"),
        ("flash_attn", "cuda", torch.bfloat16, "expected flash-attn to be installed; install"),
        ("varlen_fa3", "cuda", torch.bfloat16, "with no package flash_attn_interface, expected FlashAttention 3"),
        ("varlen_fa4", "cuda", torch.bfloat16, "with no package flash_attn.cute, expected FlashAttention 4"),
        ("cudnn", "cuda", torch.bfloat16, "with cuDNN 91701, expected cuDNN 91800"),
        ("eager", "cpu", torch.float32, "found 'eager', expected one of auto, sdpa, varlen, varlen_fa3"),
    ],
)
def test_what_cannot_run_is_refused_with_a_remedy(machine, name, device_type, dtype, message):
    machine((9, 0), set(), 91701)
    with pytest.raises(ValueError, match=f"model.attention: .*{message}"):
        choose_backend(name, device_type, dtype)


def test_a_kernel_without_a_deterministic_backward_is_refused_where_one_is_asked_for(machine):
    machine((9, 0), {"FLASH_ATTN", "FA3", "FA4"}, 91900)
    torch.use_deterministic_algorithms(True)
    try:
        assert choose_backend("varlen_fa3", "cuda", torch.bfloat16) == "varlen_fa3"
        with pytest.raises(ValueError, match=r"found 'cudnn' with train\.deterministic=true, expected"):
            choose_backend("cudnn", "cuda", torch.bfloat16)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", ["flash_attn", "varlen"])
def test_flash_kernels_on_a_cpu_are_an_error_and_no_fallback(name):
    with pytest.raises(ValueError, match=f"found '{name}' on device 'cpu'"):
        attention(*random_qkv(4), bounds([4]), 4, name)


@pytest.fixture
def gpu_operators():
    """Torch's own operators for GPUs, with the CPU's kernel behind them; what they are called with, call after call.

    So the calls go through torch's dispatcher and have to fit its schemas.
    """
    calls, nothing = [], torch.empty(0)

    def flash(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, **options):
        calls.append((max_q, max_k, causal, options["window_size_left"], options["window_size_right"]))
        out, lse = model.attention._on_cpu(q, k, v, cu_q)
        return out, lse.t().contiguous(), nothing, nothing, nothing

    def flash_backward(grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, causal, seed, unused, **options):
        calls.append((max_q, max_k, causal, options["window_size_left"], options["window_size_right"]))
        return model.attention._on_cpu_backward(grad, q, k, v, out, lse.t(), cu_q)

    def cudnn(q, k, v, bias, cu_q, cu_k, max_q, max_k, with_lse, dropout, causal, debug=False, *, scale=None):
        calls.append((max_q, max_k, causal, bias, with_lse))
        assert q.shape == k.shape == v.shape
        out, lse = model.attention._on_cpu(q, k, v, cu_q)
        return out, lse[..., None], nothing, nothing, 0, 0, nothing, nothing, nothing

    def cudnn_backward(
        grad, q, k, v, out, lse, seed, offset, bias, cu_q, cu_k, max_q, max_k, dropout, causal, *, scale=None
    ):
        calls.append((max_q, max_k, causal, bias, True))
        assert q.shape == k.shape == v.shape
        return model.attention._on_cpu_backward(grad, q, k, v, out, lse[..., 0], cu_q)

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", flash, "CPU")
    library.impl("_flash_attention_backward", flash_backward, "CPU")
    library.impl("_cudnn_attention_forward", cudnn, "CPU")
    library.impl("_cudnn_attention_backward", cudnn_backward, "CPU")
    yield calls
    library._destroy()


def call_of(backend, cu_seqlens, longest):
    """The operator behind a backend, as a function of q, k and v."""
    if backend == "cudnn":
        return lambda q, k, v: model.attention._cudnn(q, k, v, cu_seqlens)[0]
    return lambda q, k, v: model.attention._flash(q, k, v, cu_seqlens, longest, model.attention._FLASH[backend])[0]


@pytest.mark.parametrize("backend", ["varlen", "varlen_fa3", "varlen_fa4", "cudnn"])
def test_operators_for_gpus_are_called_as_torch_has_them_and_pass_gradients_on(monkeypatch, gpu_operators, backend):
    """The kernels themselves need a GPU; here stands the CPU's behind the same names, and what lies between is real."""
    lengths, active = [5, 0, 9, 1, 0], []
    monkeypatch.setattr(model.attention, "_activate", active.append)
    inputs = random_qkv(sum(lengths), torch.float32)
    upstream = torch.randn_like(inputs[0])
    out = call_of(backend, bounds(lengths), 12)(*inputs)
    expected = dense(*inputs, lengths)
    assert_close(out, expected, 1e-5)
    found, right = (torch.autograd.grad(x, inputs, upstream) for x in (out, expected))
    for name, gradient, theirs in zip("qkv", found, right, strict=True):
        assert_close(gradient, theirs, 1e-5, name)
    # One shape for all packs where a plan hangs on it.
    assert gpu_operators == [(15, 15, True, None, True) if backend == "cudnn" else (12, 12, True, -1, 0)] * 2
    # Whatever was active in between, the backward is that of the same implementation.
    assert active == {"varlen": ["FA2"] * 2, "varlen_fa3": ["FA3"] * 2, "varlen_fa4": ["FA4"] * 2}.get(backend, [])


@pytest.mark.parametrize("backend", ["varlen", "cudnn"])
def test_operators_for_gpus_are_one_node_to_a_compiler(monkeypatch, gpu_operators, backend):
    monkeypatch.setattr(model.attention, "_activate", lambda version: None)
    lengths = [5, 0, 9]
    cu_seqlens, inputs = bounds(lengths), random_qkv(14, torch.float32)
    plain = inspect.unwrap(attention)  # without the check of shapes, which no compiler sees through

    def block(q, k, v):
        return plain(q * 2, k, v, cu_seqlens, 14, backend) + 1

    found = torch.compile(block, backend="aot_eager", fullgraph=True)(*inputs)
    expected = dense(inputs[0] * 2, *inputs[1:], lengths) + 1
    assert_close(found, expected, 1e-5)
    upstream = torch.randn_like(found)
    for gradient, theirs in zip(*(torch.autograd.grad(x, inputs, upstream) for x in (found, expected)), strict=True):
        assert_close(gradient, theirs, 1e-5)


def test_one_implementation_of_flash_attention_is_active_and_changed_only_when_another_is_meant(monkeypatch):
    active, done = [None], []

    def activate(version):
        active[0] = version
        done.append(version)

    def restore():
        active[0] = None
        done.append("torch's own")

    monkeypatch.setattr(model.attention, "current_flash_attention_impl", lambda: active[0])
    monkeypatch.setattr(model.attention, "activate_flash_attention_impl", activate)
    monkeypatch.setattr(model.attention, "restore_flash_attention_impl", restore)
    for version in ("FA2", "FA3", "FA3", "FA4", "FA2", "FA2"):
        model.attention._activate(version)
    assert done == ["FA3", "FA4", "torch's own"]


def test_torch_knows_the_implementations_by_these_names():
    assert set(model.attention._FLASH.values()) - {"FA2"} <= set(torch.nn.attention.list_flash_attention_impls())


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
