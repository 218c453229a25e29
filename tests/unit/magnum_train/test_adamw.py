"""AdamW in fewer bits: what it stores, what it rounds, and that its float32 is torch's."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from magnum_train import adamw
from magnum_train.adamw import SIGNED, UNSIGNED, AdamW, decode, encode, join, mixed, split, to_bfloat16

RECIPES = [
    (dtype, low_bits, moments)
    for dtype, low_bits in ((torch.float32, False), (torch.bfloat16, True), (torch.bfloat16, False))
    for moments in ("float32", "bf16", "int8")
]
SHAPES = [(17, 256), (8, 300), (2, 1024), (144,)]
"""Of whole vectors: what torch's own kernel does with the rest of one it rounds otherwise."""


def floats(bits: Tensor) -> Tensor:
    """float32 of bits that stand in an int64."""
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)


def every_bfloat16() -> Tensor:
    """All finite bfloat16, as float32."""
    values = floats(torch.arange(2**16) << 16)
    return values[values.isfinite()]


def test_a_split_float32_is_the_nearest_bfloat16_and_comes_back_bit_for_bit() -> None:
    """Every bfloat16, with what may stand behind it: nothing, the least, just below, at and above a tie, the most."""
    behind = torch.tensor([0, 1, 2, 0x1234, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF])
    values = floats(((torch.arange(2**16) << 16)[:, None] | behind).flatten())
    values = values[values.isfinite()]
    high, low = split(values)
    assert torch.equal(join(high, low).view(torch.int32), values.view(torch.int32))

    nearest = values.to(torch.bfloat16)  # torch's own: ties to even
    tie = (values.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(high.view(torch.int16)[~tie], nearest.view(torch.int16)[~tie])
    assert (high[tie].float().abs() > values[tie].abs()).all()
    assert int(tie.sum()) > 60_000
    assert high[values == values.max()].isinf().all()  # beyond the largest bfloat16, and restored all the same


def test_rounding_to_bfloat16_by_chance_is_right_on_average() -> None:
    """Over all 65,536 chances the mean is the value itself; what is a bfloat16 already stays what it is."""
    chances = torch.arange(2**16, dtype=torch.int32)
    for value in (1.0, 1.001, -1.003, 3.14159e-5, -2.7e20, 1.1754e-38, 1e-40):
        rounded = to_bfloat16(torch.full((2**16,), value), chances)
        exact = torch.tensor(value).double()
        assert rounded.double().mean() == pytest.approx(exact.item(), rel=1e-12)
        assert len(rounded.unique()) <= 2
    whole = every_bfloat16()
    assert torch.equal(to_bfloat16(whole, torch.full(whole.shape, 0xFFFF, dtype=torch.int32)).float(), whole)


@pytest.mark.parametrize("octaves", [SIGNED, UNSIGNED])
def test_eight_bit_codes_keep_an_eighth_of_each_value_and_are_right_on_average(octaves: int) -> None:
    generator = torch.Generator().manual_seed(octaves)
    size = torch.exp2(-40 * torch.rand(64, 256, generator=generator, dtype=torch.float64)).float()
    size *= torch.exp2(torch.randint(-70, 60, (64, 1), generator=generator).float())  # blocks of every magnitude
    size[0], size[1, 3:], size[2, 7] = 0.0, 0.0, 0.0
    sign = torch.where(torch.rand(size.shape, generator=generator) < 0.5, -1, 1) if octaves == SIGNED else 1
    value = size * sign
    top = torch.exp2(size.amax(1, keepdim=True).log2().ceil())
    spacing = torch.maximum(size / 8, top * 2.0 ** -(octaves + 2))

    total = torch.zeros(value.shape, dtype=torch.float64)
    chances = range(0, 2**16, 256)
    for chance in chances:
        code, exponent = encode(value, torch.full(value.shape, chance, dtype=torch.int32), octaves)
        back = decode(code, exponent, octaves)
        assert code.dtype == exponent.dtype == torch.uint8
        assert ((back - value).abs() <= spacing).all()
        assert torch.equal(back[value == 0], value[value == 0])
        if octaves == UNSIGNED:
            assert (back[value > 0] > 0).all()
        total += back
    mean = total / len(chances)
    raised = (size < top * 2.0 ** -(octaves + 2)) & (octaves == UNSIGNED)  # not to be 0
    assert ((mean - value.double()).abs() <= 2 / len(chances) * spacing)[~raised].all()


def test_codes_that_are_encoded_again_stay_what_they_are() -> None:
    for octaves, codes in ((SIGNED, torch.arange(256)), (UNSIGNED, torch.arange(256))):
        code, exponent = codes.to(torch.uint8)[None], torch.full((1, 1), 120, dtype=torch.uint8)
        value = decode(code, exponent, octaves)
        assert len(value.unique()) == (256 if octaves == UNSIGNED else 255)  # 0 has two signs
        for chance in (0, 0xFFFF):
            again, _ = encode(value, torch.full(value.shape, chance, dtype=torch.int32), octaves)
            assert torch.equal(decode(again, exponent, octaves), value)


def test_chance_is_even_and_every_bit_of_it_hangs_on_every_bit_of_the_place() -> None:
    count = 2**18
    bits = mixed(torch.arange(count, dtype=torch.int32) ^ 12345)
    assert len(bits.unique()) == count
    for bit in range(32):
        share = ((bits >> bit) & 1).double().mean().item()
        assert share == pytest.approx(0.5, abs=5 * 0.5 / count**0.5)
    for turned in range(31):  # of another place, half of all bits are others
        changed = bits ^ mixed((torch.arange(count, dtype=torch.int32) ^ (1 << turned)) ^ 12345)
        share = sum(((changed >> bit) & 1).double().mean().item() for bit in range(32)) / 32
        assert share == pytest.approx(0.5, abs=0.01)


def parameters_of(dtype: torch.dtype, seed: int = 0) -> list[torch.nn.Parameter]:
    """Parameters of several shapes, whose float32 are bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(shape, generator=generator).to(torch.bfloat16).to(dtype) for shape in SHAPES]
    return [torch.nn.Parameter(value) for value in values]


def gradients_at(step: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Gradients of a step, of very different sizes, zeros among them."""
    generator = torch.Generator().manual_seed(1000 + step)
    scales = [torch.exp2(-24 * torch.rand(shape, generator=generator)) for shape in SHAPES]
    drawn = [torch.randn(shape, generator=generator) * scale for shape, scale in zip(SHAPES, scales, strict=True)]
    return [torch.where(torch.rand(g.shape, generator=generator) < 0.1, 0.0, g).to(dtype) for g in drawn]


def made(dtype: torch.dtype, low_bits: bool, moments: str, **more: Any) -> tuple[list[torch.nn.Parameter], AdamW]:
    parameters = parameters_of(dtype)
    groups = [{"params": parameters[:2], "weight_decay": 0.1}, {"params": parameters[2:], "weight_decay": 0.0}]
    arguments: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8} | more
    return parameters, AdamW(groups, **arguments, low_bits=low_bits, moments=moments)


def take(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], step: int) -> None:
    """An update whose learning rate is another one each time."""
    for parameter, gradient in zip(parameters, gradients_at(step, parameters[0].dtype), strict=True):
        parameter.grad = gradient
    for group in optimizer.param_groups:
        group["lr"] = 1e-3 * (1 + step % 7) / 7
    optimizer.step()


def everything(optimizer: AdamW) -> list[Tensor]:
    """Copies of parameters and states."""
    found = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    return found + [value.clone() for state in optimizer.state.values() for value in state.values()]


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    """Whether tensors have the same bits."""

    def bits(tensor: Tensor) -> Tensor:
        return tensor.reshape(-1).view(torch.uint8)

    return all(torch.equal(bits(a), bits(b)) for a, b in zip(some, others, strict=True))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors are tiny here, and threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("betas", "updates"), [((0.9, 0.95), 1000), ((0.4, 0.999), 100)])
def test_a_thousand_updates_of_split_masters_are_those_of_float32_bit_for_bit(
    betas: tuple[float, float], updates: int
) -> None:
    """Against torch's own fused AdamW, given the same gradients and clipped by the same coefficient."""
    split_parameters, ours = made(torch.bfloat16, True, "float32", betas=betas)
    masters = parameters_of(torch.float32)
    groups = [{"params": masters[:2], "weight_decay": 0.1}, {"params": masters[2:], "weight_decay": 0.0}]
    torchs = torch.optim.AdamW(groups, lr=1e-3, betas=betas, eps=1e-8, fused=True)
    for step in range(updates):
        gradients = gradients_at(step, torch.bfloat16)
        ours.clip = torch.tensor(1 / (1 + step % 3), dtype=torch.float32)
        for parameter, master, gradient in zip(split_parameters, masters, gradients, strict=True):
            parameter.grad, master.grad = gradient, gradient.float() * ours.clip
        for optimizer in (ours, torchs):
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * (1 + step % 7) / 7
            optimizer.step()
        if step % 100 == 99:
            for parameter, master in zip(split_parameters, masters, strict=True):
                state, theirs = ours.state[parameter], torchs.state[master]
                restored = join(parameter.detach(), state["low"])
                assert same([restored], [master.detach()]), step
                assert same([state["exp_avg"], state["exp_avg_sq"]], [theirs["exp_avg"], theirs["exp_avg_sq"]])
    assert all(not torch.equal(p.float(), m) for p, m in zip(split_parameters, masters, strict=True))


@pytest.mark.parametrize(("dtype", "low_bits", "moments"), RECIPES)
def test_a_refused_update_touches_nothing(dtype: torch.dtype, low_bits: bool, moments: str) -> None:
    parameters, optimizer = made(dtype, low_bits, moments)
    take(optimizer, parameters, 0)
    before = everything(optimizer)
    optimizer.found_inf = torch.tensor(1.0)
    take(optimizer, parameters, 1)
    assert same(everything(optimizer), before)
    optimizer.found_inf = torch.tensor(0.0)
    take(optimizer, parameters, 2)
    assert not any(map(same, ([x] for x in everything(optimizer)[:4]), ([x] for x in before[:4])))
    untouched, other = made(dtype, low_bits, moments)
    take(other, untouched, 0)
    take(other, untouched, 2)
    assert same(everything(optimizer), everything(other))


@pytest.mark.parametrize(("dtype", "low_bits", "moments"), RECIPES)
def test_what_is_rounded_hangs_on_the_place_in_the_whole_and_not_on_who_holds_it(
    dtype: torch.dtype, low_bits: bool, moments: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces of any size, from any row on, there are the same bits; and anew for each update and parameter."""
    whole_parameters, whole = made(dtype, low_bits, moments)
    cut_parameters, cut = made(dtype, low_bits, moments)
    for step in range(3):
        monkeypatch.setattr(adamw, "PIECE", 2**16)
        take(whole, whole_parameters, step)
        monkeypatch.setattr(adamw, "PIECE", 700)
        take(cut, cut_parameters, step)
    assert same(everything(whole), everything(cut))


def test_a_state_is_loaded_as_it_was_saved() -> None:
    """The method that is inherited would round float32 moments to the parameter's bfloat16."""
    parameters, optimizer = made(torch.bfloat16, True, "int8")
    others, other = made(torch.bfloat16, True, "int8")
    take(optimizer, parameters, 0)
    other.load_state_dict(optimizer.state_dict())
    with torch.no_grad():
        for mine, theirs in zip(others, parameters, strict=True):
            mine.copy_(theirs)
    for one, its in ((optimizer, parameters), (other, others)):
        take(one, its, 1)
    assert same(everything(optimizer), everything(other))
    with pytest.raises(ValueError, match="expected step, exp_avg, exp_avg_sq"):
        made(torch.bfloat16, False, "float32")[1].load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(("dtype", "low_bits", "moments"), RECIPES)
def test_what_is_stored_takes_the_bytes_that_are_told(dtype: torch.dtype, low_bits: bool, moments: str) -> None:
    from magnum_train.config import OptimConfig
    from magnum_train.optim import stored_bytes

    matrix = torch.nn.Parameter(torch.zeros(8, 512, dtype=dtype))
    arguments: dict[str, Any] = {"lr": 1.0, "betas": (0.9, 0.95), "eps": 1e-8}
    optimizer = AdamW([{"params": [matrix]}], **arguments, low_bits=low_bits, moments=moments)
    states = [value for name, value in optimizer.state[matrix].items() if name != "step"]
    took = sum(tensor.numel() * tensor.element_size() for tensor in (matrix, *states)) / matrix.numel()
    precision = "float32" if dtype == torch.float32 else "bf16_split" if low_bits else "bf16_stochastic"
    assert took == stored_bytes(precision, OptimConfig(moments=moments))


def against_the_kernel() -> None:
    """Updates by Triton's kernel, in its interpreter, and by `adamw.update`: the same bits. In a process of its own."""
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    from magnum_train import adamw_triton

    def fused(_: object, x: Any, y: Any, z: Any) -> Any:
        """As a GPU has it; the interpreter itself rounds twice."""
        exact = x.data.astype(np.longdouble) * y.data.astype(np.longdouble) + z.data.astype(np.longdouble)
        return TensorHandle(exact.astype(np.float32), z.dtype.scalar)

    InterpreterBuilder.create_fma = fused
    for betas in ((0.9, 0.95), (0.4, 0.999)):
        for dtype, low_bits, moments in RECIPES:
            (ours, eager), (theirs, kernel) = (made(dtype, low_bits, moments, betas=betas) for _ in range(2))
            kernel._update = adamw_triton.update
            for step in range(3):
                for optimizer, parameters in ((eager, ours), (kernel, theirs)):
                    optimizer.clip = torch.tensor(0.5)
                    take(optimizer, parameters, step)
                assert same(everything(eager), everything(kernel)), (betas, dtype, low_bits, moments, step)
            before = everything(kernel)
            part, parameter = kernel._parts[0], theirs[0]
            adamw_triton.update(
                torch.ones(parameter.shape, dtype=dtype), part.stored(parameter.detach()), torch.ones(4),
                torch.ones(2, dtype=torch.int32), part.first, adamw.Constants(0.1, 0.95, 0.05, 1e-8), torch.tensor(1.0),
            )  # fmt: skip
            assert same(everything(kernel), before), "a refused update"
            print(betas, dtype, low_bits, moments)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed, not even to interpret")
def test_the_kernel_for_gpus_makes_the_same_bits_in_tritons_interpreter() -> None:
    code = f"import sys; sys.path[:0] = {sys.path!r}; import test_adamw; test_adamw.against_the_kernel()"
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    where = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=where, env=environment, capture_output=True, timeout=100)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, at itself
def test_compiled_updates_have_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow: compiles, for codes and for what has none, and at most once more for all further shapes."""
    from torch._dynamo.testing import CompileCounterWithBackend

    monkeypatch.setattr(sys.modules[__name__], "SHAPES", [(3, 1024), (40, 512), (17, 768), (144,)])
    parameters, eager = made(torch.bfloat16, True, "int8")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    others, by_compiled = made(torch.bfloat16, True, "int8")
    way = adamw.compiled(backend=counter)
    monkeypatch.setattr(by_compiled, "_update", lambda *arguments: way(*arguments[:-1]))
    with torch._inductor.config.patch(compile_threads=1):
        for step in range(3):
            take(eager, parameters, step)
            take(by_compiled, others, step)
            assert same(everything(eager), everything(by_compiled)), step
    assert counter.frame_count <= 3
