"""AdamW for parameters and moments that are stored in fewer bits than they are computed in.

A parameter is stored as float32; as the bfloat16 next to a float32 master, whose 16 other bits are a state of the
optimizer (*split*: nothing is lost); or as a bfloat16 that is rounded up or down by chance (*stochastic*: right on
average). Moments are stored as float32, as bfloat16, or as 8-bit codes with an exponent for each block of 256. All of
it becomes float32 for the update, whose mathematics stand once, in `adamw`, in the order of operations of torch's own
fused kernel on CPU: from the same gradients come the same bits.

What is stored in fewer bits than it was computed in is rounded by chance, since what a moment changes by in a step is
mostly less than half of what separates two codes, and would be rounded away at every step. The bits that decide are a
function of the count of updates, the parameter's place in the optimizer and the element's in the whole parameter: the
same on another sharding, and after a restart.

On a GPU all of it is one kernel (`adamw_triton.py`); elsewhere what follows, a piece at a time or compiled.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad

from model.hf import local_region

BLOCK = 256
"""Neighbours in a row that share an exponent; as torchao has it, and 1/32 of a bit per element."""
LEAST_EXPONENT = 37
"""Of a block, biased as float32 has it: 2^-90. It keeps what follows from it away from float32's subnormal numbers; a
moment that small has long been nothing beside Adam's epsilon."""
SIGNED, UNSIGNED = 15, 31
"""Octaves below a block's largest value in which codes have three bits of mantissa: with a bit for the sign, and
without. Below them codes are evenly spaced, down to 0."""
COMPILED_FROM = 2**24
"""Elements on this process from which compiling what codes take is worth its quarter of a minute; nothing else gains by
it, on a CPU (docs/decisions/0016)."""
PIECE = 2**16
"""Elements that are updated at a time where nothing is compiled: what comes between stays in the processor's cache."""


class Constants(NamedTuple):
    """What stays the same from update to update; numbers that float32 has."""

    weight1: float
    """1 - beta1."""
    beta2: float
    weight2: float
    """1 - beta2."""
    eps: float


class Stored(NamedTuple):
    """What this process has of a parameter and its moments, as [rows, columns]; None where the recipe has no such."""

    parameter: Tensor
    """float32 or bfloat16."""
    low: Tensor | None
    """int16: what is to be added to the bits of a bfloat16 parameter, shifted up, to have those of its master."""
    mean: Tensor
    """The first moment: float32, bfloat16, or codes in uint8."""
    mean_exponent: Tensor | None
    """Of its blocks, [rows, ceil(columns / 256)] uint8, biased as float32 has it."""
    square: Tensor
    """The second moment."""
    square_exponent: Tensor | None


def multiply_add(factor: Tensor, other: Tensor, base: Tensor) -> Tensor:
    """`factor * other + base` with one rounding, as torch's kernels for CPUs have it where compiler and processor can.

    Compiled code has two, unless told otherwise. There the sum is made in float64, where the product is exact, and
    rounded to odd: a rounding that a second one to float32 does not notice (Boldo and Melquiond, "Emulation of FMA and
    correctly rounded sums", IEEE Transactions on Computers 57, 2008).

    Args:
        factor: float32, as are the others; all of a shape, or scalar.
        other: To be multiplied with it.
        base: To be added.

    Returns:
        float32.
    """
    if not torch.compiler.is_compiling():
        return torch.addcmul(base, factor, other)
    product, base = factor.double() * other.double(), base.double()
    total = product + base
    part = total - product
    error = (product - (total - part)) + (base - part)  # of the sum: Knuth's TwoSum
    bits = total.view(torch.int64)
    towards = torch.where((error > 0) == (total > 0), 1, -1)
    odd = torch.where((error != 0) & (bits & 1 == 0), bits + towards, bits)
    return odd.view(torch.float64).float()


def lerp(start: Tensor, end: Tensor, weight: float) -> Tensor:
    """`start + weight * (end - start)`, product and sum with one rounding: `torch.lerp`, also where it is compiled.

    Args:
        start: float32.
        end: float32, of the same shape.
        weight: From 0 to 1, a number that float32 has.

    Returns:
        float32.
    """
    if not torch.compiler.is_compiling():
        return torch.lerp(start, end, weight)
    difference = end - start
    base, factor = (start, weight) if weight < 0.5 else (end, weight - 1)
    return multiply_add(torch.full_like(difference, factor), difference, base)


def root(value: Tensor) -> Tensor:
    """The square root of float32, correctly rounded; `torch.sqrt` on a CPU may be MKL's, which is not."""
    return value.sqrt() if torch.compiler.is_compiling() else value.double().sqrt().float()


def adamw(
    gradient: Tensor, master: Tensor, mean: Tensor, square: Tensor, scalars: Tensor, constants: Constants
) -> tuple[Tensor, Tensor, Tensor]:
    """One update of AdamW, element by element.

    Args:
        gradient: Any floating dtype, before clipping.
        master: float32, as are the moments; all of the gradient's shape.
        mean: First moment.
        square: Second moment.
        scalars: From `scalars_of`.
        constants: Betas and epsilon.

    Returns:
        Master and moments after it, float32.

    Source:
        Loshchilov and Hutter, "Decoupled Weight Decay Regularization", algorithm 2, in the order of operations of
        torch's `FusedAdamKernel.cpp`, and contracted where its vector code is; there clipping is a pass of its own, and
        what is left over at the end of a tensor, less than a vector, is not contracted.
    """
    decay, negative_step, correction, clip = scalars.unbind()
    gradient = gradient.float() * clip
    master = master * decay
    mean = lerp(mean, gradient, constants.weight1)
    square = multiply_add(constants.weight2 * gradient, gradient, square * constants.beta2)
    return master + negative_step * mean / (root(square) / correction + constants.eps), mean, square


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 as the nearest bfloat16 (ties away from zero) and what lacks of its bits.

    Args:
        master: float32.

    Returns:
        bfloat16, and int16: the difference of the bits. What rounds beyond the largest bfloat16 becomes infinity there,
        and is restored all the same.
    """
    bits = master.view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def join(parameter: Tensor, low: Tensor) -> Tensor:
    """The float32 that `split` has split, bit for bit."""
    return ((parameter.view(torch.int16).to(torch.int32) << 16) + low).view(torch.float32)


def mixed(bits: Tensor) -> Tensor:
    """A hash of 32 bits: every bit of the result hangs on every one of the argument, evenly.

    Args:
        bits: int32.

    Returns:
        int32.

    Source:
        "lowbias32" of Chris Wellons' hash-prospector. Counter-based generators such as Philox take ten rounds for
        independence that rounding does not need.
    """
    bits = bits ^ ((bits >> 16) & 0xFFFF)
    bits = bits * 0x7FEB352D
    bits = bits ^ ((bits >> 15) & 0x1FFFF)
    bits = bits * (0x846CA68B - 2**32)
    return bits ^ ((bits >> 16) & 0xFFFF)


def to_bfloat16(value: Tensor, chance: Tensor) -> Tensor:
    """Round to one of the two neighbouring bfloat16, to the nearer one the likelier; right on average.

    Args:
        value: float32.
        chance: int32 from 0 to 65535, uniform.

    Returns:
        bfloat16.
    """
    return ((value.view(torch.int32) + chance) >> 16).to(torch.int16).view(torch.bfloat16)


def encode(value: Tensor, chance: Tensor, octaves: int) -> tuple[Tensor, Tensor]:
    """Blocks of float32 as 8-bit floating-point codes beside an exponent for each block; right on average.

    Three bits of mantissa over `octaves` octaves below the block's largest value, so that an error is a share of the
    value itself: Adam divides one moment by the root of the other, each element by its own, and a code that is even
    over the block would leave nothing of the small ones. Exponents are shared as whole powers of two, and all but the
    rounding is exact. In what is unsigned nothing but 0 becomes 0: a second moment that vanished would blow up the
    update, one that is too large only keeps it small.

    Args:
        value: [..., BLOCK] float32.
        chance: int32 from 0 to 65535, uniform, of the same shape.
        octaves: `SIGNED`, or `UNSIGNED` for what has no negative values.

    Returns:
        Codes, uint8, and exponents, [..., 1] uint8.

    Source:
        Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (arXiv 2110.02861), for blocks and for codes
        whose precision is relative; Li et al., "Memory Efficient Optimizers with 4-bit States" (arXiv 2309.01507), for
        a second moment without 0. Differs: codes are worked out, not looked up, and rounding is by chance.
    """
    bits = value.view(torch.int32)
    size = bits & 0x7FFFFFFF
    # The exponent of what the largest may be rounded up to.
    exponent = ((size.amax(-1, keepdim=True) + 0xFFFFF) >> 23).clamp(LEAST_EXPONENT, 254)
    ordinary = ((size + (chance << 4)) >> 20) - ((exponent - octaves) << 3)
    steps = size.view(torch.float32) * ((256 + octaves - exponent) << 23).view(torch.float32)
    small = (steps.clamp(max=8) + chance * 2.0**-16).to(torch.int32)
    code = torch.where(size < ((exponent - octaves + 1) << 23), small, ordinary)
    not_zero, sign = (size > 0).to(torch.int32), (bits >> 24) & 0x80
    code = torch.maximum(code, not_zero) if octaves == UNSIGNED else code | sign
    return code.to(torch.uint8), exponent.to(torch.uint8)


def decode(code: Tensor, exponent: Tensor, octaves: int) -> Tensor:
    """What `encode` has encoded.

    Args:
        code: [..., BLOCK] uint8.
        exponent: [..., 1] uint8.
        octaves: As in `encode`.

    Returns:
        [..., BLOCK] float32.
    """
    whole, exponent = code.to(torch.int32), exponent.to(torch.int32)
    size = whole if octaves == UNSIGNED else whole & 0x7F
    ordinary = ((size + ((exponent - octaves) << 3)) << 20).view(torch.float32)
    small = size.float() * ((exponent - octaves - 2) << 23).view(torch.float32)
    value = torch.where(size < 8, small, ordinary)
    return value if octaves == UNSIGNED else torch.where(whole < 128, value, -value)


def update(
    gradient: Tensor, stored: Stored, scalars: Tensor, keys: Tensor, first: Tensor, constants: Constants
) -> None:
    """Update a parameter and its moments in place.

    Args:
        gradient: [rows, columns], any floating dtype.
        stored: Parameter and moments.
        scalars: From `scalars_of`.
        keys: What distinguishes this parameter and this update, [2] int32: for its parameter, for its moments.
        first: The whole parameter's row that is the first one here, scalar int64.
        constants: Betas and epsilon.
    """
    rows, columns = gradient.shape
    in_blocks = stored.mean_exponent is not None
    missing = -columns % BLOCK if in_blocks else 0

    def blocks(tensor: Tensor) -> Tensor:
        return tensor.reshape(rows, -1, BLOCK) if in_blocks else tensor

    def shaped(tensor: Tensor) -> Tensor:
        return blocks(pad(tensor, (0, missing)) if missing else tensor)

    def put(target: Tensor, value: Tensor) -> None:
        target.copy_(value.reshape(rows, -1)[:, :columns] if in_blocks else value)

    def chance(key: Tensor) -> Tensor:
        """32 bits of chance for every element."""
        row = ((torch.arange(rows, device=first.device) + first) * columns).to(torch.int32)
        column = torch.arange(columns + missing, device=first.device, dtype=torch.int32)
        return blocks(mixed((row[:, None] + column) ^ key))  # of more than 2^32 elements some share their bits

    parameter = shaped(stored.parameter)
    master = parameter.float() if stored.low is None else join(parameter, shaped(stored.low))
    if stored.mean_exponent is not None and stored.square_exponent is not None:
        mean = decode(shaped(stored.mean), stored.mean_exponent[..., None], SIGNED)
        square = decode(shaped(stored.square), stored.square_exponent[..., None], UNSIGNED)
    else:
        mean, square = stored.mean.float(), stored.square.float()

    master, mean, square = adamw(shaped(gradient), master, mean, square, scalars, constants)

    if stored.low is not None:
        high, low = split(master)
        put(stored.parameter, high)
        put(stored.low, low)
    elif stored.parameter.dtype == torch.bfloat16:
        put(stored.parameter, to_bfloat16(master, chance(keys[0]) & 0xFFFF))
    else:
        put(stored.parameter, master)
    if stored.mean.dtype == torch.float32:
        stored.mean.copy_(mean)
        stored.square.copy_(square)
        return
    bits = chance(keys[1])
    for_mean, for_square = bits & 0xFFFF, (bits >> 16) & 0xFFFF
    if stored.mean_exponent is not None and stored.square_exponent is not None:
        code, exponent = encode(mean, for_mean, SIGNED)
        put(stored.mean, code)
        stored.mean_exponent.copy_(exponent[..., 0])
        code, exponent = encode(square, for_square, UNSIGNED)
        put(stored.square, code)
        stored.square_exponent.copy_(exponent[..., 0])
    else:
        stored.mean.copy_(to_bfloat16(mean, for_mean))
        stored.square.copy_(to_bfloat16(square, for_square))


def in_pieces(
    gradient: Tensor, stored: Stored, scalars: Tensor, keys: Tensor, first: Tensor, constants: Constants
) -> None:
    """`update`, some rows at a time: no more memory is taken, and little of it is gone through more than once."""
    rows, columns = gradient.shape
    count = max(1, PIECE // columns)
    for start in range(0, rows, count):
        piece = stored._replace(
            **{name: tensor[start : start + count] for name, tensor in stored._asdict().items() if tensor is not None}
        )
        update(gradient[start : start + count], piece, scalars, keys, first + start, constants)


def compiled(**how: Any) -> Callable[..., None]:
    """`update`, compiled once for codes and once for the rest.

    Args:
        how: Further arguments of `torch.compile`.
    """
    graph = torch.compile(update, dynamic=True, **how)

    def run(
        gradient: Tensor, stored: Stored, scalars: Tensor, keys: Tensor, first: Tensor, constants: Constants
    ) -> None:
        graph(gradient, stored, scalars, keys.clone(), first, constants)  # of a slice, the offset would count

    return run


def scalars_of(
    count: Tensor, clip: Tensor | None, *, lr: float, betas: tuple[float, float], weight_decay: float
) -> Tensor:
    """What an update multiplies and divides by, worked out where the count is: the host need not know it.

    Args:
        count: Of updates, this one included; scalar float32.
        clip: What gradients are multiplied by; scalar, None for 1.
        lr: Learning rate.
        betas: Decay of the moments.
        weight_decay: Per unit of learning rate.

    Returns:
        1 - lr × decay; minus the step's size, lr / (1 - beta1^count); the root of 1 - beta2^count; clip. [4] float32,
        worked out in float64 like torch's own.
    """
    exact = count.double()
    one = torch.ones_like(exact)
    step = lr / (1 - betas[0] ** exact)
    correction = (1 - betas[1] ** exact).sqrt()
    factor = one if clip is None else clip.double()
    return torch.stack([one * (1 - lr * weight_decay), -step, correction, factor]).float()


class AdamW(torch.optim.Optimizer):
    """AdamW over parameters and moments of fewer bits.

    States lie like their parameters: those of a sharded parameter are DTensors with its placements, so that a
    checkpoint can be read on another number of ranks.

    Args:
        groups: Parameters, as torch's optimizers take them: float32, or bfloat16. Sharded by rows, or whole.
        lr: Learning rate.
        betas: Decay of the moments.
        eps: Added to the root of the second moment.
        weight_decay: Per unit of learning rate.
        low_bits: Whether bfloat16 parameters have the other bits of a float32 master; else they are rounded by chance.
            What they hold now is taken for the master.
        moments: "float32", "bf16" or "int8". Parameters of one dimension have float32 moments whatever this is: they
            are few, and of one row.

    Attributes:
        found_inf: Scalar float32 on the device; where it is not 0, `step` changes nothing at all. None for 0. The host
            does not wait for it, as little as for anything else here.
        clip: Scalar that gradients are multiplied by as they are read; None for 1.

    Raises:
        ValueError: A parameter of another dtype, or sharded by another dimension than the first.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = 0.0,
        low_bits: bool = False,
        moments: str = "float32",
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._step_supports_amp_scaling = True  # by which torch's optimizers say that they obey `found_inf`
        self.found_inf: Tensor | None = None
        self.clip: Tensor | None = None
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        device = parameters[0].device
        self._count = torch.zeros((), device=device)
        self._parts = []
        for number, parameter in enumerate(parameters):
            states = _states(parameter, low_bits=low_bits, moments=moments)
            self.state[parameter] = {"step": self._count, **states}
            self._parts.append(_part(number, parameter, states))
        self._numbers = torch.arange(len(parameters), dtype=torch.int32, device=device)
        self._update = _way(device, sum(_local(parameter).numel() for parameter in parameters), moments)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient, unless `found_inf` says not to."""
        loss = None if closure is None else closure()
        if self.found_inf is None:
            self._count += 1
        elif self._count.device.type == "cpu":  # where it costs nothing to ask
            if self.found_inf:
                return loss
            self._count += 1
        else:
            self._count += self.found_inf == 0
        this_update = mixed(self._count.to(torch.int32))
        keys = torch.stack([mixed(this_update ^ mixed(2 * self._numbers + purpose)) for purpose in (1, 2)], dim=1)
        parts = iter(self._parts)
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            constants = Constants(*map(_to_float32, (1 - beta1, beta2, 1 - beta2, group["eps"])))
            scalars = scalars_of(
                self._count, self.clip, lr=group["lr"], betas=group["betas"], weight_decay=group["weight_decay"]
            )
            for parameter, part in zip(group["params"], parts, strict=False):
                if parameter.grad is not None and (gradient := _local(parameter.grad)).numel():
                    stored = part.stored(_local(parameter))
                    self._update(
                        gradient.reshape(-1, part.width), stored, scalars, keys[part.number], part.first, constants,
                        self.found_inf,
                    )  # fmt: skip
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over states as they are: torch's own method would round float32 moments of bfloat16 parameters.

        Args:
            state_dict: Of an optimizer over the same parameters.

        Raises:
            ValueError: It is of another one.
        """
        groups = state_dict["param_groups"]
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in self.param_groups]:
            raise ValueError("found states of other groups of parameters, expected those of this optimizer")
        for theirs, ours in zip(groups, self.param_groups, strict=True):
            ours.update({key: value for key, value in theirs.items() if key != "params"})
            for key, parameter in zip(theirs["params"], ours["params"], strict=True):
                there, here = state_dict["state"][key], self.state[parameter]
                if there.keys() != here.keys():
                    raise ValueError(f"found the states {', '.join(there)}, expected {', '.join(here)}")
                for name, tensor in here.items():
                    if there[name] is not tensor:
                        tensor.copy_(there[name])


class _Part(NamedTuple):
    """What belongs to one parameter."""

    number: int
    """Its place among the optimizer's."""
    width: int
    """Columns of what `update` is given. Where rows need not be told apart they are a column, or one of blocks."""
    first: Tensor
    """The whole parameter's row, of this width, that is the first one here, scalar int64. A tensor, so that nothing is
    compiled anew for a number."""
    states: dict[str, Tensor]
    """What this process has of them, by their name in the optimizer's state."""

    def stored(self, local: Tensor) -> Stored:
        """Together with what this process has of the parameter, as `update` takes it."""

        def found(*names: str) -> Tensor | None:
            tensor = next((self.states[name] for name in names if name in self.states), None)
            return None if tensor is None else tensor.view(-1, self.width)

        def exponent(name: str) -> Tensor | None:
            tensor = self.states.get(name)
            return None if tensor is None else tensor.view(-1, -(-self.width // BLOCK))

        mean, square = found("exp_avg", "exp_avg_code"), found("exp_avg_sq", "exp_avg_sq_code")
        assert mean is not None
        assert square is not None
        return Stored(
            local.view(-1, self.width), found("low"),
            mean, exponent("exp_avg_exponent"), square, exponent("exp_avg_sq_exponent"),
        )  # fmt: skip


def _part(number: int, parameter: Tensor, states: dict[str, Tensor]) -> _Part:
    """What belongs to a parameter.

    Raises:
        ValueError: It is sharded by another dimension than the first, or has a dtype that the update does not know.
    """
    if parameter.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"found a parameter in {parameter.dtype}, expected float32 or bfloat16")
    local, begins = local_region(parameter)
    if local.shape[1:] != parameter.shape[1:]:
        raise ValueError("found a parameter that is sharded by its columns, expected rows")
    columns = math.prod(local.shape[1:])
    width = 1 if "exp_avg" in states else columns if columns % BLOCK else BLOCK
    first = begins[0] * columns // width if begins else 0
    return _Part(
        number,
        width,
        torch.full((), first, dtype=torch.int64, device=local.device),
        {name: _local(state) for name, state in states.items()},
    )


def _way(device: torch.device, elements: int, moments: str) -> Callable[..., None]:
    """The way to update so many elements on a device: `update`, told of the refusal."""
    if device.type == "cuda":
        from magnum_train import adamw_triton  # triton comes with torch where there are GPUs, and only there

        return adamw_triton.update
    on_cpu = compiled() if moments == "int8" and elements >= COMPILED_FROM else in_pieces

    def unless_refused(*args: Any) -> None:
        on_cpu(*args[:-1])  # a refused one does not come so far, on a CPU

    return unless_refused


def _to_float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))


def _local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor."""
    local = tensor.detach()
    return local.to_local() if isinstance(local, DTensor) else local


def _states(parameter: Tensor, *, low_bits: bool, moments: str) -> dict[str, Tensor]:
    """The states of a parameter before the first update, sharded as it is."""
    local, _ = local_region(parameter)

    def filled(value: int, dtype: torch.dtype, tail: tuple[int, ...]) -> Tensor:
        here = torch.full((*local.shape[:1], *tail), value, dtype=dtype, device=local.device)
        if not isinstance(parameter, DTensor):
            return here
        whole = torch.empty((*parameter.shape[:1], *tail), device="meta")
        return DTensor.from_local(
            here, parameter.device_mesh, parameter.placements, run_check=False, shape=whole.shape, stride=whole.stride()
        )

    tail = tuple(local.shape[1:])
    low = {"low": filled(0, torch.int16, tail)} if low_bits and parameter.dtype == torch.bfloat16 else {}
    if moments == "int8" and tail:
        blocks = -(-math.prod(tail) // BLOCK)
        return low | {
            "exp_avg_code": filled(0, torch.uint8, tail),
            "exp_avg_exponent": filled(LEAST_EXPONENT, torch.uint8, (blocks,)),
            "exp_avg_sq_code": filled(0, torch.uint8, tail),
            "exp_avg_sq_exponent": filled(LEAST_EXPONENT, torch.uint8, (blocks,)),
        }
    dtype = torch.bfloat16 if moments == "bf16" and tail else torch.float32
    return low | {"exp_avg": filled(0, dtype, tail), "exp_avg_sq": filled(0, dtype, tail)}
