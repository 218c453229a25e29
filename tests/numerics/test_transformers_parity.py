"""The oracle for the whole network is transformers' MistralForCausalLM with the same random weights."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from twins import OURS, transformers_twin

from models import TINY, assert_all_close, assert_close, gradients, tiny_model, tiny_pack, without_labels

TOLERANCE = 1e-5  # float32, some 100 roundings deep


@pytest.fixture(scope="module")
def ours():
    return tiny_model()


@pytest.fixture(scope="module")
def theirs(ours):
    return transformers_twin(ours)


def test_configuration_keeps_nemos_peculiarity():
    assert TINY.n_heads * TINY.head_dim != TINY.dim
    assert TINY.n_heads > TINY.n_kv_heads


def test_logits_equal_transformers(ours, theirs):
    pack = without_labels(tiny_pack([37]))
    expected = theirs(pack["tokens"][None]).logits[0]
    assert_close(ours(**pack), expected, TOLERANCE)


def test_logits_at_late_positions_equal_transformers(ours, theirs):
    pack = without_labels(tiny_pack([37]))
    pack["positions"] = pack["positions"] + 100_000
    expected = theirs(pack["tokens"][None], position_ids=pack["positions"][None]).logits[0]
    assert_close(ours(**pack), expected, TOLERANCE)


def test_packed_logits_equal_transformers_document_by_document(ours, theirs):
    pack = without_labels(tiny_pack([9, 1, 14, 0, 0]))
    expected = torch.cat([theirs(part[None]).logits[0] for part in pack["tokens"].split([9, 1, 14])])
    assert_close(ours(**pack), expected, TOLERANCE)


def test_mean_loss_and_every_gradient_equal_transformers_own_loss(ours, theirs):
    """Their loss shifts the labels itself and takes the mean; ours sums over shifted labels."""
    pack = tiny_pack([37])
    tokens = pack["tokens"]
    pack["labels"] = tokens.roll(-1)
    pack["weights"] = torch.ones(37)
    pack["weights"][-1] = 0
    loss = ours(**pack).total / 36
    loss.backward()
    theirs.zero_grad()
    expected = theirs(tokens[None], labels=tokens[None]).loss
    expected.backward()
    assert_close(loss, expected, TOLERANCE)
    theirs_by_name = {OURS[name]: parameter.grad for name, parameter in theirs.named_parameters()}
    assert_all_close(gradients(ours), theirs_by_name, TOLERANCE)


def test_weighted_loss_and_every_gradient_equal_transformers(ours, theirs):
    pack = tiny_pack([37])
    loss = ours(**pack).total
    loss.backward()
    theirs.zero_grad()
    each = cross_entropy(theirs(pack["tokens"][None]).logits[0], pack["labels"], reduction="none")
    expected = (each * pack["weights"]).sum()
    expected.backward()
    assert_close(loss, expected, TOLERANCE)
    theirs_by_name = {OURS[name]: parameter.grad for name, parameter in theirs.named_parameters()}
    assert_all_close(gradients(ours), theirs_by_name, TOLERANCE)
