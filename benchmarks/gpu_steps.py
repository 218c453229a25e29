"""What the GPU benchmark asks of whole steps: right, fast, in fp8, recomputing, deterministic, and saved.

As in `gpu_kernels.py`, rows are planned before anything is measured.
"""

import math
import re
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from gpu_bench import (
    FEWEST,
    NOT_REACHED,
    RUNNING,
    Bench,
    Floor,
    OptimizerSettings,
    Row,
    Setup,
    Trainee,
    admitted,
    against,
    attempt,
    blank,
    chosen,
    fastest_backend,
    fitting,
    guarded,
    interleave,
    predicted_bytes,
    settle,
    state_bytes,
)
from torch import Tensor
from torch.distributed.checkpoint._state_dict_stager import StateDictStager
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.profiler import ProfilerActivity, profile

from magnum_train.fp8 import check as check_fp8
from magnum_train.fp8 import mfu_name
from magnum_train.optim import stored_bytes
from model.flops import block_matmul_parameters, parameter_count, train_flops

# ---- the same numbers as in float32


def plan_agreement(bench: Bench) -> list[Row]:
    """Every kernel, every way of recomputation; compiled are the two that train, since each takes most of a minute."""
    names, _ = admitted(bench)
    first = next((name for name in names if name != "sdpa"), "sdpa")
    compiled = [(first, "lean", True), (first, "mlp", True)] if bench.cuda and first != "sdpa" else []
    plain = [(name, "lean", False) for name in names]
    plain += [(first, mode, False) for mode in ("none", "mlp", "full")]
    return [
        blank(attention=name, activation_checkpointing=mode, compiled=compiled_)
        for name, mode, compiled_ in compiled + plain
    ]


def measure_agreement(bench: Bench, rows: list[Row]) -> None:
    tokens, depth = (2048, 2) if bench.cuda else (128, 2)
    form = Setup("bf16_mixed", "float32", "none", tokens, tokens // 7, depth, "sdpa", compiled=False)

    def gradients(setup: Setup, dtype: torch.dtype) -> tuple[float, list[Tensor]]:
        trainee = Trainee(bench, setup, dtype)
        pack = trainee.pack.to(bench.device)
        loss = trainee.model(
            pack.tokens, pack.positions, pack.cu_seqlens, pack.max_seqlen, labels=pack.labels, weights=pack.weights,
            label_positions=pack.label_positions,
        )  # fmt: skip
        (loss.total / float(pack.weights.sum())).backward()
        grads = [cast(Any, parameter.grad).to_local() for parameter in trainee.model.parameters()]
        return loss.total.item(), grads

    with attempt(bench, *rows):
        bench.check()
        exact_loss, exact = gradients(form, torch.float32)
        bench.free()
        for row in rows:
            if row["not_measured"] != RUNNING:
                continue
            bench.check()
            torch._dynamo.reset()  # or the code of a block would be compiled more often than torch allows
            with guarded(bench, row):
                setup = replace(form, backend=row["attention"], mode=row["activation_checkpointing"],
                                compiled=row["compiled"])  # fmt: skip
                loss, found = gradients(setup, bench.dtype)
                squares = [float((a.float() - b).double().square().sum()) for a, b in zip(found, exact, strict=True)]
                whole = [float(b.double().square().sum()) for b in exact]
                row["loss_error"] = abs(loss - exact_loss) / exact_loss
                row["gradient_error"] = math.sqrt(sum(squares) / sum(whole))
                row["worst_gradient_error"] = max(math.sqrt(a / b) for a, b in zip(squares, whole, strict=True) if b)
                row["right"] = row["loss_error"] < 2e-3 and row["gradient_error"] < 5e-2
                row["not_measured"] = None
            found = []
            bench.free()
    bench.free()


# ---- the whole step


def step_setups(bench: Bench) -> list[Setup]:
    """Ways to train the whole network on one card, the most important first; its layers are as many as fit."""
    usual, long = bench.grid.packs
    wanted = [
        ("bf16_split", "lean", usual, usual),
        ("bf16_split", "lean", usual, bench.grid.short),
        ("bf16_split", "mlp", long, long),
        ("bf16_split", "auto", usual, usual),
        ("bf16_stochastic", "lean", usual, usual),
        ("bf16_stochastic", "mlp", long, long),
        ("bf16_split", "auto", long, long),
        ("bf16_stochastic", "auto", long, long),
    ]
    setups: list[Setup] = []
    for precision, mode, tokens, document in wanted if bench.cuda else wanted[:3]:
        form = Setup(precision, "int8", mode, tokens, document, 0, "to be measured", compiled=bench.cuda)
        if mode == "auto":  # at the depth of the row whose mode is set, so that the two can be compared
            form = replace(form, mode="lean" if tokens == usual else "mlp")
            setup = chosen(bench, fitting(bench, form))
        else:
            setup = fitting(bench, form)
        if setup not in setups:
            setups.append(setup)
    return setups


def plan_step(bench: Bench) -> list[Row]:
    return [blank(**setup.columns()) for setup in step_setups(bench)]


def measure_step(bench: Bench, rows: list[Row]) -> None:
    trainee: Trainee | None = None
    longest = 0.0
    for row, planned in zip(rows, step_setups(bench), strict=True):
        if row["not_measured"] != NOT_REACHED:
            continue
        setup, begun = replace(planned, layers=row["layers"]), time.monotonic()
        with attempt(bench, row):
            bench.check(longest)
            backend = fastest_backend(bench, setup.tokens, setup.document)
            setup = replace(setup, backend=backend)
            same = {"document": setup.document, "backend": backend}
            if trainee is None or replace(trainee.setup, **same) != setup:
                trainee = None
                bench.free()
                torch._dynamo.reset()
                try:
                    trainee = Trainee(bench, setup)
                    trainee.step()
                except torch.cuda.OutOfMemoryError as error:
                    remark = f"{setup.layers} layers: {str(error).splitlines()[0][:160]}"
                    trainee = None
                if trainee is None:  # outside of the handler, whose traceback holds the memory
                    bench.free()
                    row["remark"] = remark
                    setup = replace(setup, layers=max(1, setup.layers * 9 // 10))
                    trainee = Trainee(bench, setup)
            trainee.use(setup.document, backend)
            row |= trainee.setup.columns()
            time_steps(bench, row, trainee)
        if row["not_measured"] and row["not_measured"] != NOT_REACHED:
            trainee = None  # weights may be left gathered, and gradients half made
        longest = max(longest, time.monotonic() - begun)
        bench.free()


def time_steps(bench: Bench, row: Row, trainee: Trainee) -> None:
    """Time steps of one model, and say where the time went."""
    bench.check()
    if bench.cuda:
        torch.cuda.reset_peak_memory_stats(bench.device)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for _ in range(bench.warmup):
        trainee.run()
    samples = []
    while len(samples) < bench.rounds:
        if len(samples) < FEWEST:
            bench.check()
        elif time.monotonic() > bench.deadline:
            break
        samples.append(trainee.run())
    trainee.verify()
    settle(row, samples)
    row["peak_gib"] = bench.peak_gib()
    row["predicted_gib"] = predicted_bytes(bench, trainee.setup) / 2**30
    row["loss"], row["grad_norm"] = trainee.result.loss.item(), trainee.result.grad_norm.item()
    row["graphs_since_the_build"] = torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs
    utilisation(bench, row, trainee)
    row["by_part"] = by_part(bench, row, trainee)
    row["waits_for_the_device"] = waits(bench, trainee)


def utilisation(bench: Bench, row: Row, trainee: Trainee) -> None:
    """Tokens a second, and operations over the peak by both counts."""
    config, pack, seconds = trainee.config, trainee.pack, row["ms"] / 1e3
    flops = train_flops(config, pack.lengths, len(pack.label_positions))
    row["flops"], row["tokens_per_second"] = flops, len(pack.tokens) / seconds
    if bench.peak:
        tokens = len(pack.tokens)
        whole = 6 * (block_matmul_parameters(config) + config.vocab_size * config.dim) * tokens
        whole += 12 * config.n_layers * config.n_heads * config.head_dim * tokens**2
        row[mfu_name(trainee.setup.fp8)] = flops / seconds / bench.peak
        if trainee.setup.fp8 == "none":
            row["mfu_of_whole_packs"] = whole / seconds / bench.peak


KERNELS = {
    "attention": r"^(?!triton_).*(flash|fmha|sdpa|attention)",
    "norm of gradients": r"lpnorm|foreach_norm",
}
"""Kernels and operators by their names; what is named nowhere here is told apart by when it ran."""


def by_part(bench: Bench, row: Row, trainee: Trainee) -> list[Row]:
    """Seconds of a step by part, each beside its floor.

    Head and update are told by marks on the device's stream in the timed steps. Attention runs inside of compiled
    blocks, so its kernels are added up by name in one more step under the profiler, as is the gradients' norm.
    """
    activity = ProfilerActivity.CUDA if bench.cuda else ProfilerActivity.CPU
    with profile(activities=[activity], acc_events=True) as profiler:
        trainee.step()
        bench.synchronize()
    kernels: dict[str, float] = {}
    for event in profiler.key_averages():
        spent = event.self_device_time_total if bench.cuda else event.self_cpu_time_total
        kernels[event.key] = kernels.get(event.key, 0.0) + spent / 1e3
    longest = sorted(kernels.items(), key=lambda kernel: -kernel[1])
    row["kernels_ms"] = dict(longest[:60])

    def named(what: str) -> float:
        found = (ms for name, ms in kernels.items() if re.search(KERNELS[what], name, re.IGNORECASE))
        return sum(found)

    config, pack = trainee.config, trainee.pack
    attention, norm = named("attention"), named("norm of gradients")
    squares = sum(length * length for length in pack.lengths)
    labels, tokens = len(pack.label_positions), len(pack.tokens)
    size = trainee.model.output.weight.dtype.itemsize
    moved = (2 * state_bytes(trainee.setup, config)) + size * parameter_count(config)
    floors = {
        "blocks": Floor.of(bench, flops=6 * block_matmul_parameters(config) * tokens),
        "attention": Floor.of(bench, flops=6 * config.n_layers * config.n_heads * config.head_dim * squares),
        "head": Floor.of(bench, flops=6 * config.vocab_size * config.dim * labels),
        "optimizer": Floor.of(bench, moved=moved),
    }
    found = {
        "blocks": row["forward_ms"] + row["backward_ms"] - attention - norm,
        "attention": attention,
        "head": row["head_ms"],
        "optimizer": row["update_ms"] + norm,
    }
    parts = []
    for name, ms in found.items():
        part = {"part": name, "ms": ms, "not_measured": None}
        if not ms:
            part["not_measured"] = "the profiler named no kernel of it"
        against(part, floors[name])
        parts.append(part)
    whole = sum(floor.seconds for floor in floors.values() if floor) * 1e3
    if all(floors.values()):
        row["floor_ms"], row["gap"], row["floor_by"] = whole, row["ms"] / whole, "the parts' floors together"
    return parts


def waits(bench: Bench, trainee: Trainee) -> int | None:
    """How often a step makes the host wait for the device, as torch counts it; None on a CPU."""
    if not bench.cuda:
        return None
    bench.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainee.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


# ---- steps of a smaller network, in turn


def reduced(bench: Bench, setups: list[Setup], depth: int) -> list[Setup]:
    """The setups with as many layers, at most so many, as let all of them be in memory at once."""
    if not bench.cuda:
        return [replace(setup, layers=2) for setup in setups]
    room = 0.85 * torch.cuda.get_device_properties(bench.device).total_memory
    for layers in range(min(depth, bench.grid.config.n_layers), 0, -1):
        whole = [replace(setup, layers=layers) for setup in setups]
        states = [state_bytes(setup, replace(bench.grid.config, n_layers=layers)) for setup in whole]
        working = max(predicted_bytes(bench, setup) - state for setup, state in zip(whole, states, strict=True))
        if sum(states) + working <= room:
            return whole
    return [replace(setup, layers=1) for setup in setups]


def in_turn(bench: Bench, rows: list[Row], setups: list[Setup]) -> None:
    """Time steps of several ways to train, round by round, all of them in memory."""
    waiting = [(row, setup) for row, setup in zip(rows, setups, strict=True) if row["not_measured"] == NOT_REACHED]
    if waiting:
        with attempt(bench, *(row for row, _ in waiting)):
            bench.check()
            _in_turn(bench, waiting)
        bench.free()


def _in_turn(bench: Bench, waiting: list[tuple[Row, Setup]]) -> None:
    backend = fastest_backend(bench, waiting[0][1].tokens, waiting[0][1].document)
    torch._dynamo.reset()
    trainees: list[tuple[Row, Trainee]] = []
    for row, setup in waiting:
        bench.check()
        setup = replace(setup, backend=backend)
        row |= setup.columns()
        with guarded(bench, row):
            check_fp8(setup.fp8, bench.grid.config, setup.tokens, bench.device, bench.dtype)
            trainee = Trainee(bench, setup)
            trainee.step()
            trainees.append((row, trainee))
    interleave(bench, [(row, trainee.run) for row, trainee in trainees])
    for row, trainee in trainees:
        if row["not_measured"] is None:
            trainee.verify()
            row["loss"], row["grad_norm"] = trainee.result.loss.item(), trainee.result.grad_norm.item()
            utilisation(bench, row, trainee)


def fp8_setups(bench: Bench) -> list[Setup]:
    usual = bench.grid.packs[0]
    form = Setup("bf16_split", "int8", "lean", usual, usual, 0, "to be measured", compiled=bench.cuda)
    kinds = [replace(form, fp8=recipe) for recipe in ("none", "tensorwise", "rowwise")]
    return [*reduced(bench, kinds, 8), fitting(bench, replace(form, fp8="tensorwise"))]


def plan_fp8(bench: Bench) -> list[Row]:
    rows = [blank(**setup.columns(), in_turn=place < 3) for place, setup in enumerate(fp8_setups(bench))]
    if not bench.cuda:
        for row in rows:
            row["not_measured"] = "no CUDA device"
    return rows


def measure_fp8(bench: Bench, rows: list[Row]) -> None:
    setups = fp8_setups(bench)
    in_turn(bench, rows[:3], setups[:3])
    exact = rows[0]
    for row in rows[1:3]:
        if row["not_measured"] is None and exact["not_measured"] is None:
            row["speed_up"] = exact["ms"] / row["ms"]
            row["loss_differs"] = row["loss"] / exact["loss"] - 1
            row["norm_differs"] = row["grad_norm"] / exact["grad_norm"] - 1
    whole = rows[3]
    if whole["not_measured"] == NOT_REACHED:
        with attempt(bench, whole):
            bench.check()
            setup = replace(setups[3], backend=fastest_backend(bench, setups[3].tokens, setups[3].document))
            check_fp8(setup.fp8, bench.grid.config, setup.tokens, bench.device, bench.dtype)
            torch._dynamo.reset()
            trainee = Trainee(bench, setup)
            whole |= setup.columns()
            time_steps(bench, whole, trainee)
            del trainee
        bench.free()


# ---- what recomputation costs and saves


def recompute_setups(bench: Bench) -> list[Setup]:
    usual = bench.grid.packs[0]
    form = Setup("bf16_split", "int8", "lean", usual, usual, 0, "to be measured", compiled=bench.cuda)
    wanted = [("lean", True), ("mlp", True), ("full", True), ("none", True), ("lean", False), ("none", False)]
    return [fitting(bench, replace(form, mode=mode, compiled=compiled), 8) for mode, compiled in wanted
            if bench.cuda or not compiled]  # fmt: skip


def plan_recompute(bench: Bench) -> list[Row]:
    return [blank(**setup.columns()) for setup in recompute_setups(bench)]


def measure_recompute(bench: Bench, rows: list[Row]) -> None:
    for row, planned in zip(rows, recompute_setups(bench), strict=True):
        if row["not_measured"] != NOT_REACHED:
            continue
        with attempt(bench, row):
            bench.check()
            setup = replace(planned, backend=fastest_backend(bench, planned.tokens, planned.document))
            torch._dynamo.reset()
            trainee = Trainee(bench, setup)
            row |= setup.columns()
            time_steps(bench, row, trainee)
            del trainee
        bench.free()


# ---- what deterministic kernels cost


def plan_deterministic(bench: Bench) -> list[Row]:
    usual = bench.grid.packs[0]
    kinds = ("free, the fastest attention", "free, deterministic's attention", "deterministic")
    return [blank(what=what, pack_tokens=usual, document_length=bench.grid.short) for what in kinds]


def measure_deterministic(bench: Bench, rows: list[Row]) -> None:
    """Steps with and without; and whether two backwards give the same bits.

    cuBLAS asks for CUBLAS_WORKSPACE_CONFIG, which gpu.py sets to what Hopper's default comes to (32 MiB).
    """
    usual = bench.grid.packs[0]
    waiting = [row for row in rows if row["not_measured"] == NOT_REACHED]
    if not waiting:
        return
    form = Setup("bf16_split", "int8", "lean", usual, bench.grid.short, 0, "", compiled=bench.cuda)
    with attempt(bench, *waiting):
        bench.check()
        try:
            _measure_deterministic(bench, rows, form)
        finally:
            torch.use_deterministic_algorithms(False)
    bench.free()


def _measure_deterministic(bench: Bench, rows: list[Row], form: Setup) -> None:
    fastest = fastest_backend(bench, form.tokens, form.document)
    torch.use_deterministic_algorithms(True)
    names, _ = admitted(bench)
    same = fastest if fastest in names else next((name for name in names if name != "sdpa"), "sdpa")
    setups = reduced(bench, [replace(form, backend=name) for name in (fastest, same, same)], 4)
    torch._dynamo.reset()
    runs: list[tuple[Row, Callable[[], dict[str, float]]]] = []
    trainees = []
    for row, setup, on in zip(rows, setups, (False, False, True), strict=True):
        torch.use_deterministic_algorithms(on)
        trainee = Trainee(bench, setup)
        row |= setup.columns() | {"deterministic": on}
        trainees.append((row, trainee, on))
        runs.append((row, partial(_with_determinism, on, trainee)))
    interleave(bench, runs)
    for row, trainee, on in trainees:
        if row["not_measured"] is None:
            torch.use_deterministic_algorithms(on)
            norms = [trainee.step().grad_norm.item() for _ in range(5)]
            row["same_bits"] = len(set(norms)) == 1
            utilisation(bench, row, trainee)


def _with_determinism(on: bool, trainee: Trainee) -> dict[str, float]:
    torch.use_deterministic_algorithms(on)
    return trainee.run()


# ---- what a save stalls


def plan_save(bench: Bench) -> list[Row]:
    return [blank(precision="bf16_mixed", moments="float32"), blank(precision="bf16_split", moments="int8")]


def measure_save(bench: Bench, rows: list[Row]) -> None:
    """The copy that training waits for, as `Saver` makes it: into page-locked memory that is kept from save to save.

    One layer with embedding and head has about an eighth of the 12B's parameters: a rank's share of eight.
    """
    for row in rows:
        if row["not_measured"] != NOT_REACHED:
            continue
        with attempt(bench, row):
            bench.check()
            setup = Setup(row["precision"], row["moments"], "none", bench.grid.packs[0], bench.grid.packs[0], 1,
                          admitted(bench)[0][0], compiled=False)  # fmt: skip
            trainee = Trainee(bench, setup)
            for parameter in trainee.model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            trainee.optimizer.step()  # without it there are no moments
            trainee.optimizer.zero_grad()
            stager = StateDictStager(pin_memory=bench.cuda, share_memory=False)
            model, optimizer = get_state_dict(trainee.model, trainee.optimizer)
            shards = {"weights": {"model": model}, "optimizer": {"optimizer": optimizer}}
            # Optimizer state of float32 AdamW is two float32 moments; counts and learning rates are a few bytes.
            size = parameter_count(trainee.config) * stored_bytes(
                row["precision"], cast(Any, OptimizerSettings(moments=row["moments"]))
            )

            def copy(stager: StateDictStager = stager, shards: Any = shards) -> None:
                stager.stage(shards, non_blocking=bench.cuda)
                bench.synchronize()

            begin = time.perf_counter()
            copy()
            row["first_ms"] = (time.perf_counter() - begin) * 1e3
            settle(row, [{"copy": bench.timed(copy)} for _ in range(FEWEST)])
            row["gigabytes"], row["gb_per_second"] = size / 1e9, size / (row["ms"] / 1e3) / 1e9
            if rate := bench.ceilings.get("to_host"):
                against(row, Floor(size / rate, f"{size / 1e9:.4g} GB at {rate / 1e9:,.0f} GB/s to the host, measured"))
            del trainee, stager, shards, model, optimizer, copy
        bench.free()
