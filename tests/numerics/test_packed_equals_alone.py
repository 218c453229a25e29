"""A document in a pack has the loss and the gradients that it has alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import assert_all_close, assert_close, gradients, tiny_model, tiny_pack

# float64 stays float64 all through, norms and rotations included; float32 adds up in another order.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}


def alone(pack, lengths):
    """The same documents, one pack each."""
    start = 0
    for length in (n for n in lengths if n):
        part = slice(start, start + length)
        names = ("tokens", "positions", "labels", "weights")
        bounds = torch.tensor([0, length], dtype=torch.int32)
        yield {name: pack[name][part] for name in names} | {"cu_seqlens": bounds, "max_seqlen": length}
        start += length


def check(lengths, dtype, seed):
    model = tiny_model(dtype, seed=seed)
    pack = tiny_pack(lengths, dtype, seed=seed)
    packed = model(**pack)
    packed.total.backward()
    packed_gradients = gradients(model)
    parts = [model(**part) for part in alone(pack, lengths)]
    total = torch.stack([part.total for part in parts]).sum()
    total.backward()
    tolerance = TOLERANCES[dtype]
    assert packed.total.dtype == dtype
    assert_close(packed.total, total, tolerance, "loss")
    assert_close(packed.tokens, torch.cat([part.tokens for part in parts]), tolerance, "token losses")
    assert_all_close(packed_gradients, gradients(model), tolerance)


documents = st.lists(st.integers(1, 24), min_size=1, max_size=6)
empty_tail = st.integers(0, 3).map(lambda count: [0] * count)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(lengths=documents, tail=empty_tail, seed=st.integers(0, 1000))
def test_random_documents_packed_equal_alone(dtype, lengths, tail, seed):
    check(lengths + tail, dtype, seed)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    "lengths",
    [[1], [1, 1, 1], [1, 23, 1], [24, 0, 0], [0, 5, 0, 7, 1, 0]],
    ids=["one token", "only length 1", "length 1 at both ends", "empty tail", "empty between"],
)
def test_edge_cases_packed_equal_alone(dtype, lengths):
    check(lengths, dtype, seed=1)


def test_padding_documents_change_neither_loss_nor_gradient():
    model = tiny_model(torch.float64)
    pack, padded = (tiny_pack(lengths, torch.float64) for lengths in ([9, 14], [9, 14, 3, 2, 0]))
    for name in ("tokens", "labels", "weights"):
        padded[name] = torch.cat((pack[name], torch.zeros(5, dtype=pack[name].dtype)))
    losses, found = [], []
    for batch in (pack, padded):
        loss = model(**batch).total
        loss.backward()
        losses.append(loss)
        found.append(gradients(model))
    assert_close(losses[1], losses[0], 1e-10)
    assert_all_close(found[1], found[0], 1e-10)


def test_a_document_ignores_what_stands_beside_it():
    model = tiny_model(torch.float64)
    pack = tiny_pack([9, 14], torch.float64)
    first = model(**pack).tokens[:9]
    pack["tokens"][9:] = pack["tokens"][9:].flip(0)
    assert torch.equal(model(**pack).tokens[:9], first)
