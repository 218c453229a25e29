"""What a configuration accepts, refuses and implies."""

from dataclasses import FrozenInstanceError, replace

import pytest
import torch

import model
from model import Transformer
from model.config import parameter_shapes
from models import NEMO, TINY


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 0}, r"model\.dim: found 0, expected at least 1"),
        ({"n_layers": -1}, r"model\.n_layers: found -1, expected at least 1"),
        ({"head_dim": 33}, r"model\.head_dim: found 33, expected an even number"),
        ({"n_kv_heads": 3}, r"model\.n_kv_heads: found 3, expected a divisor of n_heads = 4"),
        ({"norm_eps": 0.0}, r"model\.norm_eps: found 0.0, expected a positive finite number"),
        ({"rope_theta": float("nan")}, r"model\.rope_theta: found nan, expected a positive finite number"),
    ],
)
def test_a_field_out_of_range_is_named_with_what_was_expected(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


def test_configuration_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        TINY.dim = 1


def test_shapes_are_those_of_the_built_network_in_no_other_number():
    with torch.device("meta"):
        built = {name: tuple(p.shape) for name, p in Transformer(TINY).named_parameters()}
    assert parameter_shapes(TINY) == built


def test_nemos_projections_have_its_published_shapes():
    shapes = parameter_shapes(NEMO)
    assert shapes["layers.0.attention.wq.weight"] == (4096, 5120)
    assert shapes["layers.39.attention.wk.weight"] == (1024, 5120)
    assert shapes["layers.0.attention.wo.weight"] == (5120, 4096)
    assert shapes["layers.0.feed_forward.w2.weight"] == (5120, 14336)
    assert shapes["output.weight"] == (131072, 5120)


def test_the_package_offers_its_three_names():
    assert sorted(model.__all__) == ["Loss", "Transformer", "TransformerConfig"]
