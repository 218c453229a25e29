"""A run's table of contents: compose, build, loop.

    torchrun --nproc-per-node 8 -m magnum_train.train experiment=magnum_v2_12b

Read `train` for the order of things, `assemble` for the parts, and `loop.py` for what happens at a step.
"""

import contextlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data import Tokenizer
from data.prepared import Prepared, open_prepared
from magnum_train import budget, checkpoint, config, distributed, flight, fp8, kernels, metrics, run_folder
from magnum_train.batches import Batches
from magnum_train.chat import read_prompts
from magnum_train.checkpoint import TrainState
from magnum_train.config import ModelConfig, TrainConfig
from magnum_train.distributed import HostError, Ranks
from magnum_train.embeddings import mend, summary
from magnum_train.environment import environment
from magnum_train.errors import CheckpointError, ConfigError, UserError
from magnum_train.export import export_newest
from magnum_train.flight import FlightRecorder
from magnum_train.loop import STEPPED_OVER, Ending, Run, go_back, loop, restore
from magnum_train.optim import build_optimizer, learning_rate, parameter_dtype
from magnum_train.parallelize import build, name_of
from magnum_train.prepare import prepare_data
from magnum_train.recompute import layer_modes
from magnum_train.run_folder import read, size_text, write
from magnum_train.saver import Saver
from magnum_train.sequence import check_heads
from magnum_train.signals import Stop
from magnum_train.weights import ORIGIN, Weights, architecture, find, origin_text
from model import Transformer, TransformerConfig
from model.flops import parameter_count

GRACE_SECONDS = 30
"""Between torchrun's own signal to its workers and its SIGKILL."""


def train(settings: TrainConfig) -> bool:
    """Train as configured, or go on where an earlier start of the same run stopped.

    Returns:
        Whether a sweep may go on with its next run; not where a signal has asked for the end.
    """
    started, run_dir = time.monotonic(), Path(str(settings.run_dir))
    with (
        contextlib.ExitStack() as to_the_last,  # torchrun signals those that are about to name a lost rank
        distributed.start(
            timeout_seconds=settings.distributed.timeout_seconds,
            save_timeout_seconds=settings.checkpoint.timeout_seconds,
            replicate=settings.parallel.replicate,
            sequence=settings.parallel.sequence,
            threads=settings.train.threads,
            deterministic=settings.train.deterministic,
        ) as ranks,
        contextlib.ExitStack() as until_the_end,
    ):
        terminal = metrics.Terminal(is_main=ranks.is_main)
        ranks.watch.phase("starting", limited=False)
        if remark := ranks.once("folder", lambda: claimed(run_dir, until_the_end)):
            terminal.say(remark)
        ranks.watch.folder = run_dir
        asked, recorded, start, passed = settings, None, None, list[str]()
        if ranks.once("checkpoints", lambda: "some" if checkpoint.steps(run_dir) else ""):
            settings = replace(settings, model=network(settings, None, resumed=True))
            ranks.once("settings", lambda: check_settings(settings))
            recorded, passed = checkpoint.newest(run_dir, config.settings_digest(settings), ranks, "at start")
        else:
            start = starting_weights(settings, ranks)
            settings = replace(settings, model=network(settings, start))
        known = recorded.data_key if recorded else None
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
        stop = to_the_last.enter_context(Stop(terminal.say))
        run = assemble(
            settings, prepared, recorded, ranks, terminal, start, passed=passed, started=started, stop=stop
        )  # fmt: skip
        if run is not None and not until_it_ends(run):
            terminal.say(f"stopped after step {run.state.step} of {run.batches.total_steps}; resume with:")
            terminal.say(f"  {ranks.launch.command}")
            return not run.told_to_stop
        if settings.train.export_at_end:
            ranks.watch.phase("export", limited=False)
            ranks.once("export", lambda: export_newest(run_dir, terminal.say))
        if run is not None:
            terminal.say(f"done: {run.run_dir}")
        return not ranks.agree([stop.requested is not None])[0]


def until_it_ends(run: Run) -> bool:
    """Train until the run is complete or is asked to stop, going back as often as it may; whether it is complete."""
    with contextlib.closing(run.batches):
        ending = Ending.ROLL_BACK
        try:
            while ending is Ending.ROLL_BACK:
                with run.recording() as record:
                    ending = loop(run, record)
                if ending is Ending.ROLL_BACK:
                    go_back(run)
        except UserError:  # which all ranks met: what is being saved can still become visible
            run.ranks.watch.phase("waiting for the save", limited=False)
            with contextlib.suppress(UserError):  # what ended the run is what is to be told
                run.saver.wait()
            raise
        except BaseException:
            run.stop.ending = True
            raise
    run.recorder.close(normal=True)
    return ending is Ending.COMPLETE


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

    with contextlib.ExitStack() as until_all_have_it:  # from here on a run's checkpoint is not pruned

        def check() -> str:
            found = until_all_have_it.enter_context(find(wanted, key))
            return json.dumps([found.place, found.name, found.fingerprint()])

        place, name, fingerprint = json.loads(ranks.once("weights", check, per_host=True))
        here = f"{name} ({fingerprint[:16]})"
        first = ranks.once("weights of rank 0", lambda: here)
        if here != first:
            raise HostError(key, here, f"{first}, as on rank 0's host")
        return replace(ranks.together("open weights", lambda: find(place, key, verify=False)), name=name)


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
    *,
    passed: Sequence[str] = (),
    started: float | None = None,
    stop: Stop | None = None,
) -> Run | None:
    """Check what can be checked before the first step, build the parts, load the newest checkpoint.

    Args:
        settings: The run's.
        prepared: Its conversations.
        recorded: State of the checkpoint to go on from; None begins anew.
        ranks: All of them call this.
        terminal: Told what a person should know.
        start: Weights that a new run begins from; None draws them.
        passed: What is to be said of newer checkpoints that do not verify.
        started: When the program began, by `time.monotonic`; None means now.
        stop: Asked between steps; None never stops.

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
    check_heads(settings.parallel.sequence, model_config)
    check_divisible(settings.packs_per_step, ranks.world_size, settings.data.pack_tokens, settings.parallel.sequence)
    batches = Batches(settings, prepared, model_config, ranks)
    prompts = []
    if settings.samples.every_steps is not None:
        prompts = read_prompts(settings.samples.prompts, settings.samples.max_prompts, "samples.prompts")

    if recorded is not None and recorded.data_key != prepared.key:
        raise CheckpointError(
            str(run_dir), f"a run on prepared data {recorded.data_key}", f"prepared data {prepared.key}",
            "The contents of the conversations or of the tokenizer changed: choose another run_dir.",
        )  # fmt: skip
    if recorded is not None:
        owed = partial(still_owed, run_dir, recorded, len(prompts))
        recorded = replace(recorded, owed=json.loads(ranks.once("owed", lambda: json.dumps(owed()))))
    if recorded is not None and recorded.step >= batches.total_steps and not recorded.owed:
        terminal.say(f"{run_dir} is complete: {recorded.step} of {batches.total_steps} steps")
        return None
    epoch_ends = batches.epoch_ends() if settings.checkpoint.every_epochs is not None else []
    names = checkpoint_names(settings, batches.total_steps, epoch_ends)
    compute_dtype = torch.bfloat16 if bf16_compute(settings.precision, ranks.device) else torch.float32
    task = kernels.task_of(settings, model_config, batches, prepared, compute_dtype, ranks.device)
    known = recorded.choices["attention"] if recorded else None
    attention, tried = kernels.choose(settings, known, task, ranks, terminal.say)
    tokens = settings.data.pack_tokens // settings.parallel.sequence
    fp8.check(settings.parallel.fp8, model_config, tokens, ranks.device, compute_dtype)
    text = ranks.once("open", lambda: open_run_dir(settings, prepared, batches.total_steps, epoch_ends, ranks, tried))
    read = any(account.rows["read"] for account in prepared.ledger.accounts.values())  # not where all is streamed
    for line in [prepared.ledger.render()] if read else prepared.ledger.remarks():
        terminal.say(line)
    terminal.say(plan_text(settings, batches, prepared, ranks))
    terminal.say(text)
    size = run_folder.checkpoint_bytes(settings, parameter_count(model_config))
    save_seconds = expected_save_seconds(run_dir, size, ranks, terminal)
    terminal.say(
        f"{parameter_count(model_config):,} parameters, attention {attention}, compute in {name_of(compute_dtype)}, "
        f"{fp8.told(settings.parallel.fp8)}torch {torch.__version__}, {ranks.device.type}"
    )
    compiled = compiles(settings, attention, ranks.device)
    modes, text = recomputation(settings, model_config, compute_dtype, compiled, ranks)
    terminal.say(text)
    model = build(
        model_config,
        attention_backend=attention,
        mesh=ranks.mesh,
        sequence=ranks.sequence,
        device=ranks.device,
        compute_dtype=compute_dtype,
        activation_checkpointing=modes,
        reshard_after_forward=settings.parallel.reshard_after_forward,
        compiled=compiled,
        fp8=settings.parallel.fp8,
        seed=settings.seed if recorded is None and start is None else None,
        parameter_dtype=parameter_dtype(settings.precision),
    )
    if start is not None:
        load_start(start, model, settings, prepared.tokenizer, ranks, terminal)
    optimizer = build_optimizer(model, settings.optim, settings.precision)
    now = TrainState(
        step=0,
        refused=[],
        data_key=prepared.key,
        settings=config.settings_digest(settings),
        choices=recorded.choices if recorded else {"attention": attention},
        total_steps=batches.total_steps,
        saved_on=circumstances(settings, attention, ranks),
    )
    if left := ranks.once("flight", lambda: str(flight.set_aside(run_dir / "flight") or "")):
        terminal.say(f"the start before this one did not end as it should; its last steps are in {left}")
    recorder = FlightRecorder(run_dir / "flight", ranks.rank, prepared.sources)
    run = Run(
        settings, ranks, terminal, run_dir, prepared, batches, model, optimizer, prompts, now,
        Saver(run_dir, settings.checkpoint, ranks, save_seconds, terminal.say), recorder, names,
        time.monotonic() if started is None else started, stop or Stop(terminal.say),
    )  # fmt: skip
    if recorded is None:
        checkpoint.seed_random(settings.seed, 0, ranks.rank)
    else:
        resume(run, recorded, passed)
    return run


def resume(run: Run, recorded: TrainState, passed: Sequence[str]) -> None:
    """Load the checkpoint that a run goes on from, and say what is not as it was when it was saved."""
    settings, now = run.settings, run.state
    run.ranks.watch.phase("loading", recorded.step, limited=False)
    restore(run, recorded, "at start")
    left_out = json.loads(run.ranks.once("stepped over", lambda: read(run.run_dir / STEPPED_OVER) or "[]"))
    run.state = replace(run.state, stepped_over=sorted({*recorded.stepped_over, *left_out}))
    for text in passed:
        run.note(text)
    run.terminal.say(f"resuming {run.run_dir} after step {recorded.step}")
    then, today = recorded.saved_on, now.saved_on
    changed = [f"{key} {then.get(key)}, now {value}" for key, value in today.items() if then.get(key) != value]
    if changed:
        run.terminal.say(f"saved with {'; '.join(changed)}: what follows agrees to rounding, not bit for bit")
    if recorded.total_steps != now.total_steps:
        step = recorded.step + 1
        before, after = (
            learning_rate(step, total, settings.optim) for total in (recorded.total_steps, now.total_steps)
        )
        run.terminal.say(
            f"the run had {recorded.total_steps:,} steps and now has {now.total_steps:,}: the learning rate of step "
            f"{step} is {after:.3g} instead of {before:.3g}"
        )


def still_owed(run_dir: Path, recorded: TrainState, prompts: int) -> list[str]:
    """What was left out when somebody asked to stop, and has not been made up for by a later start. Rank 0 alone."""
    rows = [row for _, row in metrics.whole_rows(run_dir / "metrics.jsonl") if row["step"] == recorded.step]
    made = {
        "validation": any("validation_loss" in row for row in rows),
        "samples": sum("reply" in row for row in rows) >= prompts,
    }
    return [what for what in recorded.owed if not made[what]]


def circumstances(settings: TrainConfig, attention: str, ranks: Ranks) -> dict[str, str]:
    """What decides the last bits of a step beside the settings that may not change."""
    device = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "cpu"
    shards, sharers = ranks.world_size // settings.parallel.replicate, settings.parallel.sequence
    return {
        "ranks": str(ranks.world_size),
        "mesh": f"{settings.parallel.replicate} x {shards}" + (f", {sharers} to a pack" if sharers > 1 else ""),
        "device": device,
        "torch": torch.__version__,
        "attention": attention,
        "blocks": ("compiled" if compiles(settings, attention, ranks.device) else "not compiled")
        + ("" if settings.parallel.fp8 == "none" else f", products in fp8 {settings.parallel.fp8}"),
    } | ({"threads": str(torch.get_num_threads())} if ranks.device.type == "cpu" else {})  # they sum in another order


def checkpoint_names(settings: TrainConfig, total_steps: int, epoch_ends: list[int]) -> dict[int, tuple[str, ...]]:
    """What the checkpoints of some steps are called.

    Raises:
        ConfigError: A name is asked for after the run's end, or an epoch's end where there are no epochs.
    """
    every = settings.checkpoint.every_epochs
    if every is not None and settings.data.streaming:
        raise ConfigError("checkpoint.every_epochs", str(every), "null, with data.streaming: a stream has no epochs")
    names: dict[int, tuple[str, ...]] = {}
    for name, step in settings.checkpoint.pin.items():
        if step > total_steps:
            raise ConfigError(f"checkpoint.pin.{name}", str(step), f"at most the run's {total_steps:,} steps")
        names[step] = (*names.get(step, ()), name)
    for epoch, step in enumerate(epoch_ends, 1):
        if every is not None and epoch % every == 0:
            names[step] = (*names.get(step, ()), f"epoch-{epoch}")
    return names


def expected_save_seconds(run_dir: Path, size: int, ranks: Ranks, terminal: metrics.Terminal) -> float:
    """How long a save of so many bytes takes at the speed measured now.

    Said where torchrun would not let its workers live so long.
    """
    speed = run_folder.write_speed(run_dir, size, ranks)
    seconds = size / speed
    if seconds > GRACE_SECONDS and ranks.world_size > 1:
        terminal.say(
            f"a save is going to take some {seconds:,.0f} s (all ranks together write "
            f"{run_folder.size_text(int(speed))}/s): when torchrun is told to stop, it kills its workers after "
            f"{GRACE_SECONDS} s; see docs/clusters.md for more time"
        )
    return seconds


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
    with start:  # a run's checkpoint may be pruned after it
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


def check_divisible(packs: int, world_size: int, pack_tokens: int, sharers: int) -> None:
    """Make sure that every rank, or every group of ranks that share packs, gets as many of a step as any other.

    Args:
        packs: Packs of a step.
        world_size: Number of ranks.
        pack_tokens: Tokens of a pack.
        sharers: Ranks of a group; 1 where each has packs of its own.

    Raises:
        ConfigError: If the ranks or groups do not divide them; names the nearest batch that would do.
    """
    groups = world_size // sharers
    if packs % groups:
        above = -(-packs // groups) * groups * pack_tokens
        where, what = f"{world_size} ranks", "ranks"
        if sharers > 1:
            where, what = f"{groups} groups of {sharers} ranks (parallel.sequence={sharers})", "groups"
        raise ConfigError(
            "train.tokens_per_step", f"{packs} packs of {pack_tokens:,} on {where}",
            f"a number of packs that the {what} divide", f"Try train.tokens_per_step={above}.",
        )  # fmt: skip


def recomputation(
    settings: TrainConfig, model_config: TransformerConfig, compute_dtype: torch.dtype, compiled: bool, ranks: Ranks
) -> tuple[str, str]:
    """What of a block is computed again in the backward, and the memory that a step then takes, in words.

    Raises:
        ConfigError: Nothing fits, or more layers are named than there are.
    """
    asked, place, gpu = settings.parallel.activation_checkpointing, "", ranks.device.type == "cuda"
    shards, tokens = ranks.world_size // settings.parallel.replicate, settings.data.pack_tokens
    share = tokens // settings.parallel.sequence
    recipe = budget.recipe(settings.precision, settings.optim, compute_dtype)
    layout = budget.Layout(share, share, shards, (), compiled, gpu, settings.parallel.sequence)
    try:
        if gpu:
            card = torch.cuda.get_device_properties(ranks.device).total_memory
            place = f" of {card / 2**30:.1f} GiB"
            modes = (
                asked if asked != "auto" else budget.modes_that_fit(model_config, recipe, layout, budget.USABLE * card)
            )
        else:
            modes = "none" if asked == "auto" else asked
        memory = budget.memory(model_config, recipe, replace(layout, modes=layer_modes(modes, model_config.n_layers)))
    except ValueError as error:
        raise ConfigError.of(error) from error
    parts = ", ".join(f"{name} {size_text(size)}" for name, size in memory.parts.items() if size)
    chosen = f" (chosen: activation_checkpointing={modes})" if asked == "auto" else ""
    return modes, (
        f"memory: about {size_text(memory.total)}{place} a rank at {memory.moment}, by the numbers{chosen}: {parts}"
    )


def compiles(settings: TrainConfig, attention: str, device: torch.device) -> bool:
    """Whether the blocks are compiled.

    Raises:
        ConfigError: They are to be, with a kernel that a compiler cannot look past.
    """
    can = attention != "sdpa" or device.type == "cpu"
    if settings.parallel.compile and not can:
        raise ConfigError(
            "parallel.compile", "true, with attention sdpa on a GPU", "attention by varlen or flash_attn",
            "Compute in bf16 (precision=bf16_mixed), or leave parallel.compile null.",
        )  # fmt: skip
    return device.type == "cuda" and can if settings.parallel.compile is None else settings.parallel.compile


def bf16_compute(precision: str, device: torch.device) -> bool:
    """Whether gathered weights and activations are bf16."""
    return precision.startswith("bf16") or (precision == "auto" and device.type == "cuda")


def claimed(folder: Path, until_the_end: contextlib.ExitStack) -> str:
    """Claim a run's folder, which is one or is free to become one, and remove what a killed start left half written.

    Rank 0 alone.

    Returns:
        What is to be said about it; mostly nothing.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError("run_dir", f"{folder}, which is a file", "a folder")
    there = list(folder.iterdir()) if folder.exists() else []
    others = [path for path in there if path.name != run_folder.LOCK and path.suffix != ".tmp"]  # of a killed start
    if others and not (folder / "config.yaml").exists():
        raise ConfigError(
            "run_dir", f"{folder}, which holds other files and no config.yaml", "a run's folder, an empty or a new one"
        )
    remark = until_the_end.enter_context(run_folder.claim(folder))
    left = run_folder.tidy(folder)
    removed = (
        f"a start before this one was killed; removed what it left half written: {', '.join(left)}" if left else ""
    )
    return "\n".join(filter(None, (remark, removed)))


def check_settings(settings: TrainConfig) -> str:
    """Make sure that the run's folder holds this very run, before anything is prepared. Rank 0 alone.

    Where there is no checkpoint yet, nothing hangs on the settings of an earlier start, and new ones may replace them.
    """
    folder = Path(str(settings.run_dir))
    changed = config.differences(config.from_yaml(folder / "config.yaml"), settings)
    if changed:
        lines = "; ".join(f"{key} was {old!r}, is now {new!r}" for key, (old, new) in changed.items())
        raise ConfigError(
            str(folder), f"a run with other settings ({lines})", "the same settings, or an empty folder",
            "Choose another run_dir, or set them back.",
        )  # fmt: skip
    return ""


def open_run_dir(
    settings: TrainConfig,
    prepared: Prepared,
    total_steps: int,
    epoch_ends: list[int],
    ranks: Ranks,
    attention: dict[str, Any],
) -> str:
    """Write what stands in the run's folder from the start; returns what the run takes on disk. Rank 0 alone."""
    folder = Path(str(settings.run_dir))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("run_dir", f"{folder}: {error.strerror}", "a folder that can be written") from error
    room = run_folder.disk(
        settings, parameter_count(settings.model.transformer()), total_steps, epoch_ends,
        held=run_folder.held_bytes(folder, total_steps), free=shutil.disk_usage(folder).free,
        shards=ranks.world_size // settings.parallel.replicate,
    )  # fmt: skip
    if room.missing:
        raise ConfigError(
            "run_dir", f"{run_folder.size_text(room.missing)} too little: {room.text}", "room for the whole run",
            "Free some, choose another run_dir, or keep fewer checkpoints (checkpoint.keep_last and its neighbours).",
        )  # fmt: skip
    try:
        write(folder / "config.yaml", config.to_yaml(settings))
        if not checkpoint.steps(folder):
            for name in (ORIGIN, STEPPED_OVER):
                (folder / name).unlink(missing_ok=True)  # of an earlier start that came to nothing
            prepared.tokenizer.save(folder / "tokenizer.json")  # later its readers must never find half of it
        starts = json.loads(read(folder / "environment.json") or "[]")
        starts.append(environment(ranks.world_size, ranks.device) | {"attention": attention})
        write(folder / "environment.json", json.dumps(starts, indent=1))
    except OSError as error:
        raise ConfigError("run_dir", f"{folder}: {error.strerror}", "a folder that can be written") from error
    return room.text


def plan_text(settings: TrainConfig, batches: Batches, prepared: Prepared, ranks: Ranks) -> str:
    """What the settings come to, in the words that people know."""
    packs, world = settings.packs_per_step, ranks.world_size
    shard = world // settings.parallel.replicate
    mesh = f" ({settings.parallel.replicate} replicas x {shard} shards)" if settings.parallel.replicate > 1 else ""
    sharers = settings.parallel.sequence
    groups, at_once = world // sharers, f"{world} ranks{mesh}"
    if sharers > 1:
        part = settings.data.pack_tokens // sharers
        at_once += f", {sharers} to a pack with {part:,} tokens each, so {groups} pack{'s' * (groups > 1)} at a time,"
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
        f"{packs} packs of {settings.data.pack_tokens:,} a step = {at_once} x {packs // groups} accumulation; "
        f"{source}; {batches.total_steps:,} steps {length}{quiet}"
    )


if __name__ == "__main__":
    config.verb(train, TrainConfig, "config")
