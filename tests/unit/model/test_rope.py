"""Rotation against its formula."""

import math

import pytest
import torch

from model.rope import rotary_tables, rotate
from models import assert_close

THETA = 1e6


def by_formula(x, positions):
    """Each pair (i, i + E/2) turned by position × θ^(-2i/E), one number at a time in float64."""
    out = torch.empty(x.shape, dtype=torch.float64)
    half = x.shape[-1] // 2
    for t, position in enumerate(positions.tolist()):
        for i in range(half):
            angle = position * THETA ** (-2 * i / x.shape[-1])
            first, second = x[t, :, i].double(), x[t, :, i + half].double()
            out[t, :, i] = first * math.cos(angle) - second * math.sin(angle)
            out[t, :, i + half] = second * math.cos(angle) + first * math.sin(angle)
    return out


# An angle of 100 rad is rounded by 4e-6 in float32; bfloat16 rounds the result alone, tables being float32.
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2**-8)],
    ids=str,
)
def test_rotation_equals_its_formula(dtype, tolerance):
    positions = torch.tensor([0, 1, 2, 7, 100])
    x = torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    tables = rotary_tables(positions, 16, THETA, torch.promote_types(dtype, torch.float32))
    rotated = rotate(x, *tables)
    assert rotated.dtype == dtype
    assert_close(rotated, by_formula(x, positions), tolerance)


def test_position_0_changes_nothing():
    x = torch.randn(1, 2, 8)
    assert torch.equal(rotate(x, *rotary_tables(torch.tensor([0]), 8, THETA, torch.float32)), x)


def test_scores_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 16, dtype=torch.float64)

    def score(i, j):
        tables = (rotary_tables(torch.tensor([p]), 16, THETA, torch.float64) for p in (i, j))
        q_i, k_j = (rotate(x, *table) for x, table in zip((q, k), tables, strict=True))
        return (q_i * k_j).sum()

    assert_close(score(1009, 1002), score(7, 0), 1e-10)
