"""Products in 8 bits are those of rounded factors, nothing else changes, and what cannot be is refused."""

import importlib.util
import sys
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from magnum_train import distributed
from magnum_train.config import ParallelConfig
from magnum_train.errors import ConfigError
from magnum_train.fp8 import check, convert, mfu_name, told
from magnum_train.parallelize import build
from magnum_train.recompute import with_recomputation
from model import Transformer
from models import NEMO, TINY, gradients, tiny_model, tiny_pack
from ranks import run_ranks

needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="the package torchao is not installed"
)
GPU = torch.device("cuda", 0)
PACK = tiny_pack([11, 1, 20])
FLOAT8_MAX = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


def rounded(tensor: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    """A matrix in 8 bits under one scale, as float32."""
    scale = FLOAT8_MAX[dtype] / tensor.abs().max()
    return (tensor * scale).to(dtype).float() / scale


def converted(recipe: str) -> Transformer:
    model = tiny_model()
    convert(model, recipe, emulated=True)
    return model


def stepped(model: Transformer) -> tuple[Tensor, dict[str, Tensor]]:
    loss = model(**PACK)
    loss.total.backward()
    return loss.total.detach(), gradients(model)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += operator is torch.ops.aten.mm.default
        return operator(*args, **(kwargs or {}))


def products_of_a_backward(model: Transformer) -> int:
    loss = model(**PACK)
    with Products() as products:
        loss.total.backward()
    return products.count


def with_mode(model: Transformer, mode: str) -> Transformer:
    for name, block in list(model.layers.named_children()):
        model.layers.register_module(name, with_recomputation(block, mode))
    return model


@needs_torchao
def test_a_tensorwise_product_is_that_of_the_rounded_factors_forward_and_backward() -> None:
    model = converted("tensorwise")
    linear = model.layers[0].feed_forward.w1
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(32, TINY.dim, generator=generator, requires_grad=True)
    upstream = torch.randn(32, TINY.hidden_dim, generator=generator)
    out = linear(x)
    out.backward(upstream)
    weight = linear.weight.detach()
    # Gradients have two bits of mantissa and five of exponent.
    low = rounded(upstream, torch.float8_e5m2)
    torch.testing.assert_close(out, rounded(x.detach()) @ rounded(weight).t(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, low @ rounded(weight), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(linear.weight.grad, low.t() @ rounded(x.detach()), rtol=1e-5, atol=1e-5)


@needs_torchao
def test_rowwise_keeps_what_lies_beside_an_outlier() -> None:
    """A row's scale is its own; with one for the matrix, small rows fall below the smallest number of 8 bits."""
    errors = {}
    for recipe in ("tensorwise", "rowwise"):
        linear = converted(recipe).layers[0].feed_forward.w1
        x = torch.randn(32, TINY.dim, generator=torch.Generator().manual_seed(3))
        x[0] *= 1e6
        with torch.no_grad():
            exact, found = (x @ linear.weight.t())[1:], linear(x)[1:]
        errors[recipe] = float((found - exact).norm() / exact.norm())
    assert errors["rowwise"] < 0.05 < 0.5 < errors["tensorwise"]


@needs_torchao
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_all_matrices_of_blocks_and_no_others_are_converted(recipe: str) -> None:
    plain, model = tiny_model(), converted(recipe)
    kinds = {name: type(part) for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    assert kinds.keys() == {name for name, part in plain.named_modules() if isinstance(part, nn.Linear)}
    assert nn.Linear not in kinds.values()
    assert all(name.startswith("layers.") for name in kinds)
    for (name, parameter), (other, same) in zip(plain.named_parameters(), model.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(parameter, same)


@needs_torchao
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_recomputation_changes_no_bit(recipe: str) -> None:
    """And one product a block is made again: torchao's stands before the last point that recomputation must reach."""
    loss, expected = stepped(converted(recipe))
    products = {"none": products_of_a_backward(converted(recipe))}
    for mode in ("lean", "mlp"):
        model = with_mode(converted(recipe), mode)
        products[mode] = products_of_a_backward(model)
        gradients(model)
        found, grads = stepped(model)
        assert torch.equal(found, loss), mode
        for name, grad in grads.items():
            assert torch.equal(grad, expected[name.replace("_checkpoint_wrapped_module.", "")]), f"{mode}: {name}"
    again = {mode: count - products["none"] for mode, count in products.items()}
    assert again == {"none": 0, "lean": TINY.n_layers, "mlp": 3 * TINY.n_layers}


def compiled(mode: str) -> dict[str, list[int]]:
    """Steps of compiled blocks; matrix products in each graph. Beside them the same steps without a compiler."""
    products: dict[str, list[int]] = {"forward": [], "backward": []}

    def counted(which: str) -> Any:
        def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
            nodes = [node for node in graph.graph.nodes if node.target is torch.ops.aten.mm.default]
            products[which].append(len(nodes))
            return make_boxed_func(graph.forward)

        return compiler

    backend = aot_autograd(
        fw_compiler=counted("forward"), bw_compiler=counted("backward"),
        partition_fn=min_cut_rematerialization_partition,
    )  # fmt: skip
    model = converted("tensorwise")
    for name, block in list(model.layers.named_children()):
        block = with_recomputation(block, mode)
        block.compile(fullgraph=True, backend=backend)
        model.layers.register_module(name, block)
    found, grads = stepped(model)
    loss, expected = stepped(converted("tensorwise"))
    torch.testing.assert_close(found, loss, rtol=1e-3, atol=0)
    for name, grad in grads.items():
        whole = expected[name.replace("_checkpoint_wrapped_module.", "")]
        # A compiler sums in another order, and a scale that differs in its last bit moves numbers by one of 8 bits.
        assert (grad - whole).norm() < 0.02 * whole.norm(), name
    return products


@needs_torchao
@pytest.mark.slow  # compiles, in a process that has first to import torchao
@pytest.mark.parametrize(("mode", "again"), [("lean", 0), ("mlp", 2)])
def test_compiled_blocks_are_one_graph_and_make_again_what_their_mode_says(mode: str, again: int) -> None:
    """In a process of its own: the checks of shapes in this one are nothing that a compiler could look past."""
    assert run_ranks(compiled, 1, mode) == [{"forward": [7], "backward": [14 + again]}]


def sharded_loss(recipe: str) -> tuple[float, set[torch.dtype]]:
    """Through `build`, on ranks of gloo; and the dtypes that parameters are kept in."""
    with distributed.start(timeout_seconds=60, replicate=1, threads=1, deterministic=False) as ranks:
        model = build(
            TINY, attention_backend="sdpa", mesh=ranks.mesh, device=ranks.device, compute_dtype=torch.float32,
            activation_checkpointing="lean", reshard_after_forward=True, seed=1, fp8=recipe,
        )  # fmt: skip
        loss = model(**PACK).total
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        return loss.item(), {parameter.dtype for parameter in model.parameters()}


@needs_torchao
def test_sharded_it_is_near_the_exact_loss_and_not_equal_to_it() -> None:
    [(exact, _), *_] = run_ranks(sharded_loss, 2, "none")
    for recipe in ("tensorwise", "rowwise"):
        found = run_ranks(sharded_loss, 2, recipe)
        assert found[0] == found[1]
        assert found[0][1] == {torch.float32}
        assert found[0][0] != exact
        assert found[0][0] == pytest.approx(exact, rel=1e-2)


def refused(recipe: str = "tensorwise", **changes: Any) -> str:
    given = {"config": NEMO, "tokens": 8192, "device": GPU, "dtype": torch.bfloat16} | changes
    with pytest.raises(ConfigError) as caught:
        check(recipe, **given)
    assert caught.value.place == "parallel.fp8"
    return str(caught.value)


def test_what_cannot_be_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "the device cpu" in refused(device=torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert "NVIDIA A100" in refused()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert "precision=bf16_mixed" in refused(dtype=torch.float32)
    assert "8200" in refused(tokens=8200)
    monkeypatch.setitem(sys.modules, "torchao", None)
    assert "'.[torchao]'" in refused()
    check("none", NEMO, 8200, torch.device("cpu"), torch.float32)
    with pytest.raises(ConfigError, match="one of none, tensorwise, rowwise"):
        ParallelConfig(fp8="float8")


def test_its_utilisation_bears_another_name() -> None:
    assert mfu_name("none") == "mfu"
    assert not told("none")
    assert mfu_name("rowwise") == "fp8_rowwise_of_bf16_peak"
    assert mfu_name("rowwise") in told("rowwise")
