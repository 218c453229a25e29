"""The oracle for replies is transformers' own generation with the same random weights, token for token."""

import pytest
import torch
from twins import transformers_twin

from model.generate import Past, generate, generate_batch
from models import tiny_model, tiny_pack

NEW = 40
PROMPTS = [tiny_pack([n], seed=n)["tokens"].tolist() for n in (11, 1, 30, 5)]


@pytest.fixture(scope="module")
def ours():
    return tiny_model()


@pytest.fixture(scope="module")
def theirs(ours):
    return transformers_twin(ours)


def their_reply(theirs, prompt, **settings):
    tokens = torch.tensor([prompt])
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return theirs.generate(tokens, attention_mask=torch.ones_like(tokens), **options, **settings)[0, len(prompt) :]


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_replies_alone_in_a_batch_and_after_a_past_equal_theirs(ours, theirs, penalty):
    expected = [their_reply(theirs, prompt, repetition_penalty=penalty).tolist() for prompt in PROMPTS]
    settings = {"max_new_tokens": NEW, "repetition_penalty": penalty}
    assert [list(generate(ours, prompt, **settings)) for prompt in PROMPTS] == expected
    assert generate_batch(ours, PROMPTS, **settings) == expected
    past = Past(ours)
    list(generate(ours, PROMPTS[2][:20], max_new_tokens=3, past=past))
    assert list(generate(ours, PROMPTS[2], **settings, past=past)) == expected[2]


def test_the_penalty_makes_a_difference(ours):
    assert list(generate(ours, PROMPTS[0], max_new_tokens=NEW)) != list(
        generate(ours, PROMPTS[0], max_new_tokens=NEW, repetition_penalty=1.3)
    )
