"""The chunked loss against plain logits in float64: values, gradients, and what must not matter."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model.loss
from model.loss import linear_cross_entropy
from models import assert_close

TOKENS, DIM, VOCABULARY = 200, 24, 131


def inputs(dtype, seed=0):
    """Hidden states whose logits spread widely, fractional weights, a third of them 0."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, DIM, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(VOCABULARY, DIM, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    weights = torch.rand(TOKENS, generator=generator).sub(1 / 3).clamp_min(0)
    return hidden.requires_grad_(), weight.requires_grad_(), labels, weights


def oracle(hidden, weight, labels, weights):
    """Loss, token losses and gradients of the same numbers in float64, all logits at once."""
    wide_hidden, wide_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    each = cross_entropy(wide_hidden @ wide_weight.t(), labels, reduction="none")
    total = (each * weights).sum()
    total.backward()
    return total.detach(), each.detach() * (weights != 0), wide_hidden.grad, wide_weight.grad


@pytest.fixture(params=["one chunk", "four chunks"])
def chunks(request, monkeypatch):
    """The same calls, with room for all positions at once and for 64 of them."""
    if request.param == "four chunks":
        monkeypatch.setattr(model.loss, "LOGITS_ON_CPU", 64 * VOCABULARY)


# Gradients in bfloat16 carry its rounding of 2^-9 at the end and nothing more, since all sums are float32.
@pytest.mark.parametrize(
    ("dtype", "value", "gradient"),
    [
        (torch.float64, 1e-12, 1e-12),
        (torch.float32, 1e-6, 1e-5),
        (torch.bfloat16, 1e-6, 2**-8),
        (torch.float16, 1e-6, 2**-11),
    ],
    ids=str,
)
@pytest.mark.usefixtures("chunks")
def test_value_and_gradients_equal_float64(dtype, value, gradient):
    arguments = inputs(dtype)
    hidden, weight, *_ = arguments
    loss = linear_cross_entropy(*arguments)
    loss.total.backward()
    total, tokens, grad_hidden, grad_weight = oracle(*arguments)
    assert loss.total.dtype == torch.promote_types(dtype, torch.float32)
    assert_close(loss.total, total, value, "total")
    assert_close(loss.tokens, tokens, value, "tokens")
    assert hidden.grad.dtype == weight.grad.dtype == dtype
    assert_close(hidden.grad, grad_hidden, gradient, "hidden")
    assert_close(weight.grad, grad_weight, gradient, "weight")


@pytest.mark.parametrize("groups", [1, 2, 4], ids=["one group", "two groups", "a group for each chunk"])
def test_gradients_gathered_over_chunks_as_on_a_gpu_equal_float64(monkeypatch, groups):
    """There they lie beside the logits, and the products take those of several chunks at once."""
    monkeypatch.setattr(model.loss, "_on_gpu", lambda hidden: True)
    monkeypatch.setattr(model.loss, "LOGITS_ON_GPU", 64 * VOCABULARY)
    monkeypatch.setattr(model.loss, "GRADIENTS_ON_GPU", 256 // groups * VOCABULARY)
    arguments = inputs(torch.float64)
    arguments[3].add_(0.1)  # so that all 200 positions are computed
    with Allocations() as recorded:
        loss = linear_cross_entropy(*arguments)
        loss.total.backward()
    total, tokens, grad_hidden, grad_weight = oracle(*arguments)
    assert_close(loss.total, total, 1e-12, "total")
    assert_close(loss.tokens, tokens, 1e-12, "tokens")
    assert_close(arguments[0].grad, grad_hidden, 1e-12, "hidden")
    assert_close(arguments[1].grad, grad_weight, 1e-12, "weight")
    assert recorded.products == 4 + 2 * groups


@pytest.mark.usefixtures("chunks")
def test_finite_differences_confirm_the_gradients():
    hidden, weight, labels, weights = inputs(torch.float64)
    weight = weight[:, :3].detach().requires_grad_()
    hidden = hidden[:70, :3].detach().requires_grad_()

    def total(hidden, weight):
        return linear_cross_entropy(hidden, weight, labels[:70], weights[:70]).total

    assert torch.autograd.gradcheck(total, (hidden, weight), fast_mode=True)


@pytest.mark.usefixtures("chunks")
def test_scaled_loss_scales_the_gradients():
    arguments = inputs(torch.float64)
    (linear_cross_entropy(*arguments).total / 7).backward()
    *_, grad_hidden, grad_weight = oracle(*arguments)
    assert_close(arguments[0].grad, grad_hidden / 7, 1e-12)
    assert_close(arguments[1].grad, grad_weight / 7, 1e-12)


def test_extreme_logits_stay_finite_and_exact():
    hidden = torch.tensor([[1e4], [-1e4], [30.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.0]], requires_grad=True)
    arguments = hidden, weight, torch.tensor([0, 0, 0]), torch.ones(3)
    loss = linear_cross_entropy(*arguments)
    loss.total.backward()
    total, tokens, grad_hidden, _ = oracle(*arguments)
    assert_close(loss.total, total, 1e-6)
    assert_close(loss.tokens, tokens, 1e-6)
    assert_close(hidden.grad, grad_hidden, 1e-6)


@pytest.mark.usefixtures("chunks")
def test_tokens_of_weight_0_influence_nothing_even_as_nan():
    hidden, weight, labels, weights = inputs(torch.float32)
    expected = linear_cross_entropy(hidden, weight, labels, weights)
    (expected_gradient,) = torch.autograd.grad(expected.total, weight)
    spoilt = torch.where(weights[:, None] == 0, torch.nan, hidden.detach()).requires_grad_()
    labels = torch.where(weights == 0, -100, labels)
    loss = linear_cross_entropy(spoilt, weight, labels, weights)
    grad_hidden, grad_weight = torch.autograd.grad(loss.total, (spoilt, weight))
    assert torch.equal(loss.total, expected.total)
    assert torch.equal(loss.tokens, expected.tokens)
    assert torch.equal(grad_weight, expected_gradient)
    assert grad_hidden[weights == 0].eq(0).all()
    assert loss.tokens[weights == 0].eq(0).all()


def test_positions_from_the_host_give_the_same_bits():
    hidden, weight, labels, weights = inputs(torch.float32)
    found, told = (
        linear_cross_entropy(hidden, weight, labels, weights, positions)
        for positions in (None, weights.nonzero().squeeze(-1))
    )
    assert torch.equal(found.total, told.total)
    assert torch.equal(found.tokens, told.tokens)


@pytest.mark.parametrize("length", [0, 1, 5])
def test_without_weights_loss_is_zero_and_both_gradients_are_zeros(length):
    hidden, weight = torch.randn(length, DIM, requires_grad=True), torch.randn(9, DIM, requires_grad=True)
    labels = torch.full((length,), -100)
    loss = linear_cross_entropy(hidden, weight, labels, torch.zeros(length))
    loss.total.backward()
    assert loss.total == 0
    assert loss.tokens.eq(0).all()
    assert hidden.grad.eq(0).all()
    assert weight.grad.eq(0).all()


@pytest.mark.parametrize("trained", [(True, False), (False, True)], ids=["hidden only", "weight only"])
def test_one_gradient_alone_equals_float64(trained):
    hidden, weight, labels, weights = inputs(torch.float64)
    hidden.requires_grad_(trained[0])
    weight.requires_grad_(trained[1])
    linear_cross_entropy(hidden, weight, labels, weights).total.backward()
    *_, grad_hidden, grad_weight = oracle(hidden, weight, labels, weights)
    for tensor, expected, wanted in ((hidden, grad_hidden, trained[0]), (weight, grad_weight, trained[1])):
        if wanted:
            assert_close(tensor.grad, expected, 1e-12)
        else:
            assert tensor.grad is None


class Allocations(TorchDispatchMode):
    """Records the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.largest = 0
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.largest = max(self.largest, leaf.numel())
        return out


def test_no_tensor_ever_holds_all_logits(monkeypatch):
    monkeypatch.setattr(model.loss, "LOGITS_ON_CPU", 64 * VOCABULARY)
    arguments = inputs(torch.float32)
    with Allocations() as recorded:
        linear_cross_entropy(*arguments).total.backward()
    assert recorded.largest == 64 * VOCABULARY
    assert recorded.largest < TOKENS * VOCABULARY / 3


@pytest.mark.parametrize("how", ["no_grad", "nothing requires grad"])
def test_no_gradient_is_computed_where_none_is_asked(how):
    hidden, weight, labels, weights = inputs(torch.float32)
    if how == "nothing requires grad":
        hidden, weight = hidden.detach(), weight.detach()
    with torch.set_grad_enabled(how != "no_grad"), Allocations() as recorded:
        loss = linear_cross_entropy(hidden, weight, labels, weights)
    assert recorded.products == 1
    assert not loss.total.requires_grad
    assert_close(loss.total, oracle(hidden, weight, labels, weights)[0], 1e-6)


def test_token_losses_carry_no_gradient():
    assert not linear_cross_entropy(*inputs(torch.float32)).tokens.requires_grad


def test_backward_twice_gives_the_same_gradient():
    arguments = inputs(torch.float32)
    loss = linear_cross_entropy(*arguments).total
    first, second = (torch.autograd.grad(loss, arguments[1], retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
