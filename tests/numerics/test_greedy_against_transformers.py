"""The oracle for replies is transformers' own generation with the same random weights, token for token."""

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from model.config import parameter_shapes
from model.generate import Past, generate, generate_batch
from model.hf import config_to_hf, hf_name
from models import TINY, tiny_model, tiny_pack

OURS = {hf_name(name): name for name in parameter_shapes(TINY)}

NEW = 40
PROMPTS = [tiny_pack([n], seed=n)["tokens"].tolist() for n in (11, 1, 30, 5)]


@pytest.fixture(scope="module")
def ours():
    return tiny_model()


@pytest.fixture(scope="module")
def theirs(ours):
    config = MistralConfig(**config_to_hf(TINY, torch.float32), attn_implementation="eager")
    model = MistralForCausalLM(config).eval()
    weights = dict(ours.named_parameters())
    model.load_state_dict({name: weights[OURS[name]] for name in model.state_dict()})
    return model


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
