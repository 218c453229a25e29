"""The same network by transformers: an oracle that shares the weights and not a line of code."""

import torch
from transformers import MistralConfig, MistralForCausalLM

from model import Transformer
from model.config import parameter_shapes
from model.hf import config_to_hf, hf_name
from models import TINY

OURS = {hf_name(name): name for name in parameter_shapes(TINY)}
"""Our name of each of their parameters."""


def transformers_twin(ours: Transformer) -> MistralForCausalLM:
    """Transformers' Mistral with the weights of one of ours, of the tiny shape."""
    config = MistralConfig(**config_to_hf(TINY, torch.float32), attn_implementation="eager")
    model = MistralForCausalLM(config).eval()
    weights = dict(ours.named_parameters())
    model.load_state_dict({name: weights[OURS[name]] for name in model.state_dict()})
    return model
