"""Kernels that need a GPU, against what runs everywhere."""

import inspect

import pytest
import torch
from torch.nn.functional import cross_entropy

import model.loss
from magnum_train import kernels
from model.attention import FUSED, KeyValueCache, attention, choose_backend
from model.generate import generate, generate_batch
from model.loss import linear_cross_entropy
from models import TINY, assert_all_close, assert_close, gradients, tiny_model, tiny_pack, without_labels

pytestmark = pytest.mark.gpu

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128  # Nemo's
RAGGED = [700, 1, 513, 64, 1, 257, 0, 0]
# Output and gradients are rounded to bfloat16, and so are the probabilities inside the kernel (2^-9 each);
# gradients of keys and values add up four query heads of them.
BF16_VALUE, BF16_GRADIENT = 1e-2, 2e-2


def lack(name):
    """Why a kernel does not run on this GPU; empty where it does, and where there is no GPU at all."""
    try:
        choose_backend(name, "cuda", torch.bfloat16)
    except ValueError as error:
        return str(error) if torch.cuda.is_available() else ""
    return ""


FUSED_KERNELS = [pytest.param(name, marks=pytest.mark.skipif(bool(lack(name)), reason=lack(name))) for name in FUSED]


@pytest.fixture
def deterministic(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def on_gpu(pack):
    """The same pack on the device."""
    return {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in pack.items()}


def bounds(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).cuda()


def random_qkv(dtype):
    """Queries, keys, values and an upstream gradient for the ragged documents, rounded to bfloat16 first."""
    generator = torch.Generator().manual_seed(0)
    draws = [
        torch.randn(sum(RAGGED), heads, HEAD_DIM, generator=generator).cuda().bfloat16().to(dtype)
        for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    ]
    return [x.requires_grad_() for x in draws[:3]], draws[3]


def packed(backend, dtype):
    """Attention's output for the whole pack, and the gradients of its inputs."""
    inputs, upstream = random_qkv(dtype)
    out = attention(*inputs, bounds(RAGGED), max(RAGGED), backend)
    return out, *torch.autograd.grad(out, inputs, upstream)


def alone(backend, dtype):
    """The same, one call a document."""
    inputs, upstream = random_qkv(dtype)
    lengths = [length for length in RAGGED if length]
    parts = zip(lengths, *(x.split(lengths) for x in inputs), strict=True)
    out = torch.cat([attention(q, k, v, bounds([n]), n, backend) for n, q, k, v in parts])
    return out, *torch.autograd.grad(out, inputs, upstream)


def check(found, expected):
    tolerances = (BF16_VALUE, BF16_GRADIENT, BF16_GRADIENT, BF16_GRADIENT)
    for name, actual, tensor, tolerance in zip("oqkv", found, expected, tolerances, strict=True):
        assert actual.dtype == torch.bfloat16
        assert_close(actual, tensor, tolerance, name)


@pytest.mark.parametrize("backend", FUSED_KERNELS)
def test_fused_kernels_equal_sdpa_in_value_and_gradients(backend):
    check(packed(backend, torch.bfloat16), packed("sdpa", torch.float32))


@pytest.mark.parametrize("backend", ["sdpa", *FUSED_KERNELS])
def test_packed_equals_alone_in_value_and_gradients_on_every_kernel(backend):
    by_itself = "sdpa" if backend == "cudnn" else backend  # cuDNN takes no pack of one token
    check(packed(backend, torch.bfloat16), alone(by_itself, torch.bfloat16))


@pytest.mark.parametrize("backend", FUSED_KERNELS)
def test_kernels_called_in_turns_stay_what_they_are(backend):
    """FlashAttention 3 and 4 take the place of torch's own in the whole process."""
    before = packed("varlen", torch.bfloat16)
    packed(backend, torch.bfloat16)
    assert all(map(torch.equal, before[:1], packed("varlen", torch.bfloat16)[:1]))  # a backward's bits may vary
    check(packed(backend, torch.bfloat16), packed("sdpa", torch.float32))


@pytest.mark.parametrize("backend", FUSED_KERNELS)
def test_fused_kernels_are_one_node_to_a_compiler(backend):
    plain, (inputs, upstream) = inspect.unwrap(attention), random_qkv(torch.bfloat16)

    def block(q, k, v):
        return plain(q, k, v, bounds(RAGGED), max(RAGGED), backend)

    out = torch.compile(block, fullgraph=True)(*inputs)
    check((out, *torch.autograd.grad(out, inputs, upstream)), packed("sdpa", torch.float32))


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("backend", ["sdpa", *FUSED_KERNELS])
def test_two_backwards_give_the_same_bits_where_that_is_asked_for(backend):
    if backend == "cudnn":
        with pytest.raises(ValueError, match=r"found 'cudnn' with train\.deterministic=true"):
            packed(backend, torch.bfloat16)
        return
    first = packed(backend, torch.bfloat16)
    for _ in range(5):
        assert all(map(torch.equal, first, packed(backend, torch.bfloat16)))


def test_every_kernel_that_is_present_is_judged_and_one_is_the_fastest():
    names, _ = kernels.candidates("auto", None, "cuda", torch.bfloat16)
    task = kernels.Task(
        HEADS, KV_HEADS, HEAD_DIM, kernels.bounds([3000, 1500, 700, 700, 64], 8192, 130), torch.bfloat16,
        torch.device("cuda"),
    )  # fmt: skip
    verdicts = kernels.judge({name: kernels.kernel_of(name) for name in names}, task)
    print(kernels.told(verdicts, {}, task, kernels.fastest(verdicts)))
    right = {verdict.backend for verdict in verdicts if not verdict.wrong}
    assert "varlen" in right
    assert all(verdict.ms > 0 for verdict in verdicts if not verdict.wrong)


def test_auto_takes_torchs_own_kernel_for_bfloat16():
    assert choose_backend("auto", "cuda", torch.bfloat16) == "varlen"


@pytest.mark.parametrize("rows", ["triton", "torch"])
@pytest.mark.parametrize("groups", ["one group", "several groups"])
@pytest.mark.parametrize(("dtype", "gradient"), [(torch.bfloat16, 2**-7), (torch.float32, 1e-5)], ids=str)
def test_loss_equals_float64_in_value_and_gradients(monkeypatch, dtype, gradient, groups, rows):
    """In bfloat16 logits and sums are float32; softmax minus one-hot is rounded once before its product."""
    tokens, dim, vocabulary = 1000, 256, 4099
    monkeypatch.setattr(model.loss, "LOGITS_ON_GPU", 128 * vocabulary)
    if groups == "several groups":
        monkeypatch.setattr(model.loss, "GRADIENTS_ON_GPU", 256 * vocabulary)
    if rows == "torch":
        monkeypatch.setattr(model.loss, "_HAS_TRITON", False)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, dim, generator=generator).cuda().to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, dim, generator=generator).mul(0.1).cuda().to(dtype).requires_grad_()
    labels = torch.randint(vocabulary, (tokens,), generator=generator).cuda()
    weights = torch.rand(tokens, generator=generator).sub(1 / 3).clamp_min(0).cuda()
    loss = linear_cross_entropy(hidden, weight, labels, weights)
    (loss.total / 3).backward()
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = (cross_entropy(wide[0] @ wide[1].t(), labels, reduction="none") * weights).sum()
    (expected / 3).backward()
    assert loss.total.dtype == torch.float32
    assert_close(loss.total, expected, 1e-5)
    assert_close(hidden.grad, wide[0].grad, gradient, "hidden")
    assert_close(weight.grad, wide[1].grad, gradient, "weight")


@pytest.mark.parametrize("columns", [1, 515, 8007, 131072])
@pytest.mark.parametrize("spread", [1.0, 1e4, 3e37])
def test_rows_by_triton_equal_float64_at_any_vocabulary_and_any_logits(columns, spread):
    from model.loss_triton import losses

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(300, columns, generator=generator).mul(spread).cuda()
    labels = torch.randint(columns, (300,), generator=generator).cuda()
    weights = torch.rand(300, generator=generator).sub(1 / 3).clamp_min(0).cuda()
    wide = logits.double()
    expected = wide.logsumexp(1) - wide.gather(1, labels[:, None])[:, 0]
    gradient = wide.softmax(1)
    gradient[torch.arange(300, device="cuda"), labels] -= 1
    gradient *= weights[:, None].double()
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2**-8)):
        wider = torch.full((300, columns + 3), 7.0, dtype=dtype, device="cuda")
        found = losses(logits, labels, weights, wider[:, :columns])
        assert torch.equal(found, losses(logits, labels, weights, wider[:, :columns]))
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)
        assert (wider[:, :columns].double() - gradient).abs().max() <= tolerance
        assert wider[:, columns:].eq(7).all()
        assert wider[weights == 0, :columns].eq(0).all()


@pytest.mark.usefixtures("deterministic")
def test_loss_and_its_gradients_have_the_same_bits_every_time():
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(3000, 512, generator=generator, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(8007, 512, generator=generator, device="cuda", dtype=torch.bfloat16).requires_grad_()
    labels = torch.randint(8007, (3000,), generator=generator, device="cuda")
    outcomes = []
    for _ in range(3):
        loss = linear_cross_entropy(hidden, weight, labels, torch.ones(3000, device="cuda"))
        outcomes.append((loss.total, loss.tokens, *torch.autograd.grad(loss.total, (hidden, weight))))
    assert all(all(map(torch.equal, outcomes[0], other)) for other in outcomes[1:])


def test_tiny_network_in_float32_equals_the_cpu():
    pack = tiny_pack([40, 1, 23, 0])
    cpu, gpu = tiny_model(), tiny_model().cuda()
    expected, loss = cpu(**pack), gpu(**on_gpu(pack))
    expected.total.backward()
    loss.total.backward()
    assert_close(loss.total.cpu(), expected.total, 1e-5)
    found = {name: gradient.cpu() for name, gradient in gradients(gpu).items()}
    assert_all_close(found, gradients(cpu), 1e-4)  # other kernels, other orders of summation


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 4e-2)], ids=str)
def test_logits_with_a_cache_equal_those_without(dtype, tolerance):
    """Prompts in one pack, several tokens on top of them, then one at a time: all ways through the cache."""
    steps = [(40, 1, 23), (3, 5, 1), (1, 1, 1), (1, 1, 1)]
    totals = [sum(counts) for counts in zip(*steps, strict=True)]
    pack = without_labels(tiny_pack(totals))
    documents, network = pack["tokens"].split(totals), tiny_model(dtype).cuda()
    cache, parts = KeyValueCache(TINY.n_layers, len(totals)), [[] for _ in totals]
    with torch.no_grad():
        expected = network(**on_gpu(pack))
        for counts in steps:
            spans = [slice(begin, begin + n) for begin, n in zip(cache.lengths, counts, strict=True)]
            logits = network(
                torch.cat([tokens[span] for tokens, span in zip(documents, spans, strict=True)]).cuda(),
                torch.cat([torch.arange(span.start, span.stop) for span in spans]).cuda(),
                torch.tensor([0, *counts]).cumsum(0).to(torch.int32).cuda(),
                max(counts),
                cache=cache,
            )
            for found, part in zip(parts, logits.split(counts), strict=True):
                found.append(part)
    assert_close(torch.cat([part for found in parts for part in found]), expected, tolerance)


def test_a_greedy_reply_in_float32_equals_the_cpus_alone_and_in_a_batch():
    tokens = tiny_pack([30])["tokens"].tolist()
    prompts = [tokens[:n] for n in (1, 30, 7)]
    cpu, gpu = tiny_model(), tiny_model().cuda()
    expected = [list(generate(cpu, prompt, max_new_tokens=48)) for prompt in prompts]
    assert [list(generate(gpu, prompt, max_new_tokens=48)) for prompt in prompts] == expected
    assert generate_batch(gpu, prompts, max_new_tokens=48) == expected


def test_forward_and_backward_never_wait_for_the_device():
    """With label positions from the host nothing in a training step asks the device for a number."""
    pack = tiny_pack([40, 1, 23, 0], torch.float32)
    positions = pack["weights"].nonzero().squeeze(-1).cuda()
    network, batch = tiny_model(torch.bfloat16).cuda(), on_gpu(pack)
    network(**batch, label_positions=positions).total.backward()  # libraries start up
    torch.cuda.set_sync_debug_mode("error")
    try:
        network(**batch, label_positions=positions).total.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
