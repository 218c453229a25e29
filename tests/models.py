"""Tiny networks and packs that model tests share, and one way of comparing tensors."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from model import Transformer, TransformerConfig

# Nemo's peculiarities in small: n_heads × head_dim ≠ dim, two query heads to a key-value head; and an odd
# vocabulary.
TINY = TransformerConfig(dim=80, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=32, hidden_dim=96, vocab_size=515)
NEMO = TransformerConfig(
    dim=5120, n_layers=40, n_heads=32, n_kv_heads=8, head_dim=128, hidden_dim=14336, vocab_size=131072
)


def tiny_model(dtype: torch.dtype = torch.float32, seed: int = 0, backend: str = "auto") -> Transformer:
    """A network whose every weight matters: matrices wide enough for sharp attention, norms away from 1."""
    model = Transformer(TINY, backend)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(std=0.1, generator=generator)
    return model.to(dtype)


def tiny_pack(lengths: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Any]:
    """Random documents as `Transformer.forward` takes them; a length of 0 is an empty document.

    About a third of the weights are 0, the rest fractions; a document's last position predicts nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    weights = torch.rand(total, dtype=torch.float64, generator=generator).sub(1 / 3).clamp_min(0)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    weights[ends[ends > 0] - 1] = 0
    return {
        "tokens": torch.randint(TINY.vocab_size, (total,), generator=generator),
        "positions": torch.cat([torch.arange(length) for length in lengths]),
        "cu_seqlens": ends.to(torch.int32),
        "max_seqlen": max(lengths),
        "labels": torch.randint(TINY.vocab_size, (total,), generator=generator),
        "weights": weights.to(dtype),
    }


def without_labels(pack: Mapping[str, Any]) -> dict[str, Any]:
    """The same pack, asking for logits."""
    return {name: value for name, value in pack.items() if name not in ("labels", "weights")}


def gradients(model: Transformer) -> dict[str, Tensor]:
    """Every parameter's gradient, taken out of the model; a missing one is an error."""
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} received no gradient"
        found[name] = parameter.grad
        parameter.grad = None
    return found


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, name: str = "tensor") -> None:
    """Equal shapes, and no difference above `tolerance` × the largest expected magnitude."""
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)} for {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    scale = expected.abs().max().double()
    error = (actual.double() - expected.double()).abs().max()
    assert error <= tolerance * scale, f"{name}: off by {error:.3e}, {error / scale:.3e} of its largest magnitude"


def assert_all_close(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float) -> None:
    """`assert_close` by name, over the same names."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_close(actual[name], tensor, tolerance, name)
