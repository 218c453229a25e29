"""Parameters and moments of fewer bits: the same on any number of ranks, saved, loaded and gone on from."""

import contextlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from data.prepared import open_prepared
from magnum_train import checkpoint, distributed, step, train
from magnum_train.adamw import AdamW
from magnum_train.config import compose
from magnum_train.metrics import Terminal
from magnum_train.prepare import prepare_data
from magnum_train.weights import find
from ranks import run_ranks, whole
from tiny_runs import overrides, run_until, series

RECIPES = [("bf16_split", "float32"), ("bf16_split", "int8"), ("bf16_stochastic", "bf16"), ("bf16_mixed", "int8")]


def everything(model_parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Parameters and states, whole."""
    states = [value for p in model_parameters for value in optimizer.state[p].values()]
    return [whole(tensor) for tensor in (*model_parameters, *states)]


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    """Whether tensors have the same bits."""
    return len(some) == len(others) and all(
        a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
        for a, b in zip(some, others, strict=True)
    )


def updated(precision: str, moments: str) -> list[Tensor]:
    """Parameters of odd shapes and their states after three updates, by gradients that are the same everywhere."""
    with distributed.start(timeout_seconds=60, replicate=1, threads=1, deterministic=False) as ranks:
        generator = torch.Generator().manual_seed(3)
        dtype = torch.float32 if precision == "bf16_mixed" else torch.bfloat16

        def drawn(shape: tuple[int, ...]) -> DTensor:
            """As the model's parameters lie: whole over copies, by rows within one."""
            full = torch.randn(shape, generator=generator).to(dtype)
            return distribute_tensor(full, ranks.mesh, [Replicate(), Shard(0)], src_data_rank=None)

        shapes = [(37, 512), (2, 300), (7, 40), (5,)]
        parameters = [torch.nn.Parameter(drawn(shape)) for shape in shapes]
        optimizer = AdamW(
            [{"params": parameters}], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1,
            low_bits=precision == "bf16_split", moments=moments,
        )  # fmt: skip
        for _ in range(3):
            for parameter, shape in zip(parameters, shapes, strict=True):
                parameter.grad = drawn(shape)
            optimizer.clip = torch.tensor(0.3)
            optimizer.step()
        return everything(parameters, optimizer)


@pytest.mark.parametrize(("precision", "moments"), RECIPES)
def test_an_update_has_the_same_bits_on_any_number_of_ranks(precision: str, moments: str) -> None:
    """Also where a rank has more rows than another, or none."""
    [alone] = run_ranks(updated, 1, precision, moments)
    for found in run_ranks(updated, 3, precision, moments):
        assert equal(found, alone)


def loaded(line: list[str]) -> list[Tensor]:
    """What a run has after its newest checkpoint is loaded."""
    settings = compose(line)
    with distributed.start(timeout_seconds=60, replicate=1, threads=1, deterministic=False) as ranks:
        folder = ranks.once("prepare", lambda: str(prepare_data(settings, Terminal(is_main=False)).folder))
        recorded = checkpoint.newest(Path(str(settings.run_dir)), "", ranks, "in the test")[0]
        assert recorded is not None
        run = train.assemble(settings, open_prepared(folder), recorded, ranks, Terminal(is_main=False))
        assert run is not None
        with contextlib.closing(run.batches):
            return everything(list(run.model.parameters()), run.optimizer)


@pytest.mark.parametrize(("precision", "moments"), [("bf16_split", "int8"), ("bf16_stochastic", "bf16")])
def test_a_resumed_run_equals_the_undisturbed_one_and_moves_to_other_numbers_of_ranks(
    precision: str, moments: str, tmp_path: Path
) -> None:
    line = overrides(
        tmp_path, f"precision={precision}", f"optim.moments={moments}", "train.max_steps=8", "checkpoint.every_steps=3",
        "validation.every_steps=null", "checkpoint.keep_best=0", "train.tokens_per_step=1536",
    )  # fmt: skip
    run_ranks(run_until, 2, [*line, f"run_dir={tmp_path}/whole"], None)
    cut = [*line, f"run_dir={tmp_path}/cut"]
    run_ranks(run_until, 2, cut, 5)
    assert equal(run_ranks(loaded, 1, cut)[0], run_ranks(loaded, 3, cut)[0])  # saved by two
    run_ranks(run_until, 2, cut, None)
    assert series(tmp_path / "cut") == series(tmp_path / "whole")

    moved = [*line, f"run_dir={tmp_path}/moved"]
    run_ranks(run_until, 1, moved, 4)
    run_ranks(run_until, 2, moved, 7)
    run_ranks(run_until, 1, moved, None)
    there, here = series(tmp_path / "whole"), series(tmp_path / "moved")
    assert [step for step, *_ in here] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [loss for _, loss, _ in here] == pytest.approx([loss for _, loss, _ in there], rel=1e-3)

    with find(f"{tmp_path}/whole", "weights") as weights:
        assert weights.dtype == torch.bfloat16
        norm = weights.read("norm.weight", torch.float32)
        assert torch.equal(norm, norm.to(torch.bfloat16).float())
    [said] = run_ranks(resume_error, 1, [*cut, "optim.moments=float32", "precision=bf16_mixed"])
    assert f"optim.moments was '{moments}', is now 'float32'" in said
    assert f"precision was '{precision}', is now 'bf16_mixed'" in said


def resume_error(line: list[str]) -> str:
    try:
        train.train(compose(line))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("precision", ["bf16_split", "bf16_stochastic"])
def test_a_nan_on_one_rank_leaves_everything_as_it_was_on_all(precision: str, tmp_path: Path) -> None:
    from test_refused import poisoned_step

    line = overrides(tmp_path, f"precision={precision}", "optim.moments=int8", "optim.weight_decay=0.1")
    for same, good, bad in run_ranks(poisoned_step, 2, line):
        assert same
        assert (good["applied"], bad["applied"]) == (True, False)


def bfloat16_norm(line: list[str]) -> tuple[float, float]:
    """The norm of a step's gradients as it is told, and by adding up all of them in float64."""
    settings = compose(line)
    with distributed.start(timeout_seconds=60, replicate=1, threads=1, deterministic=False) as ranks:
        folder = ranks.once("prepare", lambda: str(prepare_data(settings, Terminal(is_main=False)).folder))
        run = train.assemble(settings, open_prepared(folder), None, ranks, Terminal(is_main=False))
        assert run is not None
        gradients: list[Tensor] = []
        real = run.optimizer.zero_grad

        def kept(*_: Any) -> None:
            gradients.extend(whole(p.grad) for p in run.model.parameters() if p.grad is not None)
            real()

        run.optimizer.zero_grad = kept  # type: ignore[method-assign]
        with contextlib.closing(run.batches):
            data = run.batches.step(0)
            result = step.train_step(
                run.model, run.optimizer, data.micro_batches, weight_sum=data.weight_sum, n_sources=1, lr=1e-3,
                max_grad_norm=1.0,
            )  # fmt: skip
        assert {gradient.dtype for gradient in gradients} == {torch.bfloat16}
        return result.grad_norm.item(), sum(g.double().square().sum().item() for g in gradients) ** 0.5


def test_the_norm_of_bfloat16_gradients_is_not_added_up_in_bfloat16(tmp_path: Path) -> None:
    for told, exact in run_ranks(bfloat16_norm, 2, overrides(tmp_path, "precision=bf16_split")):
        assert told == pytest.approx(exact, rel=1e-6)


def test_somebody_elses_optimizer_trains_refuses_and_resumes(tmp_path: Path) -> None:
    from test_refused import poisoned_step

    line = overrides(
        tmp_path, "optim.name=torch.optim.SGD", "+optim.options.momentum=0.9", "optim.lr=1e-2", "train.max_steps=4",
        "checkpoint.every_steps=2", "validation.every_steps=null",
    )  # fmt: skip
    for same, good, bad in run_ranks(poisoned_step, 2, [*line, f"run_dir={tmp_path}/refused"]):
        assert same
        assert (good["applied"], bad["applied"]) == (True, False)
    run_ranks(run_until, 2, [*line, f"run_dir={tmp_path}/whole"], None)
    run_ranks(run_until, 2, line, 3)
    run_ranks(run_until, 2, line, None)
    assert series(tmp_path / "run") == series(tmp_path / "whole")
    [said] = run_ranks(resume_error, 1, [*line, "optim.options.momentum=0.8"])
    assert "optim.options.momentum was 0.9, is now 0.8" in said


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_torchaos_optimizer_trains_and_resumes(tmp_path: Path) -> None:
    line = overrides(
        tmp_path,
        "optim.name=adamw8bit",
        "train.max_steps=4",
        "checkpoint.every_steps=2",
        "validation.every_steps=null",
        "checkpoint.asynchronous=false",  # torchao's states cannot be copied to page-locked memory
    )
    run_ranks(run_until, 2, [*line, f"run_dir={tmp_path}/whole"], None)
    run_ranks(run_until, 2, line, 3)
    run_ranks(run_until, 2, line, None)
    assert [step for step, *_ in series(tmp_path / "whole")] == [1, 2, 3, 4]
    assert series(tmp_path / "run") == series(tmp_path / "whole")
