"""The published 12B, from configuration alone: names, shapes, parameters and bytes, with nothing allocated."""

import math

import torch
from transformers import MistralConfig, MistralForCausalLM

from magnum_train.config import compose
from model import Transformer
from model.config import parameter_shapes
from model.flops import parameter_count
from model.hf import config_to_hf, hf_name, plan_shards

# As published with Mistral-Nemo-Base-2407; see its config.json and the index of its shards.
OUTER = {
    "model.embed_tokens.weight": (131072, 5120),
    "lm_head.weight": (131072, 5120),
    "model.norm.weight": (5120,),
}
IN_LAYER = {
    "self_attn.q_proj.weight": (4096, 5120),
    "self_attn.k_proj.weight": (1024, 5120),
    "self_attn.v_proj.weight": (1024, 5120),
    "self_attn.o_proj.weight": (5120, 4096),
    "mlp.gate_proj.weight": (14336, 5120),
    "mlp.up_proj.weight": (14336, 5120),
    "mlp.down_proj.weight": (5120, 14336),
    "input_layernorm.weight": (5120,),
    "post_attention_layernorm.weight": (5120,),
}
PUBLISHED = OUTER | {f"model.layers.{i}.{name}": shape for i in range(40) for name, shape in IN_LAYER.items()}


def test_names_shapes_parameters_and_bytes_are_those_that_were_published() -> None:
    config = compose(["experiment=magnum_v2_12b"]).model.transformer()
    ours = {hf_name(name): shape for name, shape in parameter_shapes(config).items()}
    assert ours == PUBLISHED
    assert len(ours) == 363
    assert parameter_count(config) == sum(math.prod(shape) for shape in PUBLISHED.values()) == 12_247_782_400
    shards = plan_shards(parameter_shapes(config), torch.bfloat16.itemsize, 5 * 10**9)
    assert len(shards) == 5
    sizes = [sum(2 * math.prod(parameter_shapes(config)[name]) for name in names) for names in shards]
    assert sum(sizes) == 24_495_564_800
    assert max(sizes) <= 5 * 10**9


def test_the_network_built_on_the_meta_device_has_them_and_transformers_own_too() -> None:
    config = compose(["experiment=magnum_v2_12b"]).model.transformer()
    with torch.device("meta"):
        ours = {hf_name(name): tuple(p.shape) for name, p in Transformer(config).named_parameters()}
        fields = MistralConfig(**config_to_hf(config, torch.bfloat16))
        theirs = {name: tuple(p.shape) for name, p in MistralForCausalLM(fields).named_parameters()}
    assert ours == theirs == PUBLISHED
