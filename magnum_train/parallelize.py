"""From a model on the meta device to one that lies sharded on the ranks, with its initial weights.

The order is fixed: products in 8 bits, recomputation, then compilation of what is recomputed, then `fully_shard`, so
that a block's recomputation gathers its weights through FSDP's own hooks, and those are not compiled. The model file
knows nothing of this.
"""

import itertools

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from magnum_train.fp8 import convert
from magnum_train.recompute import layer_modes, with_recomputation
from magnum_train.sequence import spread
from model import Transformer, TransformerConfig
from model.transformer import initial_weight


def build(
    config: TransformerConfig,
    *,
    attention_backend: str,
    mesh: DeviceMesh,
    sequence: ProcessGroup | None = None,
    device: torch.device,
    compute_dtype: torch.dtype,
    activation_checkpointing: str,
    reshard_after_forward: bool,
    seed: int | None,
    compiled: bool = False,
    parameter_dtype: torch.dtype = torch.float32,
    fp8: str = "none",
) -> Transformer:
    """Build the model sharded over a (replicate, shard) mesh.

    Gradients are summed over ranks, never averaged: the step divides by the weight of all tokens, which is
    known before it (design of `step.py`).

    Args:
        config: The architecture.
        attention_backend: A backend that this device runs, by name.
        mesh: Two dimensions, (replicate, shard).
        sequence: The ranks that share this one's packs; None where it has packs of its own.
        device: Where this rank's shards live.
        compute_dtype: dtype of gathered weights and activations; reductions are float32.
        activation_checkpointing: A mode of `recompute.MODES`, or a mixture of them.
        reshard_after_forward: Whether gathered weights are freed between forward and backward. Those of the last block
            and of the head never are: they are wanted again at once.
        seed: Seed of the initial weights, which do not depend on the sharding; None leaves them for a checkpoint to
            fill, since drawing those of the 12B takes minutes.
        compiled: Whether blocks are compiled, one graph for all of them.
        parameter_dtype: What parameters are stored in; bfloat16 where the optimizer has what that lacks. Gradients
            then are bfloat16 as well: reduced in float32, and rounded after each micro-batch.
        fp8: A recipe of `fp8.RECIPES` for the blocks' matrix products; emulated on a CPU.

    Returns:
        The model; its parameters are DTensors.
    """
    with torch.device("meta"):
        model = Transformer(config, attention_backend=attention_backend).to(parameter_dtype)
    if sequence is not None:
        spread(model, sequence)
    convert(model, fp8, emulated=device.type == "cpu")
    modes = layer_modes(activation_checkpointing, config.n_layers)
    for (name, block), mode in zip(list(model.layers.named_children()), modes, strict=True):
        block = with_recomputation(block, mode)
        if compiled:
            block.compile(fullgraph=True)
        model.layers.register_module(name, block)
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )  # cast_forward_inputs would round the loss weights to bf16
    for part in (*model.layers, model.output, model):
        reshard = reshard_after_forward and part is not model.layers[-1] and part is not model.output
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    # Said, since FSDP by itself begins to gather a block's weights only when the host gets there.
    for before, after in itertools.pairwise((model, *model.layers, model.output)):
        before.set_modules_to_forward_prefetch([after])
        after.set_modules_to_backward_prefetch([before] if before is not model else [])
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
    states = [item for state in optimizer.state.values() for item in state.items()]
    parameters = {name_of(p.dtype) for p in model.parameters()}
    moments = {name_of(v.dtype) for name, v in states if isinstance(v, torch.Tensor) and name not in ("step", "low")}
    low = " (and 16 more bits of float32 masters)" if any(name == "low" for name, _ in states) else ""
    return f"parameters {'/'.join(sorted(parameters))}{low}, moments {'/'.join(sorted(moments))}"
