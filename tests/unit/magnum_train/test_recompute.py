"""What is kept and what is computed again changes no number, and costs the products that it should."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from magnum_train.recompute import MODES, layer_modes, with_recomputation
from model import Transformer
from models import TINY, tiny_model, tiny_pack
from ranks import run_ranks

LENGTHS = [9, 1, 30, 0]


def wrapped(modes: list[str]) -> Transformer:
    model = tiny_model()
    for (name, block), mode in zip(list(model.layers.named_children()), modes, strict=True):
        model.layers.register_module(name, with_recomputation(block, mode))
    return model


def trained(modes: list[str]) -> tuple[Tensor, list[Tensor], int]:
    """Loss, gradients and the operations of products in the backward."""
    model = wrapped(modes)
    loss = model(**tiny_pack(LENGTHS)).total
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    return loss.detach(), [p.grad for p in model.parameters() if p.grad is not None], counter.get_total_flops()


@pytest.mark.parametrize("modes", [["lean"] * 3, ["mlp"] * 3, ["full"] * 3, ["full", "mlp", "none"]])
def test_no_mode_changes_a_bit(modes: list[str]) -> None:
    loss, gradients, _ = trained(["none"] * 3)
    again, same, _ = trained(modes)
    assert torch.equal(loss, again)
    assert len(gradients) == len(same)
    assert all(torch.equal(a, b) for a, b in zip(gradients, same, strict=True))


def test_each_mode_computes_again_what_it_says() -> None:
    tokens, wide = sum(LENGTHS), TINY.hidden_dim * TINY.dim
    heads = TINY.dim * TINY.head_dim * 2 * (TINY.n_heads + TINY.n_kv_heads)  # wq, wo and wk, wv
    once = trained(["none"] * 3)[2]
    extra = {mode: (trained([mode] * 3)[2] - once) / (3 * 2 * tokens) for mode in MODES}
    assert extra == {"none": 0, "lean": 0, "mlp": 2 * wide, "full": heads + 2 * wide}  # never w2


def test_layers_may_differ() -> None:
    assert layer_modes("lean", 3) == ["lean"] * 3
    assert layer_modes("mlp:2,lean", 3) == ["mlp", "mlp", "lean"]
    assert layer_modes("full:1,mlp:1,none", 4) == ["full", "mlp", "none", "none"]
    assert layer_modes("mlp:3,lean", 3) == ["mlp"] * 3
    for text in ("", "some", "mlp:2", "mlp:x,lean", "lean,mlp:2", "mlp:-1,lean", "none:2,", "mlp:99999999,lean"):
        with pytest.raises(ValueError, match=r"activation_checkpointing: found .*, expected one of none, lean"):
            layer_modes(text, 3)
    with pytest.raises(ValueError, match="names 4 layers, expected at most 3"):
        layer_modes("mlp:4,lean", 3)


def graphs() -> tuple[int, list[bool]]:
    """How often blocks are compiled, over packs of one shape with other documents; whether losses are as without."""
    model = wrapped(["lean", "lean", "lean"])
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        compiled.append(len(inputs))
        return graph

    for layer in model.layers:
        layer.compile(fullgraph=True, backend=backend)
    same = []
    for lengths in ([9, 1, 30, 0], [40, 0, 0, 0], [13, 13, 7, 7], [1, 1, 1, 37]):
        pack = tiny_pack(lengths) | {"max_seqlen": 40}
        loss = model(**pack).total
        same.append(torch.equal(loss, wrapped(["none"] * 3)(**pack).total))
        loss.backward()
    return len(compiled), same


def test_blocks_are_compiled_once_for_all_layers_and_all_packs() -> None:
    [(count, same)] = run_ranks(graphs, 1)  # shapes are not checked there: not to compile that
    assert count == 1
    assert same == [True] * 4
