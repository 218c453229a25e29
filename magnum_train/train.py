"""A run's table of contents: compose, build, loop.

    torchrun --nproc-per-node 8 -m magnum_train.train experiment=magnum_v2_12b

Read `train` for the order of things and `loop` for what happens at a step.
"""

import contextlib
import gc
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import profile

from data import PackedBatch, Tokenizer
from data.chatml import encode_prompt
from data.loader import StepData
from data.prepared import Prepared, open_prepared
from magnum_train import checkpoint, config, distributed, metrics
from magnum_train.batches import Batches
from magnum_train.chat import Prompt, read_prompts, reply_text
from magnum_train.checkpoint import TrainState
from magnum_train.config import ModelConfig, TrainConfig
from magnum_train.distributed import HostError, Ranks
from magnum_train.embeddings import mend, summary
from magnum_train.environment import environment
from magnum_train.errors import CheckpointError, ConfigError, RunError
from magnum_train.export import export_newest
from magnum_train.optim import build_optimizer, learning_rate
from magnum_train.parallelize import build, measured_dtypes, name_of
from magnum_train.prepare import prepare_data
from magnum_train.step import forward, losses_by_source, train_step
from magnum_train.weights import ORIGIN, Weights, architecture, find, origin_text
from model import Transformer
from model.attention import choose_backend
from model.flops import parameter_count, train_flops
from model.generate import generate


def train(settings: TrainConfig) -> None:
    """Train as configured, or go on where an earlier start of the same run stopped."""
    with distributed.start(
        timeout_seconds=settings.distributed.timeout_seconds,
        replicate=settings.parallel.replicate,
        threads=settings.train.threads,
        deterministic=settings.train.deterministic,
    ) as ranks:
        terminal = metrics.Terminal(is_main=ranks.is_main)
        newest = int(ranks.once("newest", lambda: str(newest_step(settings))))
        recorded = recorded_state(settings, newest)
        known = recorded.data_key if recorded else None
        start = starting_weights(settings, ranks) if recorded is None else None
        asked, settings = settings, replace(settings, model=network(settings, start, resumed=recorded is not None))
        ranks.once("run_dir", lambda: check_run_dir(settings, newest))
        beside = start.vocabulary if start else None
        folder = ranks.once(
            "prepare", lambda: str(prepare_data(settings, terminal, known, beside).folder), per_host=True
        )
        prepared = open_prepared(folder)
        first = ranks.once("prepared key", lambda: prepared.key)
        if prepared.key != first:
            raise HostError(folder, f"prepared data {prepared.key}", f"{first}, as on rank 0's host")
        if start is not None:  # its vocabulary may have to grow
            settings = replace(settings, model=network(asked, start, prepared.tokenizer))
        run = assemble(settings, prepared, recorded, ranks, terminal, start)
        if run is not None:
            with contextlib.closing(run.batches), run.recording() as record:
                loop(run, record)
        if settings.train.export_at_end:
            ranks.once("export", lambda: export_newest(Path(str(settings.run_dir)), terminal.say))
        if run is not None:
            terminal.say(f"done: {run.run_dir}")


@dataclass
class Run:
    """Everything that the loop works with. `state` alone changes."""

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

    @contextlib.contextmanager
    def recording(self) -> Iterator[metrics.Metrics]:
        """The run's record, cut back to the step it goes on from; closed whatever happens."""
        text, table = config.to_yaml(self.settings), config.flat(self.settings)
        record = metrics.Metrics(self.run_dir, self.state.step, text, table, is_main=self.ranks.is_main)
        try:
            yield record
        finally:
            record.close()


def recorded_state(settings: TrainConfig, step: int) -> TrainState | None:
    """The state of a run's checkpoint; None for step 0, where there is none."""
    return checkpoint.read_state(checkpoint.path_of(Path(str(settings.run_dir)), step)) if step else None


def starting_weights(settings: TrainConfig, ranks: Ranks) -> Weights | None:
    """The weights that a new run begins from; None for random ones. One process of each host downloads and checks.

    Raises:
        CheckpointError: They are not there, or incomplete.
        HostError: Another host has other ones.
    """
    wanted = settings.model.weights
    if wanted is None:
        return None
    key = "model.weights"

    def check() -> str:
        found = find(wanted, key)
        return json.dumps([found.place, found.name, found.fingerprint()])

    place, name, fingerprint = json.loads(ranks.once("weights", check, per_host=True))
    here = f"{name} ({fingerprint[:16]})"
    first = ranks.once("weights of rank 0", lambda: here)
    if here != first:
        raise HostError(key, here, f"{first}, as on rank 0's host")
    return replace(ranks.together("open weights", lambda: find(place, key)), name=name)


def network(
    settings: TrainConfig, start: Weights | None, tokenizer: Tokenizer | None = None, *, resumed: bool = False
) -> ModelConfig:
    """The model's settings, complete: what was left open is as in the weights, or as the run that goes on had it.

    Args:
        settings: As composed.
        start: The weights that a new run begins from.
        tokenizer: Once it is known; where its control tokens were appended, the vocabulary has room for them.
        resumed: Whether the run goes on from a checkpoint.

    Raises:
        ConfigError: A field that is set differs from the weights', or one is not set and there are none.
    """
    if start is not None:
        grow = settings.tokenizer.append
        at_least = 0 if not grow else tokenizer.vocab_size if tokenizer else start.config.vocab_size
        return architecture(settings.model, start, at_least)
    if resumed:
        theirs = vars(config.from_yaml(Path(str(settings.run_dir)) / "config.yaml").model)
        open_fields = [key for key, value in vars(settings.model).items() if value is None and key != "weights"]
        return replace(settings.model, **{key: theirs[key] for key in open_fields})
    settings.model.transformer()  # refuses what is unset or out of range, before anything is prepared
    return settings.model


def assemble(
    settings: TrainConfig,
    prepared: Prepared,
    recorded: TrainState | None,
    ranks: Ranks,
    terminal: metrics.Terminal,
    start: Weights | None = None,
) -> Run | None:
    """Check what can be checked before the first step, build the parts, load the newest checkpoint.

    Args:
        settings: The run's.
        prepared: Its conversations.
        recorded: State of the checkpoint to go on from; None begins anew.
        ranks: All of them call this.
        terminal: Told what a person should know.
        start: Weights that a new run begins from; None draws them.

    Returns:
        The run, ready for its next step; None where it is complete, which the terminal has been told.
    """
    assert settings.run_dir is not None
    run_dir, model_config = Path(settings.run_dir), settings.model.transformer()
    if prepared.tokenizer.vocab_size > model_config.vocab_size:
        raise ConfigError(
            "model.vocab_size",
            f"{model_config.vocab_size:,}",
            f"at least the tokenizer's {prepared.tokenizer.vocab_size:,}",
        )
    check_divisible(settings.packs_per_step, ranks.world_size, settings.data.pack_tokens)
    batches = Batches(settings, prepared, model_config, ranks)
    prompts = []
    if settings.samples.every_steps is not None:
        prompts = read_prompts(settings.samples.prompts, settings.samples.max_prompts, "samples.prompts")

    if recorded is not None and recorded.data_key != prepared.key:
        raise CheckpointError(
            str(run_dir), f"a run on prepared data {recorded.data_key}", f"prepared data {prepared.key}",
            "The contents of the conversations or of the tokenizer changed: choose another run_dir.",
        )  # fmt: skip
    if recorded is not None and recorded.step >= batches.total_steps:
        terminal.say(f"{run_dir} is complete: {recorded.step} of {batches.total_steps} steps")
        return None
    compute_dtype = torch.bfloat16 if bf16_compute(settings.precision, ranks.device) else torch.float32
    attention = attention_backend(settings.model.attention, recorded, ranks.device.type, compute_dtype)
    ranks.once("open", lambda: open_run_dir(settings, prepared, ranks))
    read = any(account.rows["read"] for account in prepared.ledger.accounts.values())  # not where all is streamed
    for text in [prepared.ledger.render()] if read else prepared.ledger.remarks():
        terminal.say(text)
    terminal.say(plan_text(settings, batches, prepared, ranks))
    terminal.say(
        f"{parameter_count(model_config):,} parameters, attention {attention}, compute in {name_of(compute_dtype)}, "
        f"torch {torch.__version__}, {ranks.device.type}"
    )
    model = build(
        model_config,
        attention_backend=attention,
        mesh=ranks.mesh,
        device=ranks.device,
        compute_dtype=compute_dtype,
        activation_checkpointing=settings.parallel.activation_checkpointing,
        reshard_after_forward=settings.parallel.reshard_after_forward,
        seed=settings.seed if recorded is None and start is None else None,
    )
    if start is not None:
        load_start(start, model, settings, prepared.tokenizer, ranks, terminal)
    optimizer = build_optimizer(model, settings.optim)
    state = TrainState(step=0, refused=[], data_key=prepared.key)
    if recorded is not None:
        folder = checkpoint.path_of(run_dir, recorded.step)
        state = checkpoint.load(folder, model, optimizer)
        ranks.together("restore batches", lambda: batches.restore(folder))
        terminal.say(f"resuming {run_dir} after step {recorded.step}")
    state = replace(state, choices={"attention": attention})
    return Run(settings, ranks, terminal, run_dir, prepared, batches, model, optimizer, prompts, state)


def load_start(
    start: Weights,
    model: Transformer,
    settings: TrainConfig,
    tokenizer: Tokenizer,
    ranks: Ranks,
    terminal: metrics.Terminal,
) -> None:
    """Fill a new run's model from weights, and set the rows of control tokens that were never trained."""
    new_chatml = not start.had_chatml(tokenizer, settings.tokenizer.path)
    begin = time.perf_counter()
    if start.hf is None:  # read with collectives: what fails on one rank fails on all
        start.fill(model)
    else:
        ranks.together("load weights", lambda: start.fill(model, new_rows=settings.tokenizer.append))
    terminal.say(f"weights from {start.name} in {time.perf_counter() - begin:.1f} s")
    rows = mend(model, tokenizer, settings.seed, new_chatml=new_chatml)
    terminal.say(summary(rows, tokenizer))
    if settings.data.pack_tokens > start.max_positions:
        terminal.say(
            f"data.pack_tokens={settings.data.pack_tokens:,} is longer than the context of {start.max_positions:,} "
            "that the weights are known for; an export will state the longer one"
        )
    if ranks.is_main:
        text = origin_text(start, {matrix: found.record(tokenizer) for matrix, found in rows.items()})
        write(Path(str(settings.run_dir)) / ORIGIN, text)


def attention_backend(wanted: str, recorded: TrainState | None, device_type: str, dtype: torch.dtype) -> str:
    """The kernel to use: as set; where that is auto, the one that the run began with, if it runs here too.

    Raises:
        ConfigError: If the kernel that is asked for does not run here.
    """
    if wanted == "auto" and recorded is not None:
        with contextlib.suppress(ValueError):  # the run has moved to another kind of machine
            return choose_backend(recorded.choices["attention"], device_type, dtype)
    try:
        return choose_backend(wanted, device_type, dtype)
    except ValueError as error:
        raise ConfigError.of(error) from error


def check_divisible(packs: int, world_size: int, pack_tokens: int) -> None:
    """Make sure that every rank gets as many packs of a step as any other.

    Raises:
        ConfigError: If the ranks do not divide them; names the nearest batch that would do.
    """
    if packs % world_size:
        above = -(-packs // world_size) * world_size * pack_tokens
        raise ConfigError(
            "train.tokens_per_step", f"{packs} packs of {pack_tokens:,} on {world_size} ranks",
            "a number of packs that the ranks divide", f"Try train.tokens_per_step={above}.",
        )  # fmt: skip


def bf16_compute(precision: str, device: torch.device) -> bool:
    """Whether gathered weights and activations are bf16."""
    return precision == "bf16_mixed" or (precision == "auto" and device.type == "cuda")


def newest_step(settings: TrainConfig) -> int:
    """The step of the run's newest checkpoint, 0 where there is none; its folder is a run's, or free. Rank 0 alone."""
    folder = Path(str(settings.run_dir))
    if folder.exists() and not folder.is_dir():
        raise ConfigError("run_dir", f"{folder}, which is a file", "a folder")
    if folder.exists() and not (folder / "config.yaml").exists() and any(folder.iterdir()):
        raise ConfigError(
            "run_dir", f"{folder}, which holds other files and no config.yaml", "a run's folder, an empty or a new one"
        )
    return max(checkpoint.steps(folder), default=0)


def check_run_dir(settings: TrainConfig, newest: int) -> str:
    """Make sure that the run's folder holds this very run, before anything is prepared. Rank 0 alone.

    Where there is no checkpoint yet, nothing hangs on the settings of an earlier start, and new ones may replace them.
    """
    folder = Path(str(settings.run_dir))
    recorded = folder / "config.yaml"
    changed = config.differences(config.from_yaml(recorded), settings) if newest else {}
    if changed:
        lines = "; ".join(f"{key} was {old!r}, is now {new!r}" for key, (old, new) in changed.items())
        raise ConfigError(
            str(folder), f"a run with other settings ({lines})", "the same settings, or an empty folder",
            "Choose another run_dir, or set them back.",
        )  # fmt: skip
    return ""


def open_run_dir(settings: TrainConfig, prepared: Prepared, ranks: Ranks) -> str:
    """Make the run's folder and write what stands in it from the start. Rank 0 alone."""
    folder = Path(str(settings.run_dir))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / "config.yaml", config.to_yaml(settings))
        if not checkpoint.steps(folder):
            (folder / ORIGIN).unlink(missing_ok=True)  # of an earlier start that came to nothing
        starts = json.loads(read(folder / "environment.json") or "[]")
        starts.append(environment(ranks.world_size, ranks.device))
        write(folder / "environment.json", json.dumps(starts, indent=1))
        prepared.tokenizer.save(folder / "tokenizer.json")
    except OSError as error:
        raise ConfigError("run_dir", f"{folder}: {error.strerror}", "a folder that can be written") from error
    # float32 weights and two moments, and a bfloat16 export; the newest stays until the next is complete
    need = (14 if settings.train.export_at_end else 12) * parameter_count(settings.model.transformer())
    if (free := shutil.disk_usage(folder).free) < need:
        what = "a checkpoint and an export" if settings.train.export_at_end else "a checkpoint"
        raise ConfigError("run_dir", f"{free / 1e9:.1f} GB free for {folder}", f"{need / 1e9:.1f} GB for {what}")
    return ""


def read(file: Path) -> str:
    """A text file's content; empty where there is none."""
    return file.read_text() if file.exists() else ""


def write(file: Path, text: str) -> None:
    """Replace a text file as a whole, so that a killed process leaves the old one or the new one."""
    aside = file.with_name(f".{file.name}.tmp")
    aside.write_text(text)
    aside.replace(file)


def plan_text(settings: TrainConfig, batches: Batches, prepared: Prepared, ranks: Ranks) -> str:
    """What the settings come to, in the words that people know."""
    packs, world = settings.packs_per_step, ranks.world_size
    shard = world // settings.parallel.replicate
    mesh = f" ({settings.parallel.replicate} replicas x {shard} shards)" if settings.parallel.replicate > 1 else ""
    length = "as set" if settings.train.max_steps else f"in {settings.train.epochs} epochs"
    quiet = "; no validation, since no source has rows for it" if not len(prepared.validation) else ""
    shares = ", ".join(f"{name} {share:.1%}" for name, share in batches.shares.items())
    source = f"streamed, up to {settings.data.stream_documents:,} conversations waiting, rows from {shares}"
    if batches.schedule is not None:
        first, fill = len(batches.schedule.packing(0)), batches.schedule.fill(0)
        source = f"{first:,} packs in the first epoch, {fill:.1%} filled"
        if first < packs:
            source += " (less than a step: train.tokens_per_step can be lower)"
    return (
        f"{packs} packs of {settings.data.pack_tokens:,} a step = {world} ranks{mesh} x {packs // world} accumulation; "
        f"{source}; {batches.total_steps:,} steps {length}{quiet}"
    )


def loop(run: Run, record: metrics.Metrics) -> None:
    """Step after step until the last: update, record, validate, answer, save."""
    settings, total = run.settings, run.batches.total_steps
    peak = metrics.peak_flops(run.ranks.device, settings.metrics.peak_tflops)
    started, first = time.perf_counter(), run.state.step
    if run.ranks.is_main:
        metrics.cut_back(run.run_dir / "skipped.jsonl", first)
    gc.collect()
    gc.disable()
    run.terminal.begin(first, total)
    try:
        for step in range(first + 1, total + 1):
            try:
                with profiled(run, step):
                    row = one_step(run, step, peak)
            except Exception:  # of any kind; raised again below
                # A stream that fails, such as a hub that went away, need not cost the steps since the last checkpoint.
                done, every = step - 1, settings.checkpoint.every_steps
                if run.batches.failed and every is not None and done > first and not due(done, every, total):
                    save(run, record)
                    run.terminal.say(f"step {done}: saved, since reading on failed")
                raise
            record.write(row)
            stop_if_refused_too_often(run)
            left = (time.perf_counter() - started) / (step - first) * (total - step)
            run.terminal.step(row, left)
            if step == first + 1:
                run.terminal.say(f"measured: {measured_dtypes(run.model, run.optimizer)}")
            if due(step, settings.validation.every_steps, total):
                validate(run, record, step)
            if due(step, settings.samples.every_steps, total):
                sample(run, record, step)
            if due(step, settings.checkpoint.every_steps, total):
                save(run, record)
            if step % settings.train.collect_garbage_every_steps == 0:
                gc.collect()
    finally:
        run.terminal.end()
        gc.enable()


def save(run: Run, record: metrics.Metrics) -> None:
    """Save a checkpoint of the steps done."""
    record.sync()
    if run.ranks.is_main:
        write_ledger(run)  # before the checkpoint: a start that finds the run complete writes nothing
    checkpoint.save(
        run.run_dir, run.model, run.optimizer, run.state,
        files=run.batches.saved(run.state.step), keep_last=run.settings.checkpoint.keep_last, ranks=run.ranks,
    )  # fmt: skip


def write_ledger(run: Run) -> None:
    """Record where every row went, down to what has been trained."""
    ledger = run.batches.ledger(run.state.step, run.state.refused)
    write(run.run_dir / "ledger.json", json.dumps(ledger.to_json(), indent=1))


def due(step: int, every: int | None, total: int) -> bool:
    """Whether something that happens every so many steps, and at the end, happens now."""
    return every is not None and (step % every == 0 or step == total)


def one_step(run: Run, step: int, peak: float | None) -> dict[str, object]:
    """Train one step and say what it gave and cost, as a row of metrics.jsonl."""
    settings, ranks = run.settings, run.ranks
    begin = time.perf_counter()
    data = run.batches.step(step - 1)
    batches = [on_device(batch, ranks.device) for batch in data.micro_batches]
    data_seconds = time.perf_counter() - begin
    lr = learning_rate(step, run.batches.total_steps, settings.optim)
    result = train_step(
        run.model, run.optimizer, batches,
        weight_sum=data.weight_sum, n_sources=len(run.prepared.sources), lr=lr,
        max_grad_norm=settings.train.max_grad_norm,
    )  # fmt: skip
    loss, grad_norm, applied = result.loss.item(), result.grad_norm.item(), bool(result.applied.item())
    seconds = time.perf_counter() - begin
    run.state = replace(run.state, step=step, refused=run.state.refused + [step] * (not applied))
    if not applied:
        refuse(run, data, step, loss, grad_norm)
    flops = train_flops(settings.model.transformer(), data.lengths.tolist(), data.weighted_tokens)
    return {
        "step": step,
        "epoch": data.epoch + 1,
        "loss": loss,
        "grad_norm": grad_norm,
        "lr": lr,
        "tokens": data.tokens,
        "weighted_tokens": data.weighted_tokens,
        "documents": data.documents,
        "fill": data.fill,
        "step_seconds": seconds,
        "data_seconds": data_seconds,
        "tokens_per_second": data.tokens / seconds,
        "mfu": flops / seconds / (peak * ranks.world_size) if peak else None,
        "peak_memory_gib": metrics.peak_memory_gib(ranks.device),
        "applied": applied,
        "loss_by_source": by_source(run, result.source_losses, data),
    }


def on_device(batch: PackedBatch, device: torch.device) -> PackedBatch:
    """Copy a pack to the device; from page-locked memory, so that the host need not wait for the copy."""
    return batch.pin_memory().to(device) if device.type == "cuda" else batch


def by_source(run: Run, sums: torch.Tensor, data: StepData) -> dict[str, float]:
    """Mean loss of each source that has weight in this step or validation, by name."""
    pairs = zip(run.prepared.sources, sums.tolist(), data.source_weight_sums.tolist(), strict=True)
    return {name: total / weight for name, total, weight in pairs if weight > 0}


def refuse(run: Run, data: StepData, step: int, loss: float, grad_norm: float) -> None:
    """Write down the rows behind a refused update."""
    file = run.run_dir / "skipped.jsonl"
    if run.ranks.is_main:
        packs = [[[run.prepared.sources[source], row] for source, row in pack.tolist()] for pack in data.rows]
        entry = {"step": step, "loss": str(loss), "grad_norm": str(grad_norm), "packs": packs}
        with file.open("a") as lines:
            lines.write(json.dumps(entry) + "\n")
    run.terminal.say(f"step {step}: loss {loss}, gradient norm {grad_norm}; update refused, its rows are in {file}")


def stop_if_refused_too_often(run: Run) -> None:
    """End the run when more updates have been refused than it may.

    Raises:
        RunError: If `train.max_skipped_steps` is passed.
    """
    if len(run.state.refused) > run.settings.train.max_skipped_steps:
        raise RunError(
            "train.max_skipped_steps", f"{len(run.state.refused)} refused updates",
            f"at most {run.settings.train.max_skipped_steps}", f"Look at the rows in {run.run_dir / 'skipped.jsonl'}.",
        )  # fmt: skip


@torch.no_grad()
def validate(run: Run, record: metrics.Metrics, step: int) -> None:
    """Validation loss, whole and per source, over the same packs every time."""
    data = run.batches.validation()
    if not data.documents:
        return
    sums = torch.zeros(len(run.prepared.sources), dtype=torch.float64, device=run.ranks.device)
    for batch in data.micro_batches:
        batch = on_device(batch, run.ranks.device)
        sums += losses_by_source(forward(run.model, batch), batch, len(run.prepared.sources))
    distributed.all_reduce_sum(sums)
    loss = sums.sum().item() / data.weight_sum
    split = by_source(run, sums, data)
    record.write({"step": step, "validation_loss": loss, "validation_loss_by_source": split})
    named = ", ".join(f"{name} {value:.4f}" for name, value in split.items())
    run.terminal.say(f"step {step}: validation loss {loss:.4f} ({named})")


def sample(run: Run, record: metrics.Metrics, step: int) -> None:
    """Answer the fixed prompts; every rank runs the same forwards, and rank 0's tokens decide when to stop."""
    options, data = run.settings.samples, run.settings.data
    for number, prompt in enumerate(run.prompts):
        ids: list[int] = []
        prompt = replace(prompt, system=prompt.system or data.default_system)  # as in training
        messages = encode_prompt(prompt.messages(), run.prepared.tokenizer, data.encoding)
        # Each rank would stop at an end token of its own; a rank that differs must not leave the others waiting.
        for token in generate(
            run.model, messages, max_new_tokens=options.max_new_tokens, temperature=options.temperature,
            seed=run.settings.seed, vocab_size=run.prepared.tokenizer.vocab_size,
        ):  # fmt: skip
            agreed = torch.tensor(token, device=run.ranks.device)
            dist.broadcast(agreed, src=0)
            ids.append(int(agreed))
            if ids[-1] in run.prepared.tokenizer.stop_ids:
                break
        text = reply_text(run.prepared.tokenizer, ids)
        record.write({"step": step, "sample": number, "prompt": prompt.text, "reply": text})


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


if __name__ == "__main__":
    config.verb(train, TrainConfig, "config")
