"""The update of `adamw.py` as one Triton kernel, for GPUs: every byte is read once and written once.

Operation by operation what is there, which is where it is explained; `tests/unit/magnum_train/test_adamw.py` holds one
against the other, bit for bit, in Triton's interpreter where that is installed. So products and sums are not contracted
but where it is meant (`enable_fp_fusion=False`), and divisions and roots are rounded as IEEE 754 has it, not
approximated. bfloat16 goes in and out as its bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from magnum_train.adamw import BLOCK, LEAST_EXPONENT, SIGNED, UNSIGNED, Constants, Stored

_BLOCKS = 4
"""That a program updates: 1,024 elements, eight to a thread."""
_LEAST_EXPONENT = tl.constexpr(LEAST_EXPONENT)
_SIGNED, _UNSIGNED = tl.constexpr(SIGNED), tl.constexpr(UNSIGNED)


def update(
    gradient: Tensor,
    stored: Stored,
    scalars: Tensor,
    keys: Tensor,
    first: Tensor,
    constants: Constants,
    found_inf: Tensor | None,
) -> None:
    """Update a parameter and its moments in place, on the device's own time.

    Args:
        gradient: [rows, columns], float32 or bfloat16, contiguous like all the rest.
        stored: Parameter and moments.
        scalars: From `adamw.scalars_of`.
        keys: What distinguishes this parameter and this update, [2] int32.
        first: The whole parameter's row that is the first one here, scalar int64.
        constants: Betas and epsilon.
        found_inf: Scalar float32; where it is not 0, nothing is changed. None for 0.
    """
    whole_rows, columns = gradient.shape
    # Without blocks that end with a row, all is one long row.
    rows, width = (1, gradient.numel()) if stored.mean_exponent is None else (whole_rows, columns)
    moments = {torch.float32: "float32", torch.bfloat16: "bf16", torch.uint8: "int8"}[stored.mean.dtype]
    nothing = gradient  # where a pointer is asked for that this recipe does not follow
    weight, near = (constants.weight1, True) if constants.weight1 < 0.5 else (constants.weight1 - 1, False)
    _update[(triton.cdiv(rows * triton.cdiv(width, BLOCK), _BLOCKS),)](
        _bits(gradient.contiguous()),
        _bits(stored.parameter),
        nothing if stored.low is None else stored.low,
        _bits(stored.mean),
        nothing if stored.mean_exponent is None else stored.mean_exponent,
        _bits(stored.square),
        nothing if stored.square_exponent is None else stored.square_exponent,
        scalars,
        keys,
        first,
        scalars if found_inf is None else found_inf,
        rows,
        width,
        columns,
        weight,
        constants.beta2,
        constants.weight2,
        constants.eps,
        NEAR=near,
        GRADIENT_BF16=gradient.dtype == torch.bfloat16,
        PARAMETER_BF16=stored.parameter.dtype == torch.bfloat16,
        LOW_BITS=stored.low is not None,
        MOMENTS=moments,
        MAY_BE_REFUSED=found_inf is not None,
        BLOCKS=_BLOCKS,
        SIZE=BLOCK,
        num_warps=4,
        enable_fp_fusion=False,
    )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


@triton.jit
def _mixed(bits):
    """`adamw.mixed`, of uint32."""
    bits = bits ^ (bits >> 16)
    bits = bits * 0x7FEB352D
    bits = bits ^ (bits >> 15)
    bits = bits * 0x846CA68B
    return bits ^ (bits >> 16)


@triton.jit
def _from_bf16(bits):
    """The float32 of a bfloat16's bits, int16."""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _to_bf16(value, chance):
    """`adamw.to_bfloat16`, as bits in int16."""
    return ((value.to(tl.int32, bitcast=True) + chance) >> 16).to(tl.int16)


@triton.jit
def _decode(code, exponent, OCTAVES: tl.constexpr, UNSIGNED: tl.constexpr):
    """`adamw.decode`; codes [blocks, size] and exponents [blocks, 1], both int32."""
    size = code & 0xFF if UNSIGNED else code & 0x7F
    ordinary = ((size + ((exponent - OCTAVES) << 3)) << 20).to(tl.float32, bitcast=True)
    small = size.to(tl.float32) * ((exponent - OCTAVES - 2) << 23).to(tl.float32, bitcast=True)
    value = tl.where(size < 8, small, ordinary)
    return value if UNSIGNED else tl.where(code < 128, value, -value)


@triton.jit
def _encode(value, chance, OCTAVES: tl.constexpr, UNSIGNED: tl.constexpr, LEAST: tl.constexpr):
    """`adamw.encode`; codes [blocks, size] and exponents [blocks], both uint8."""
    bits = value.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    exponents = (tl.max(size, axis=1) + 0xFFFFF) >> 23
    exponents = tl.minimum(tl.maximum(exponents, LEAST), 254)
    exponent = exponents[:, None]
    ordinary = ((size + (chance << 4)) >> 20) - ((exponent - OCTAVES) << 3)
    steps = size.to(tl.float32, bitcast=True) * ((0 - exponent + (256 + OCTAVES)) << 23).to(tl.float32, bitcast=True)
    small = (tl.minimum(steps, 8.0) + chance.to(tl.float32) * 1.52587890625e-05).to(tl.int32)
    code = tl.where(size < ((exponent - OCTAVES + 1) << 23), small, ordinary)
    code = tl.maximum(code, (size > 0).to(tl.int32)) if UNSIGNED else code | ((bits >> 24) & 0x80)
    return code.to(tl.uint8), exponents.to(tl.uint8)


@triton.jit
def _update(
    gradient_at, parameter_at, low_at, mean_at, mean_exponent_at, square_at, square_exponent_at,
    scalars_at, keys_at, first_at, found_inf_at,
    rows, width, columns, weight, beta2, weight2, eps,
    NEAR: tl.constexpr, GRADIENT_BF16: tl.constexpr, PARAMETER_BF16: tl.constexpr, LOW_BITS: tl.constexpr,
    MOMENTS: tl.constexpr, MAY_BE_REFUSED: tl.constexpr, BLOCKS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """`adamw.update` for a few blocks of a row, or of several."""
    blocks_in_row = tl.cdiv(width, SIZE)
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    column = (block % blocks_in_row)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    there = block < rows * blocks_in_row
    if MAY_BE_REFUSED:
        there = there & (tl.load(found_inf_at + tl.arange(0, BLOCKS) * 0) == 0.0)
    inside = there[:, None] & (column < width)
    place = (block // blocks_in_row)[:, None] * width + column

    gradient = tl.load(gradient_at + place, mask=inside, other=0)
    if GRADIENT_BF16:
        gradient = _from_bf16(gradient)
    parameter = tl.load(parameter_at + place, mask=inside, other=0)
    if LOW_BITS:
        low = tl.load(low_at + place, mask=inside, other=0).to(tl.int32)
        master = ((parameter.to(tl.int32) << 16) + low).to(tl.float32, bitcast=True)
    elif PARAMETER_BF16:
        master = _from_bf16(parameter)
    else:
        master = parameter
    mean = tl.load(mean_at + place, mask=inside, other=0)
    square = tl.load(square_at + place, mask=inside, other=0)
    if MOMENTS == "int8":
        exponent = tl.load(mean_exponent_at + block, mask=there, other=_LEAST_EXPONENT).to(tl.int32)
        mean = _decode(mean.to(tl.int32), exponent[:, None], _SIGNED, False)
        exponent = tl.load(square_exponent_at + block, mask=there, other=_LEAST_EXPONENT).to(tl.int32)
        square = _decode(square.to(tl.int32), exponent[:, None], _UNSIGNED, True)
    elif MOMENTS == "bf16":
        mean = _from_bf16(mean)
        square = _from_bf16(square)

    decay, negative_step = tl.load(scalars_at), tl.load(scalars_at + 1)
    correction, clip = tl.load(scalars_at + 2), tl.load(scalars_at + 3)
    gradient = gradient * clip
    master = master * decay
    mean = tl.fma(gradient - mean, weight, mean if NEAR else gradient)
    square = tl.fma(weight2 * gradient, gradient, square * beta2)
    divisor = tl.div_rn(tl.sqrt_rn(square), correction) + eps
    master = master + tl.div_rn(negative_step * mean, divisor)

    index = (tl.load(first_at) * columns + place).to(tl.uint32)
    if LOW_BITS:
        bits = master.to(tl.int32, bitcast=True)
        high = (bits + 0x8000) >> 16
        tl.store(parameter_at + place, high.to(tl.int16), mask=inside)
        tl.store(low_at + place, (bits - (high << 16)).to(tl.int16), mask=inside)
    elif PARAMETER_BF16:
        chance = (_mixed(index ^ tl.load(keys_at).to(tl.uint32, bitcast=True)) & 0xFFFF).to(tl.int32)
        tl.store(parameter_at + place, _to_bf16(master, chance), mask=inside)
    else:
        tl.store(parameter_at + place, master, mask=inside)
    if MOMENTS == "float32":
        tl.store(mean_at + place, mean, mask=inside)
        tl.store(square_at + place, square, mask=inside)
    else:
        bits = _mixed(index ^ tl.load(keys_at + 1).to(tl.uint32, bitcast=True))
        for_mean, for_square = (bits & 0xFFFF).to(tl.int32), (bits >> 16).to(tl.int32)
        if MOMENTS == "int8":
            code, exponent = _encode(mean, for_mean, _SIGNED, False, _LEAST_EXPONENT)
            tl.store(mean_at + place, code, mask=inside)
            tl.store(mean_exponent_at + block, exponent, mask=there)
            code, exponent = _encode(square, for_square, _UNSIGNED, True, _LEAST_EXPONENT)
            tl.store(square_at + place, code, mask=inside)
            tl.store(square_exponent_at + block, exponent, mask=there)
        else:
            tl.store(mean_at + place, _to_bf16(mean, for_mean), mask=inside)
            tl.store(square_at + place, _to_bf16(square, for_square), mask=inside)
