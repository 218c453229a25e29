"""The network's names, precision, initial weights and edges."""

import logging

import pytest
import torch

from model import Transformer
from model.transformer import RMSNorm, init_weights, initial_weight
from models import TINY, assert_close, gradients, tiny_model, tiny_pack, without_labels


def test_parameters_bear_mistrals_names():
    names = [name for name, _ in Transformer(TINY).named_parameters() if not name.startswith("layers.")]
    assert names == ["tok_embeddings.weight", "norm.weight", "output.weight"]
    block = {name.removeprefix("layers.0.") for name, _ in Transformer(TINY).layers[0].named_parameters()}
    assert block == {
        *(f"attention.{name}.weight" for name in ("wq", "wk", "wv", "wo")),
        *(f"feed_forward.{name}.weight" for name in ("w1", "w2", "w3")),
        "attention_norm.weight",
        "ffn_norm.weight",
    }


def test_there_are_no_buffers_to_leave_uninitialised():
    assert not list(Transformer(TINY).buffers())


def test_output_and_embedding_are_not_tied():
    model = Transformer(TINY)
    assert model.output.weight is not model.tok_embeddings.weight


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2**-8)],
    ids=str,
)
def test_norm_computes_wide_and_returns_the_dtype_it_was_given(dtype, tolerance):
    """bfloat16 is rounded once, at the end: one unit of 2^-8 and not the several of a narrow computation."""
    norm = RMSNorm(64, 1e-5).to(dtype)
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert norm(x).dtype == dtype
    assert ((norm(x).double() - expected).abs() <= tolerance * expected.abs()).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_loss_and_logits_are_at_least_float32(dtype):
    model = tiny_model(dtype)
    pack = tiny_pack([5, 3], dtype)
    wide = torch.promote_types(dtype, torch.float32)
    loss = model(**pack)
    assert loss.total.dtype == loss.tokens.dtype == wide
    assert model(**without_labels(pack)).dtype == wide


def test_bfloat16_loss_is_that_of_the_same_weights_in_float64():
    """The stream is rounded to 2^-9 some twenty times; a sum in bfloat16 would be off by percents."""
    pack = tiny_pack([40, 24])
    narrow = tiny_model(torch.bfloat16)
    expected = tiny_model(torch.bfloat16).double()(**pack).total
    assert_close(narrow(**pack).total, expected, 5e-3)


def test_logits_and_loss_tell_the_same():
    model, pack = tiny_model(torch.float64), tiny_pack([5, 3], torch.float64)
    loss = model(**pack)
    each = torch.nn.functional.cross_entropy(model(**without_labels(pack)), pack["labels"], reduction="none")
    assert_close(loss.total, (each * pack["weights"]).sum(), 1e-12)
    assert_close(loss.tokens, each * (pack["weights"] != 0), 1e-12)


def test_label_positions_choose_the_rows_of_the_logits():
    model, pack = tiny_model(), without_labels(tiny_pack([8]))
    rows = model(**pack, label_positions=torch.tensor([7, 2]))
    assert_close(rows, model(**pack)[[7, 2]], 1e-6)


@pytest.mark.parametrize("length", [1, 6])
def test_without_any_weight_every_parameter_still_receives_a_zero_gradient(length):
    model, pack = tiny_model(), tiny_pack([length])
    pack["weights"].zero_()
    model(**pack, label_positions=torch.empty(0, dtype=torch.int64)).total.backward()
    assert all(gradient.eq(0).all() for gradient in gradients(model).values())


def test_labels_without_weights_are_refused():
    pack = tiny_pack([4])
    del pack["weights"]
    with pytest.raises(ValueError, match="weights: found none"):
        tiny_model()(**pack)


def test_a_shape_that_does_not_fit_is_caught_while_tests_run():
    pack = tiny_pack([4])
    pack["positions"] = pack["positions"][:3]
    with pytest.raises(Exception, match="positions"):
        tiny_model()(**pack)


def test_the_chosen_backend_is_said_once(caplog):
    model, pack = tiny_model(), tiny_pack([4])
    with caplog.at_level(logging.INFO, logger="model.transformer"):
        model(**pack)
        model(**pack)
    assert [record.getMessage() for record in caplog.records] == [
        "attention: sdpa (asked for auto; torch.float32 on cpu)"
    ]


def test_a_backend_that_cannot_run_here_stops_the_forward():
    with pytest.raises(ValueError, match="found 'flash_attn' on device 'cpu'"):
        tiny_model(backend="flash_attn")(**tiny_pack([4]))


def test_initial_weights_depend_on_seed_and_name_alone():
    name, shape = "layers.1.attention.wq.weight", (128, 80)
    first = initial_weight(TINY, name, shape, seed=3)
    torch.manual_seed(99)
    assert torch.equal(initial_weight(TINY, name, shape, seed=3), first)
    assert not torch.equal(initial_weight(TINY, name, shape, seed=4), first)
    assert not torch.equal(initial_weight(TINY, name.replace("1", "2"), shape, seed=3), first)


def test_initial_weights_have_their_scales():
    model = Transformer(TINY)
    init_weights(model, seed=0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert parameter.eq(1).all()
            continue
        narrow = name.endswith(("wo.weight", "w2.weight"))
        std = (2 / 5 / TINY.dim) ** 0.5 / ((2 * TINY.n_layers) ** 0.5 if narrow else 1)
        assert parameter.std().item() == pytest.approx(std, rel=0.05), name
        assert abs(parameter.mean().item()) < std / 20, name


def test_a_network_built_on_meta_is_complete_after_initial_weights():
    with torch.device("meta"):
        late = Transformer(TINY)
    late.to_empty(device="cpu")
    early = Transformer(TINY)
    for model in (late, early):
        init_weights(model, seed=0)
    pack = tiny_pack([5, 3])
    assert torch.equal(late(**pack).total, early(**pack).total)
