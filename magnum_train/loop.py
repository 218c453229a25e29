"""What happens at a step, and after it: update, judge, record, validate, answer, save, stop.

`loop` is the order of things. It ends when the run is complete, when somebody asked it to stop, or when a step went so
wrong that the run has to go back; `go_back` does that. Everything that `loop` needs is in a `Run`, built by `train.py`.
"""

import contextlib
import gc
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.profiler import profile

from data import PackedBatch
from data.chatml import encode_prompt
from data.loader import StepData
from data.prepared import Prepared
from magnum_train import checkpoint, config, distributed, guard, metrics, replicas
from magnum_train.batches import Batches
from magnum_train.chat import Prompt, reply_text
from magnum_train.checkpoint import TrainState
from magnum_train.config import GuardConfig, TrainConfig
from magnum_train.distributed import Ranks
from magnum_train.errors import CheckpointError, RunError
from magnum_train.flight import FlightRecorder
from magnum_train.fp8 import mfu_name
from magnum_train.optim import learning_rate
from magnum_train.parallelize import measured_dtypes
from magnum_train.run_folder import size_text, write
from magnum_train.saver import Saver
from magnum_train.signals import Stop
from magnum_train.step import StepResult, forward, losses_by_source, train_step
from model import Transformer
from model.flops import train_flops
from model.generate import generate

STEPPED_OVER = "stepped_over.json"
"""Steps that are left out since they went wrong once; also of a roll-back after which nothing has been saved yet."""


class Ending(Enum):
    """Why `loop` has ended."""

    COMPLETE = "the last step is done and saved"
    STOPPED = "somebody asked for it, or the time is up; the steps done are saved"
    ROLL_BACK = "a step went wrong, and the run is to go back"


@dataclass
class Run:
    """Everything that the loop works with. `state` changes at every step."""

    settings: TrainConfig
    ranks: Ranks
    terminal: metrics.Terminal
    run_dir: Path
    prepared: Prepared
    batches: Batches
    model: Transformer
    optimizer: torch.optim.Optimizer
    prompts: list[Prompt]
    state: TrainState
    saver: Saver
    recorder: FlightRecorder
    names: dict[int, tuple[str, ...]]
    """What the checkpoints of some steps are called, so that pruning spares them."""
    started: float
    """When the program began, by `time.monotonic`."""
    stop: Stop
    roll_backs: int = 0
    """Since a checkpoint beyond the step that went wrong."""
    gone_back: int = 0
    """How often in all, in this start."""
    last_wrong: int = 0
    """The step that the last roll-back was for."""
    told_to_stop: bool = False
    """Whether a signal has reached any rank."""
    last_read: float = 0.0
    """When the results of a step were last read, by `time.perf_counter`."""

    @property
    def overlaps(self) -> int:
        """How many steps the results may lie behind what the device has been given: one, where there is a device."""
        return int(self.ranks.device.type == "cuda")

    def __post_init__(self) -> None:
        self.skipped = metrics.Lines(self.run_dir / "skipped.jsonl")
        self.incidents = metrics.Lines(self.run_dir / "incidents.jsonl")

    @contextlib.contextmanager
    def recording(self) -> Iterator[metrics.Metrics]:
        """The run's record, cut back to the step it goes on from; closed whatever happens."""
        if self.ranks.is_main:
            metrics.cut_back(self.run_dir / "skipped.jsonl", self.state.step)
            metrics.cut_back(self.run_dir / "metrics.jsonl", self.state.step, self.state.owed)
        text, table = config.to_yaml(self.settings), config.flat(self.settings)
        record = metrics.Metrics(self.run_dir, text, table, is_main=self.ranks.is_main)
        try:
            yield record
        except BaseException:
            with contextlib.suppress(RunError):  # what ended the run is what is to be told
                record.close()
            raise
        record.close()

    def note(self, text: str, step: int | None = None) -> None:
        """Say something out of the ordinary, and write it down where no later start cuts it back."""
        step = self.state.step if step is None else step
        self.terminal.say(f"step {step}: {text}")
        if self.ranks.is_main:
            self.incidents.add({"time": time.time(), "step": step, "what": text})


def loop(run: Run, record: metrics.Metrics) -> Ending:
    """Step after step, until the last one is saved or something else ends it. All ranks end alike."""
    settings, total = run.settings, run.batches.total_steps
    peak = metrics.peak_flops(run.ranks.device, settings.metrics.peak_tflops)
    begun, first = time.perf_counter(), run.state.step
    last_save = time.monotonic()
    gc.collect()
    gc.disable()
    run.terminal.begin(first, total)
    try:
        run.told_to_stop = run.ranks.agree([run.stop.requested is not None])[0]
        if run.told_to_stop:  # while the run was being loaded
            return Ending.STOPPED
        if "validation" in run.state.owed:
            validate(run, record)
        if "samples" in run.state.owed:
            sample(run, record)
        waiting: list[Launched] = []  # at most one, and none on a CPU, which has nothing to do meanwhile
        for step in range(first + 1, total + 1):
            try:
                with profiled(run, step):
                    waiting.append(launch(run, step))
            except Exception:  # of any kind; raised again below
                # A stream that fails, such as a hub that went away, need not cost the steps since the last checkpoint.
                if run.batches.failed:
                    while waiting:
                        account_for(run, record, waiting.pop(0), peak)
                    if run.state.step > run.saver.newest:
                        save(run, record)
                    run.saver.wait()
                    run.terminal.say(f"step {run.state.step}: saved, since reading on failed")
                raise
            seconds = (time.perf_counter() - begun) / (step - first)
            while len(waiting) > run.overlaps:
                if account_for(run, record, waiting.pop(0), peak, seconds):
                    return Ending.ROLL_BACK
            stopping, minutes_are_up = agreed(run, last_save, seconds)
            validates = due(step, settings.validation.every_steps, total)
            samples = due(step, settings.samples.every_steps, total)
            names = run.names.get(step, ())
            regular = due(step, settings.checkpoint.every_steps, total) or minutes_are_up or stopping or step == total
            compares = settings.guard.compare_replicas_every_steps
            compared = due(step, compares, total) or (compares is not None and (regular or names))
            if regular or names or validates or samples or compared or step == first + 1:  # it is as of this step
                while waiting:
                    if account_for(run, record, waiting.pop(0), peak, seconds):
                        return Ending.ROLL_BACK
            if step == first + 1:
                run.terminal.say(f"measured: {measured_dtypes(run.model, run.optimizer)}")
                run.saver.reserve(run.model, run.optimizer)
            if stopping:  # what would keep the save waiting is made up for by the next start
                left_out = [("validation", validates), ("samples", samples)]
                run.state = replace(run.state, owed=[what for what, is_due in left_out if is_due])
            else:
                if validates:
                    validate(run, record)
                if samples:
                    sample(run, record)
            if compared:  # nothing odd is saved
                run.ranks.watch.phase("comparing replicas", step)
                replicas.compare(run.model, run.ranks, step)
            if regular or names:
                save(run, record, names, regular=regular)
                last_save = time.monotonic()
            tell(run, record)
            if stopping and (step < total or run.state.owed):
                finish_saving(run, record)
                return Ending.STOPPED
            if step % settings.train.collect_garbage_every_steps == 0:
                gc.collect()
        finish_saving(run, record)
        return Ending.COMPLETE
    finally:
        run.terminal.end()
        gc.enable()


def account_for(
    run: Run, record: metrics.Metrics, launched: "Launched", peak: float | None, seconds: float = 0.0
) -> bool:
    """Read a step's results and record them.

    Args:
        run: The run; the step is then one of those done.
        record: Gets the step's row.
        launched: The step.
        peak: Operations a second that the device can do; None where nobody knows.
        seconds: What a step takes, for the time left.

    Returns:
        Whether the run is to go back.

    Raises:
        RunError: Too many updates have been refused.
    """
    row, to_go_back = read(run, launched, peak)
    record.write(row)
    if not to_go_back:
        stop_if_refused_too_often(run)
        run.terminal.step(row, seconds * (run.batches.total_steps - launched.step))
    return to_go_back


def agreed(run: Run, last_save: float, step_seconds: float) -> tuple[bool, bool]:
    """What all ranks do next, after hearing each other: a signal may have reached one of them alone.

    Args:
        run: The run.
        last_save: When the last save of this start began, by `time.monotonic`; rank 0's counts.
        step_seconds: What a step takes, with what is between steps.

    Returns:
        Whether to save and end now, and whether to save since `checkpoint.every_minutes` have passed.

    Raises:
        RunError: A save has failed, here or on another rank; the same on all.
    """
    every, limit = run.settings.checkpoint.every_minutes, run.settings.train.max_minutes
    now, main, failure = time.monotonic(), run.ranks.is_main, run.saver.failure
    # One more step and its save must fit in before the limit.
    time_is_up = main and limit is not None and now + step_seconds + run.saver.seconds - run.started >= 60 * limit
    minutes_are_up = main and every is not None and now - last_save >= 60 * every
    run.told_to_stop, time_is_up, minutes_are_up, failed = run.ranks.agree(
        [run.stop.requested is not None, time_is_up, minutes_are_up, failure is not None]
    )
    if failed:
        own = None if failure is None else (failure.place, failure.found, failure.expected, failure.remedy)
        reasons = [reason for reason in run.ranks.gather(own) if reason is not None]
        run.saver.abandon()  # where it goes on, it can only wait for the others
        raise RunError(*reasons[0]) from failure
    return run.told_to_stop or time_is_up, minutes_are_up


def save(run: Run, record: metrics.Metrics, names: tuple[str, ...] = (), *, regular: bool = True) -> None:
    """Begin to save the steps done.

    Args:
        run: The run.
        record: Forced to disk before the checkpoint is visible.
        names: What the checkpoint is called.
        regular: Whether it is due for another reason than its name, so that it must be one to go on from.
    """
    step = run.state.step
    run.ranks.watch.phase("copying for the save", step, limited=False)  # waits for the save before this one
    record.draw()
    settled = None
    if run.ranks.is_main:
        ledger = run.batches.ledger(step, run.state.refused)
        settled = partial(settle, run, record, json.dumps(ledger.to_json(), indent=1))
    begin = partial(run.saver.begin, run.model, run.optimizer, run.state, before=settled)
    if names and run.settings.checkpoint.pinned_weights_only:
        begin(names=names, alone=True)
        if not regular:
            return
        names = ()
    begin(files=run.batches.saved(step), names=names)


def settle(run: Run, record: metrics.Metrics, ledger: str) -> None:
    """Have all records on disk, before the checkpoint that follows them becomes visible."""
    for lines in (record, run.skipped, run.incidents):
        lines.sync()
    write(run.run_dir / "ledger.json", ledger)  # a start that finds the run complete writes nothing


def finish_saving(run: Run, record: metrics.Metrics) -> None:
    """Wait until what was begun is visible, and say so."""
    run.ranks.watch.phase("waiting for the save", run.state.step, limited=False)
    run.saver.wait()
    tell(run, record)


def tell(run: Run, record: metrics.Metrics) -> None:
    """Record what has been saved since the last time."""
    for saved in run.saver.finished():
        record.write(
            {
                "step": saved.step,
                "save_seconds": saved.seconds,
                "save_stall_seconds": saved.stall_seconds,
                "save_bytes": saved.size,
            }
        )
        run.terminal.say(
            f"step {saved.step}: saved {saved.folder.name} ({size_text(saved.size)}) in {saved.seconds:.2f} s, "
            f"training waited {saved.stall_seconds:.2f} s"
        )
        for remark in saved.remarks:
            run.note(f"{saved.folder.name}: {remark}", saved.step)


def due(step: int, every: int | None, total: int) -> bool:
    """Whether something that happens every so many steps, and at the end, happens now."""
    return every is not None and (step % every == 0 or step == total)


@dataclass(frozen=True)
class Launched:
    """A step that the device has been given, and what the host knows of it. Its results may not be there yet."""

    step: int
    data: StepData
    lr: float
    limits: guard.Limits
    left_out: bool
    data_seconds: float
    result: StepResult
    begun: float
    """When the host turned to it, by `time.perf_counter`."""
    ready: torch.cuda.Event | None
    """Passed by the device when the results have reached the host; None on a CPU."""


def launch(run: Run, step: int) -> Launched:
    """Give the device a step, without waiting for it.

    The results of the step before may still be under way, so the limits go by those before that one; always, that a
    start which has read them decides alike.
    """
    settings, ranks, state = run.settings, run.ranks, run.state
    begin = time.perf_counter()
    ranks.watch.phase("data", step)
    data = run.batches.step(step - 1)
    batches = [on_device(batch, ranks.device) for batch in data.micro_batches]
    data_seconds = time.perf_counter() - begin
    lr = learning_rate(step, run.batches.total_steps, settings.optim)
    known = state.recent if state.step == step - 1 else with_newest(state, settings.guard)
    limits = guard.limits(known, settings.guard, len(data.rows) / settings.packs_per_step)
    left_out = step in state.stepped_over
    result = train_step(
        run.model, run.optimizer, watched(run, step, batches),
        weight_sum=data.weight_sum, n_sources=len(run.prepared.sources), lr=lr,
        max_grad_norm=settings.train.max_grad_norm,
        limits=guard.NO_LIMITS if settings.guard.spike == "warn" else limits, refuse=left_out, sharers=ranks.sequence,
    )  # fmt: skip
    if ranks.device.type != "cuda":
        return Launched(step, data, lr, limits, left_out, data_seconds, result, begin, None)
    on_host = StepResult(*(to_host(part) for part in result))  # type: ignore[arg-type]
    ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
    ready.record()
    return Launched(step, data, lr, limits, left_out, data_seconds, on_host, begin, ready)


def with_newest(state: TrainState, settings: GuardConfig) -> list[list[float]]:
    """Loss and gradient norm of the last applied steps, the newest among them."""
    if not state.newest:
        return state.recent
    loss, grad_norm = state.newest
    return guard.remembered(state.recent, loss, grad_norm, settings)


def to_host(part: torch.Tensor | list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
    """A copy in page-locked memory that the device makes when it gets there."""
    if isinstance(part, list):
        return [tensor.to("cpu", non_blocking=True) for tensor in part]
    return part.to("cpu", non_blocking=True)


def read(run: Run, launched: Launched, peak: float | None) -> tuple[dict[str, object], bool]:
    """Wait for a step's results, say what it gave and cost as a row of metrics.jsonl, and judge it.

    Returns:
        The row, and whether the run is to go back to its newest checkpoint.
    """
    settings, ranks, state = run.settings, run.ranks, run.state
    data, step, result, limits = launched.data, launched.step, launched.result, launched.limits
    if launched.ready is not None:
        launched.ready.synchronize()
    loss, grad_norm, applied = result.loss.item(), result.grad_norm.item(), bool(result.applied.item())
    now = time.perf_counter()
    seconds = now - max(launched.begun, run.last_read)  # steps overlap: from result to result
    run.last_read = now
    run.state = replace(
        state,
        step=step,
        refused=state.refused + [step] * (not applied),
        recent=with_newest(state, settings.guard),
        newest=[loss, grad_norm] if applied else [],
        owed=[],
    )
    flops = train_flops(settings.model.transformer(), data.lengths.tolist(), data.weighted_tokens)
    row: dict[str, object] = {
        "step": step,
        "epoch": data.epoch + 1,
        "loss": loss,
        "grad_norm": grad_norm,
        "lr": launched.lr,
        "tokens": data.tokens,
        "weighted_tokens": data.weighted_tokens,
        "documents": data.documents,
        "fill": data.fill,
        "step_seconds": seconds,
        "data_seconds": launched.data_seconds,
        "tokens_per_second": data.tokens / seconds,
        mfu_name(settings.parallel.fp8): flops / seconds / (peak * ranks.world_size) if peak else None,
        "peak_memory_gib": metrics.peak_memory_gib(ranks.device),
        "applied": applied,
        "loss_by_source": by_source(run, result.source_losses, data),
    }
    run.recorder.record(row, data, result.row_losses)
    wrong = "left out after a roll-back" if launched.left_out else guard.verdict(loss, grad_norm, limits)
    if not applied:
        refuse(run, data, loss, grad_norm, wrong or "above its limit")
    elif wrong is not None:
        run.note(f"{wrong}; the update was applied, as guard.spike={settings.guard.spike} asks")
    finite = math.isfinite(loss) and math.isfinite(grad_norm)
    action = settings.guard.spike if finite else settings.guard.nonfinite
    goes_back = not applied and not launched.left_out and action == "roll_back"
    if goes_back and not run.saver.newest:
        run.note("there is no checkpoint to go back to yet: the update was refused, and the run goes on")
    return row, goes_back and run.saver.newest > 0


def watched(run: Run, step: int, batches: list[PackedBatch]) -> Iterator[PackedBatch]:
    """A step's micro-batches; each that is begun is progress."""
    for batch in batches:
        run.ranks.watch.phase("train", step)
        yield batch


def on_device(batch: PackedBatch, device: torch.device) -> PackedBatch:
    """Copy a pack to the device; from page-locked memory, so that the host need not wait for the copy."""
    return batch.pin_memory().to(device) if device.type == "cuda" else batch


def by_source(run: Run, sums: torch.Tensor, data: StepData) -> dict[str, float]:
    """Mean loss of each source that has weight in this step or validation, by name."""
    pairs = zip(run.prepared.sources, sums.tolist(), data.source_weight_sums.tolist(), strict=True)
    return {name: total / weight for name, total, weight in pairs if weight > 0}


def refuse(run: Run, data: StepData, loss: float, grad_norm: float, why: str) -> None:
    """Write down the rows behind a refused update."""
    file, step = run.run_dir / "skipped.jsonl", run.state.step
    if run.ranks.is_main:
        packs = [[[run.prepared.sources[source], row] for source, row in pack.tolist()] for pack in data.rows]
        run.skipped.add({"step": step, "why": why, "loss": str(loss), "grad_norm": str(grad_norm), "packs": packs})
    run.note(f"loss {loss:.6g}, gradient norm {grad_norm:.6g}: {why}; update refused, its rows are in {file}")


def stop_if_refused_too_often(run: Run) -> None:
    """End the run when more updates have been refused than it may.

    Raises:
        RunError: If `train.max_skipped_steps` is passed.
    """
    refused = set(run.state.refused) - set(run.state.stepped_over)  # those have a limit of their own
    if len(refused) > run.settings.train.max_skipped_steps:
        raise RunError(
            "train.max_skipped_steps", f"{len(refused)} refused updates",
            f"at most {run.settings.train.max_skipped_steps}", f"Look at the rows in {run.run_dir / 'skipped.jsonl'}.",
        )  # fmt: skip


@torch.no_grad()
def validate(run: Run, record: metrics.Metrics) -> None:
    """Validation loss, whole and per source, over the same packs every time."""
    data, step = run.batches.validation(), run.state.step
    if not data.documents:
        return
    sums = torch.zeros(len(run.prepared.sources), dtype=torch.float64, device=run.ranks.device)
    for batch in data.micro_batches:
        run.ranks.watch.phase("validation", step)
        batch = on_device(batch, run.ranks.device)
        sums += losses_by_source(forward(run.model, batch), batch, len(run.prepared.sources))
    distributed.all_reduce_sum(sums)
    loss = sums.sum().item() / data.weight_sum
    split = by_source(run, sums, data)
    record.write({"step": step, "validation_loss": loss, "validation_loss_by_source": split})
    named = ", ".join(f"{name} {value:.4f}" for name, value in split.items())
    run.terminal.say(f"step {step}: validation loss {loss:.4f} ({named})")


# Lengths change with every token, and each would be compiled.
@torch.compiler.set_stance("force_eager")  # type: ignore[untyped-decorator, unused-ignore]
def sample(run: Run, record: metrics.Metrics) -> None:
    """Answer the fixed prompts; every rank runs the same forwards, and rank 0's tokens decide when to stop."""
    options, data, step = run.settings.samples, run.settings.data, run.state.step
    for number, prompt in enumerate(run.prompts):
        ids: list[int] = []
        prompt = replace(prompt, system=prompt.system or data.default_system)  # as in training
        messages = encode_prompt(prompt.messages(), run.prepared.tokenizer, data.encoding)
        # Each rank would stop at an end token of its own; a rank that differs must not leave the others waiting.
        for token in generate(
            run.model, messages, max_new_tokens=options.max_new_tokens, temperature=options.temperature,
            seed=run.settings.seed, vocab_size=run.prepared.tokenizer.vocab_size,
        ):  # fmt: skip
            run.ranks.watch.phase("samples", step)
            agreed = torch.tensor(token, device=run.ranks.device)
            dist.broadcast(agreed, src=0)
            ids.append(int(agreed))
            if ids[-1] in run.prepared.tokenizer.stop_ids:
                break
        text = reply_text(run.prepared.tokenizer, ids)
        record.write({"step": step, "sample": number, "prompt": prompt.text, "reply": text})


def go_back(run: Run) -> None:
    """Load the newest checkpoint that verifies, and mark the step that went wrong to be left out on the way.

    Raises:
        RunError: The run has gone back too often without getting anywhere.
    """
    bad, limit = run.state.step, run.settings.guard.max_roll_backs
    if run.saver.newest > run.last_wrong:
        run.roll_backs = 0
    if run.roll_backs >= limit:
        raise RunError(
            "guard.max_roll_backs", f"step {bad} went wrong after {run.roll_backs} roll-backs", f"at most {limit}",
            f"Look at {run.run_dir / 'incidents.jsonl'} and at the rows in {run.run_dir / 'skipped.jsonl'}.",
        )  # fmt: skip
    run.ranks.watch.phase("going back", bad, limited=False)
    run.saver.wait()
    run.gone_back, run.roll_backs, run.last_wrong = run.gone_back + 1, run.roll_backs + 1, bad
    digest = config.settings_digest(run.settings)
    found, passed = checkpoint.newest(run.run_dir, digest, run.ranks, f"roll back {run.gone_back}")
    for text in passed:
        run.note(text)
    if found is None:
        raise CheckpointError(str(run.run_dir / "checkpoints"), "nothing", "the checkpoints that were saved there")
    over = range(max(found.step, bad - run.settings.guard.step_over) + 1, bad + 1)
    left_out = sorted({*run.state.stepped_over, *over})
    if run.ranks.is_main:  # before anything else: whoever resumes from here leaves them out as well
        write(run.run_dir / STEPPED_OVER, json.dumps(left_out))
    run.note(f"going back to step {found.step}; left out on the way: {', '.join(map(str, over))}", bad)
    restore(run, found, f"roll back {run.gone_back}")
    run.state = replace(run.state, stepped_over=left_out)


def restore(run: Run, found: TrainState, occasion: str) -> None:
    """Load a checkpoint into a run, whose circumstances are today's.

    Args:
        run: The run; its state says what holds today.
        found: The checkpoint's state.
        occasion: Names this call among those of the run.
    """
    folder, now = checkpoint.path_of(run.run_dir, found.step), run.state
    checkpoint.load(folder, run.model, run.optimizer)
    run.ranks.together(f"restore batches, {occasion}", lambda: run.batches.restore(folder, found.step))
    checkpoint.restore_random_states(folder, found, run.settings.seed, run.ranks)
    for part in run.model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()  # some weights stay gathered after a forward, and those are the old ones
    run.saver.newest = found.step
    run.state = replace(
        found, choices=now.choices, total_steps=now.total_steps, saved_on=now.saved_on, settings=now.settings
    )


@contextlib.contextmanager
def profiled(run: Run, step: int) -> Iterator[None]:
    """Write a profiler trace of a chosen step, and on a GPU its memory snapshot, from rank 0."""
    if step not in run.settings.profile.steps or not run.ranks.is_main:
        yield
        return
    folder = run.run_dir / "profile"
    folder.mkdir(exist_ok=True)
    cuda = run.ranks.device.type == "cuda"
    if cuda:
        torch.cuda.memory._record_memory_history()
    with profile(profile_memory=True, record_shapes=True) as trace:
        yield
    trace.export_chrome_trace(str(folder / f"step-{step:08d}.trace.json.gz"))
    if cuda:
        torch.cuda.memory._dump_snapshot(str(folder / f"step-{step:08d}.memory.pickle"))  # type: ignore[no-untyped-call]
        torch.cuda.memory._record_memory_history(enabled=None)
    run.terminal.say(f"step {step}: profile in {folder}")
