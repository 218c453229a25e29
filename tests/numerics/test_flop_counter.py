"""Operations as counted by torch itself, part by part."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import Transformer
from model.attention import _sdpa as one_by_one
from model.flops import block_matmul_parameters, parameter_count, train_flops
from models import NEMO, TINY, tiny_model, tiny_pack

LENGTHS = [9, 1, 30, 0]


def counted():
    """What torch counts in one forward and backward, and labelled tokens."""
    pack, model = tiny_pack(LENGTHS), tiny_model()
    with FlopCounterMode(display=False) as counter:
        model(**pack).total.backward()
    return counter.get_total_flops(), int(pack["weights"].count_nonzero())


def counted_in_attention():
    """What torch counts in one layer's attention, forward and backward, made of plain products by document."""
    total = sum(LENGTHS)
    q, k, v = (
        torch.randn(total, heads, TINY.head_dim, requires_grad=True)
        for heads in (TINY.n_heads, TINY.n_kv_heads, TINY.n_kv_heads)
    )
    with sdpa_kernel([SDPBackend.MATH]), FlopCounterMode(display=False) as counter:
        one_by_one(q, k, v, tuple(LENGTHS)).sum().backward()
    return counter.get_total_flops()


def attention_flops():
    """Attention's part of our count."""
    return train_flops(TINY, LENGTHS, 0) - 6 * block_matmul_parameters(TINY) * sum(LENGTHS)


def test_matrix_products_equal_torchs_count_exactly():
    """Attention on a CPU is an operator of our own, which torch does not count, so all that it counts is the rest."""
    operations, label_tokens = counted()
    assert train_flops(TINY, LENGTHS, label_tokens) - attention_flops() == operations


def test_attention_is_half_of_torchs_count_exactly():
    """By plain products torch counts the whole square of each document; causal attention needs half of it."""
    assert 2 * attention_flops() == TINY.n_layers * counted_in_attention()


def test_documents_cost_by_their_own_squares():
    whole, split = train_flops(TINY, [40], 0), train_flops(TINY, [10, 10, 10, 10], 0)
    assert whole - split == 6 * TINY.n_layers * TINY.n_heads * TINY.head_dim * (40**2 - 4 * 10**2)


def test_nemo_has_its_published_parameters():
    assert parameter_count(NEMO) == 12_247_782_400
    with torch.device("meta"):
        parameters = list(Transformer(NEMO).parameters())
    assert len(parameters) == 363
    assert sum(parameter.numel() for parameter in parameters) == 12_247_782_400


def test_nemo_costs_about_70_gigaflops_a_token():
    """6 × 11.58e9 matrix weights, and 1.4 % of attention at documents of 1,024 tokens."""
    assert train_flops(NEMO, [1024] * 8, 8192) / 8192 == pytest.approx(70.5e9, rel=2e-3)
