"""From a model on the meta device to one that lies sharded on the ranks, with its initial weights.

The order is fixed: activation checkpointing, then `fully_shard`, so that a block's recomputation gathers its
weights through FSDP's own hooks. The model file knows nothing of this.
"""

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from model import Transformer, TransformerConfig
from model.transformer import initial_weight


def build(
    config: TransformerConfig,
    *,
    attention_backend: str,
    mesh: DeviceMesh,
    device: torch.device,
    compute_dtype: torch.dtype,
    activation_checkpointing: str,
    reshard_after_forward: bool,
    seed: int | None,
) -> Transformer:
    """Build the model sharded over a (replicate, shard) mesh, with float32 masters.

    Gradients are summed over ranks, never averaged: the step divides by the weight of all tokens, which is
    known before it (design of `step.py`).

    Args:
        config: The architecture.
        attention_backend: A backend that this device runs, by name.
        mesh: Two dimensions, (replicate, shard).
        device: Where this rank's shards live.
        compute_dtype: dtype of gathered weights and activations; masters and reductions are float32.
        activation_checkpointing: "none" or "full".
        reshard_after_forward: Whether gathered weights are freed between forward and backward.
        seed: Seed of the initial weights, which do not depend on the sharding; None leaves them for a checkpoint to
            fill, since drawing those of the 12B takes minutes.

    Returns:
        The model; its parameters are DTensors in float32.
    """
    with torch.device("meta"):
        model = Transformer(config, attention_backend=attention_backend)
    if activation_checkpointing == "full":
        for name, block in model.layers.named_children():
            model.layers.register_module(name, checkpoint_wrapper(block))
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )  # cast_forward_inputs would round the loss weights to bf16
    for part in (*model.layers, model.output, model):
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    for part in model.modules():
        if isinstance(part, FSDPModule):  # on the root alone, blocks would still average
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
    model.to_empty(device=device)
    if seed is None:
        return model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor)
            name = name.replace("_checkpoint_wrapped_module.", "")
            full = initial_weight(config, name, parameter.shape, seed).to(device)
            parameter.copy_(distribute_tensor(full, mesh, parameter.placements, src_data_rank=None))
    return model


def name_of(dtype: torch.dtype) -> str:
    """A dtype's bare name."""
    return str(dtype).removeprefix("torch.")


def measured_dtypes(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """The dtypes that parameters and moments really have; moments exist after the first step."""
    parameters = {name_of(p.dtype) for p in model.parameters()}
    moments = {
        name_of(value.dtype)
        for state in optimizer.state.values()
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and name != "step"
    }
    return f"parameters {'/'.join(sorted(parameters))}, moments {'/'.join(sorted(moments))}"
