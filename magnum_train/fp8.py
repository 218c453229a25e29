"""Matrix products of the blocks in 8-bit floating point, through torchao: faster, and other numbers.

Both factors of a product are scaled and rounded to 8 bits as it is made, forward and backward. What is stored,
gathered, normed, attended to and updated stays what it was; so do the embedding and the head, whose rounding would
reach every logit. *tensorwise* has one scale for each matrix, *rowwise* one for each row, which costs some of the speed
and keeps values that lie beside an outlier.

torchao can also gather weights in 8 bits. That makes parameters a tensor class without memory of its own, which neither
the optimizer's kernel nor the copy for a checkpoint can read; and on one host gathering hides behind computing. So it
is not used.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from magnum_train.errors import ConfigError
from model import Transformer, TransformerConfig
from model.config import parameter_shapes

RECIPES = ("none", "tensorwise", "rowwise")
"""What `parallel.fp8` may be."""
MULTIPLE = 16
"""Of which every side of a product in 8 bits must be (cuBLAS, "FP8 matrix multiplications")."""
CAPABILITY = (8, 9)
"""The first GPUs with such products: Ada, then Hopper."""


def check(recipe: str, config: TransformerConfig, tokens: int, device: torch.device, dtype: torch.dtype) -> None:
    """Make sure that the blocks' products can be made in 8 bits here.

    Args:
        recipe: One of `RECIPES`.
        config: The architecture.
        tokens: That a rank has of a pack.
        device: Where.
        dtype: Of activations.

    Raises:
        ConfigError: They cannot; says why.
    """
    if recipe == "none":
        return
    place = "parallel.fp8"
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABILITY:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"the device {device.type}"
        least = ".".join(map(str, CAPABILITY))
        raise ConfigError(
            place, f"{recipe}, on {name}", f"a GPU with 8-bit matrix products (compute capability {least} or above)",
            "Set parallel.fp8=none.",
        )  # fmt: skip
    if dtype != torch.bfloat16:
        raise ConfigError(place, f"{recipe}, with activations in {dtype}", "bf16", "Set precision=bf16_mixed.")
    sides = {side for name, shape in parameter_shapes(config).items() if len(shape) == 2 for side in shape
             if name.startswith("layers.")}  # fmt: skip
    if uneven := sorted(side for side in {*sides, tokens} if side % MULTIPLE):
        found = ", ".join(map(str, uneven))
        raise ConfigError(
            place, f"{recipe}, with products that are {found} wide or tall", f"multiples of {MULTIPLE}",
            "Change the model's widths or data.pack_tokens, or set parallel.fp8=none.",
        )  # fmt: skip
    _torchao(recipe)


def convert(model: Transformer, recipe: str, *, emulated: bool = False) -> None:
    """Have the blocks' matrix products made in 8 bits; names and values of parameters stay.

    Args:
        model: Before its blocks are wrapped, compiled or sharded.
        recipe: One of `RECIPES`.
        emulated: Round the factors to 8 bits and multiply them in float32, for a device without such products: what is
            rounded is the same, nothing is faster.

    Raises:
        ConfigError: torchao is not installed.

    Source:
        Micikevicius et al., "FP8 Formats for Deep Learning" (arXiv 2209.05433); scales are taken anew at every product
        (torchao's "dynamic" scaling).
    """
    if recipe == "none":
        return
    float8 = _torchao(recipe)
    settings = float8.Float8LinearConfig.from_recipe_name(recipe)
    if emulated:
        settings = replace(settings, emulate=True)
    float8.convert_to_float8_training(model.layers, config=settings)


def mfu_name(recipe: str) -> str:
    """What utilisation is called in a run's record: a share of the bf16 peak, which products in 8 bits may pass."""
    return "mfu" if recipe == "none" else f"fp8_{recipe}_of_bf16_peak"


def told(recipe: str) -> str:
    """What is said of it at start, after which more follows; nothing without it."""
    if recipe == "none":
        return ""
    return f"products of the blocks in fp8 {recipe} (utilisation is {mfu_name(recipe)}, not mfu), "


def _torchao(recipe: str) -> Any:
    """The part of torchao that does it."""
    try:
        import torchao.float8  # 6 seconds, only where it is asked for
    except ImportError as error:
        remedy = "pip install -c constraints.txt '.[torchao]', or set parallel.fp8=none."
        raise ConfigError("parallel.fp8", f"{recipe}, and {error}", "torchao, an extra", remedy) from error
    return torchao.float8
