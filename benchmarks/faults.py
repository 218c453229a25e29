"""Faults, each on real processes: what a run loses by them, and whether it goes on as if they had not been.

    python benchmarks/faults.py OUT.json [--short] [--seed 1] [--only PART …]

Prints a table and writes the record. A fault is survived when all that is claimed of it was seen: how every process
ended, what it said, what was left on disk, and that the run, started again by the same command, gives the losses and
gradient norms of one that nothing disturbed, bit for bit. Exit status 1: a fault that was tried was not survived.

Processes, signals, mounts and damage are real; `fault_lab.py` has what they are done with. Where the system allows it,
all runs in namespaces of its own for processes and mounts: the kernel ends every process and takes down every mount
when this one ends, however it ends.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from fault_lab import (
    DAMAGES,
    SHORT_LIMIT,
    STAGES,
    TIMEOUT,
    Lab,
    Row,
    Start,
    agree,
    agree_so_far,
    alternate,
    bad_batch,
    begun,
    clock,
    damage,
    done,
    expect,
    folder_of,
    go_on,
    impatient,
    leave_out,
    look_at_damage,
    nan_in_gradient,
    newest,
    one_message,
    reached,
    read_and_wait,
    refused,
    resumed,
    run_part,
    same_ledger,
    saves,
    series,
    sleep_in_data,
    slow,
    sound,
    stage,
    table,
    tail,
    tidy,
    until,
    verdict,
    wait_for,
)

from magnum_train import checkpoint, config, metrics
from magnum_train.checkpoint import path_of, steps
from magnum_train.environment import environment

# Faults


def killed(lab: Lab, row: Row) -> None:
    """One of two ranks is killed: as it starts, in a step, in any stage of a save; then the run is started again."""
    left = Counter(save=lab.times(20, 3), step=lab.times(24, 1), start=lab.times(6, 0))
    at, seconds, number = Counter[str](), list[float](), 0
    while left.total() and len(row.wrong) < 3:
        more = (SHORT_LIMIT, *(lab.streamed() if number % 2 else ()))
        whole, line, number = lab.whole(*more, plants=[slow]), lab.line(lab.folder("killed"), *more), number + 1
        run_dir = folder_of(line)
        while left.total() and newest(run_dir) < done(whole) and len(row.wrong) < 3:
            kill_once(lab, row, line, whole, left, at, seconds)
        with lab.trial(row, f"the end of {run_dir.name}") as trial:
            trial.count = 0
            go_on(lab, row, line, whole, slow)
    row.figures |= {"moments": dict(at), "seconds until the other rank ended": seconds}
    stages = ", ".join(f"{name} {at[name]}" for name in STAGES)
    row.remarks.append(f"killed while starting {at['start']}, in a step {at['step']}; in a save: {stages}")
    if seconds:
        most = f"{statistics.median(seconds):.1f} s (median), {max(seconds):.1f} s at most, of {TIMEOUT} s allowed"
        row.remarks.append(f"the other rank named the lost one and ended after {most}")


def kill_once(
    lab: Lab, row: Row, line: list[str], whole: Path, left: Counter[str], at: Counter[str], seconds: list[float]
) -> None:
    """Go on with a run, and kill one of its ranks at a random moment of a kind that is still to be tried."""
    run_dir, first, total = folder_of(line), newest(folder_of(line)), done(whole)
    kind, victim = lab.draw.choice(sorted(left.elements())), lab.draw.randrange(2)
    with lab.trial(row, f"rank {victim} killed, {kind}, after step {first} of {run_dir.name}") as trial:
        start = lab.start(2, line, slow)
        if kind == "start":
            time.sleep(lab.draw.uniform(0.05, 1.5))
        elif kind == "save":
            reached(start, run_dir, min(first + 5, total))
            time.sleep(lab.draw.uniform(0, 1.1 * max(saves(whole))))
        else:
            reached(start, run_dir, lab.draw.randint(first + 1, min(first + 8, total - 1)))
            time.sleep(lab.draw.uniform(0, 0.05))
        start.send(victim, signal.SIGKILL)
        begin, has_begun, due = time.monotonic(), begun(start), done(run_dir) // 5 * 5
        hit = (stage(run_dir, due, 2) if due > first else None) or "step" if has_begun else "start"
        until(lambda: None not in start.statuses(), "the end of the other rank")
        took = time.monotonic() - begin
        if start.statuses()[1 - victim] == 0:  # all was done
            trial.count = 0
            return
        if has_begun:
            row.lose(0, first - resumed(start))
            expect(resumed(start) == first, f"went on after {resumed(start)}, with a checkpoint of step {first}")
        expect(start.statuses()[1 - victim] in (1, 2), f"statuses {start.statuses()}: {tail(start.said())}")
        named = re.search(rf"error: rank {victim}\b.*: found", start.said())
        expect(named, f"rank {victim} is not named: {tail(start.said())}")
        # A rank that is only starting notices nothing before it has begun to watch.
        allowed = TIMEOUT if has_begun else 1.5 * TIMEOUT
        expect(took <= allowed, f"the other rank ended after {took:.1f} s")
        agree_so_far(row, run_dir, whole)
        row.lose(done(run_dir) - newest(run_dir))
        seconds += [took] if has_begun else []
        at[hit] += 1
        group = hit if hit in ("step", "start") else "save"
        left.subtract([group if left[group] else kind] if left[group] else [])


def killed_under_torchrun(lab: Lab, row: Row) -> None:
    """Ranks are killed one after another, and torchrun starts them again by itself."""
    count, total = lab.times(3, 1), lab.times(130, 80)
    whole = lab.whole(total=total)
    for _ in range(lab.times(2, 1)):
        run_dir = lab.folder("torchrun-run")
        with lab.trial(row, f"{count} kills under torchrun") as trial:
            trial.count = count
            start = lab.torchrun(lab.line(run_dir, total=total), restarts=count)
            for life in range(1, count + 1):
                lives(start, "measured:", life)
                until(lambda: newest(run_dir), "a checkpoint")  # noqa: B023
                reached(start, run_dir, newest(run_dir) + lab.draw.randint(4, 25))
                start.send(lab.draw.randrange(2), signal.SIGKILL)
                last, had = newest(run_dir), done(run_dir)
                lives(start, "resuming ", life)
                row.lose(had - resumed(start), max(0, last - resumed(start)))
            start.ended()
            agree(row, run_dir, whole)


def lives(start: Start, words: str, count: int) -> None:
    """Wait until something has been said so many times."""
    until(lambda: start.said().count(words) >= count or None not in start.statuses(), f"{words} {count} times")
    expect(start.said().count(words) >= count, f"ended with {start.statuses()}: {tail(start.said())}")


@contextlib.contextmanager
def small_disk(lab: Lab, size: str) -> Iterator[Path]:
    """A file system of its own in memory."""
    place = lab.folder("disk")
    mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place))
    try:
        yield place
    finally:
        lab.end_all()
        subprocess.run(["umount", "--recursive", "--lazy", str(place)], check=False, timeout=20)


def mount(*words: str) -> None:
    expect(mounted(*words), f"mount {' '.join(words)} failed")


def mounted(*words: str) -> bool:
    """Whether `mount` has done it."""
    return subprocess.run(["mount", *words], capture_output=True, timeout=20, check=False).returncode == 0


def fill(place: Path, leave: int) -> None:
    """Fill what is left of a disk but for `leave` bytes."""
    with (place / "ballast").open("ab", buffering=0) as file:
        for size in (2**16, 2**12):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
        file.truncate(file.tell() - leave)


def saving(run_dir: Path) -> bool:
    return any((run_dir / "checkpoints").glob(".writing-*/*/*"))


def disk_full(lab: Lab, row: Row) -> None:
    """The disk fills up in the midst of a save: for good, or until the next attempt; or is too small from the start."""
    if lab.no_mounts:
        row.not_tried.append(lab.no_mounts)
        return
    whole, plants = lab.whole(), (slow, impatient)
    for what, leave, more in (
        ("full to the last byte, and kept so", 0, ()),
        ("100 kB left", 100_000, ()),
        ("100 kB left, while training waits", 100_000, ("checkpoint.asynchronous=false",)),
    )[: lab.times(3, 1)]:
        with lab.trial(row, what), small_disk(lab, "8m") as disk:
            run_dir = disk / "run"
            line = lab.line(run_dir, *more)
            start = lab.start(2, line, *plants)
            reached(start, run_dir, 9)
            until(lambda: saving(run_dir), "a save")  # noqa: B023
            fill(disk, leave)
            until(lambda: leave or fill(disk, 0) or None not in start.statuses(), "the end of every process")  # noqa: B023
            start.ended(2)
            one_message(start.said(), "No space left on device|free, .* needed")
            sound(run_dir)
            (disk / "ballast").unlink()
            go_on(lab, row, line, whole)
    with lab.trial(row, "room is made between two attempts"), small_disk(lab, "8m") as disk:
        run_dir = disk / "run"
        start = lab.start(2, lab.line(run_dir), *plants)
        reached(start, run_dir, 9)
        until(lambda: saving(run_dir), "a save")
        fill(disk, 100_000)
        until(lambda: "attempt 1 failed" in start.said(), "the end of the first attempt")
        (disk / "ballast").unlink()
        start.ended()
        expect("attempt 1 failed" in (run_dir / "incidents.jsonl").read_text(), "not in incidents.jsonl")
        row.lose(0)
        agree(row, run_dir, whole)
    with lab.trial(row, "too small from the start"), small_disk(lab, "1m") as disk:
        refused(lab.start(2, lab.line(disk / "run")), "run_dir: found .* too little")
        expect(not (disk / "run" / "metrics.jsonl").exists(), "it has begun")


def read_only(lab: Lab, row: Row) -> None:
    """The run's folder cannot be written: before the start, before it is started again, and in mid-run."""
    if lab.no_mounts:
        row.not_tried.append(lab.no_mounts)
        return
    whole, plants = lab.whole(), (slow, impatient)
    with lab.trial(row, "before the start"), small_disk(lab, "16m") as disk:
        mount("-o", "remount,ro", str(disk))
        refused(lab.start(2, lab.line(disk / "run")), "Read-only file system")
    for what in (".", "checkpoints")[: lab.times(2, 1)]:
        with lab.trial(row, f"in mid-run: {what}"), small_disk(lab, "16m") as disk:
            run_dir, place = disk / "run", disk / "run" / what
            line = lab.line(run_dir)
            start = lab.start(2, line, *plants)
            reached(start, run_dir, 7)
            mount("--bind", str(place), str(place))  # what is open stays so; what is opened from now on is refused
            until(lambda: mounted("-o", "remount,bind,ro", str(place)), "a moment when nothing is open")  # noqa: B023
            start.ended(2)
            one_message(start.said(), "Read-only file system")
            subprocess.run(["umount", str(place)], check=True, timeout=20)
            sound(run_dir)
            go_on(lab, row, line, whole)
    if lab.short:
        return
    with lab.trial(row, "before it is started again"), small_disk(lab, "16m") as disk:
        line = lab.line(disk / "run")
        start = lab.start(2, line, *plants)
        reached(start, disk / "run", 7)
        lab.end_all()
        mount("-o", "remount,ro", str(disk))
        refused(lab.start(2, line), "Read-only file system")
        mount("-o", "remount,rw", str(disk))
        go_on(lab, row, line, whole)


def half_a_run(lab: Lab) -> tuple[Path, Path]:
    """A run that was killed after step 12, with checkpoints of steps 5 and 10; and the whole one."""
    run_dir = lab.folder("half")
    start = lab.start(2, lab.line(run_dir), slow)
    reached(start, run_dir, 12)
    until(lambda: newest(run_dir) == 10 and not list((run_dir / "checkpoints").glob(".*")), "the save of step 10")
    lab.end_all()
    return run_dir, lab.whole()


def copy_of(lab: Lab, run_dir: Path) -> Path:
    return Path(shutil.copytree(run_dir, lab.folder("copy"), dirs_exist_ok=True))


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def damaged(lab: Lab, row: Row) -> None:
    """Files of the newest checkpoint are damaged: it is passed over and named, and the run goes on from another."""
    half, whole = half_a_run(lab)
    names = files_of(path_of(half, 10))
    digest = config.settings_digest(config.from_yaml(half / "config.yaml"))
    for world in (1, 2):
        count = lab.times(150, 15)
        draw = lab.draw
        jobs = [(draw.choice(names), draw.choice(DAMAGES), draw.randrange(10**9)) for _ in range(count)]
        run_dir, out = copy_of(lab, half), lab.folder("found") / "found.json"
        lab.fork([partial(look_at_damage, run_dir, digest, jobs, out)] * world).ended(0)
        lab.end_all()
        for (name, kind, place), (found, passed, same) in zip(jobs, json.loads(out.read_text()), strict=True):
            with lab.trial(row, f"{name} {kind} ({place}), {world} ranks") as trial:
                if same and found == 10:  # zeros over zeros, or a space for a space in the manifest
                    trial.count = 0
                    continue
                expect(found == 5, f"took step {found}: {passed}")
                named = name in passed[0] or name == checkpoint.MANIFEST
                expect(named and "passed over step-00000010: " in passed[0], f"not named: {passed}")
    kinds = [(name, "cut short") for name in ("state.json", "manifest.json", "weights/.metadata")]
    kinds += [(lab.draw.choice(names), "removed"), (lab.draw.choice(names), "emptied")]
    kinds += [("weights/__0_0.distcp", "block of zeros"), ("optimizer/__1_0.distcp", "bit flipped")]
    for name, kind in kinds[lab.times(0, 6) :]:
        with lab.trial(row, f"{name} {kind}, then a whole resume"):
            run_dir = copy_of(lab, half)
            damage(path_of(run_dir, 10) / name, kind, lab.draw.randrange(10**9))
            start = lab.start(2, lab.line(run_dir))
            start.ended()
            expect(resumed(start) == 5, f"went on after step {resumed(start)}")
            expect("passed over step-00000010: " in start.said(), f"not named: {tail(start.said())}")
            expect((run_dir / "checkpoints" / "passed-over-step-00000010").is_dir(), "not set aside")
            row.lose(done(half) - 5)
            agree(row, run_dir, whole)
    with lab.trial(row, "all of them damaged"):
        run_dir = copy_of(lab, half)
        for number in steps(run_dir):
            damage(path_of(run_dir, number) / "weights/__0_0.distcp", "bit flipped", 7777)
        before = series(run_dir)
        refused(lab.start(2, lab.line(run_dir)), "expected at least one checkpoint that verifies", "step-00000005: ")
        expect(steps(run_dir) == [5, 10] and series(run_dir) == before, "something has begun anew")


def other_model(lab: Lab, row: Row) -> None:
    """The newest checkpoint in the run's folder is that of another model."""
    half, whole = half_a_run(lab)
    other = lab.folder("other")
    lab.start(2, lab.line(other, "model.hidden_dim=80", total=15)).ended()
    lab.end_all()
    for name in (15, 99)[: lab.times(2, 1)]:
        with lab.trial(row, f"as step {name}"):
            run_dir = copy_of(lab, half)
            shutil.copytree(path_of(other, 15), path_of(run_dir, name))
            start = lab.start(2, lab.line(run_dir))
            start.ended()
            expect(resumed(start) == 10, f"went on after step {resumed(start)}")
            expect(f"passed over step-{name:08d}: it was saved by a run with other settings" in start.said(), "unsaid")
            row.lose(done(half) - 10)
            agree(row, run_dir, whole)


def clock_jumps(lab: Lab, row: Row) -> None:
    """The clock jumps by a day and by years, forwards and back, between steps and in saves."""
    day, year, every = 86_400.0, 31_557_600.0, 0.01
    jumps = {3: day, 7: -2 * day, 12: 10 * year, 17: -30 * year, 23: day, 28: 25 * year}
    in_save = [day, -day, -5 * year, 9 * year] * 9
    by_clock = ("checkpoint.every_steps=null", f"checkpoint.every_minutes={every}")
    more = (*by_clock, "train.max_minutes=10", SHORT_LIMIT)
    whole = lab.whole()
    for rank in (None, 1, 0)[: lab.times(3, 1)]:
        with lab.trial(row, "on all ranks" if rank is None else f"on rank {rank}"):
            run_dir, begin = lab.folder("clock"), time.monotonic()
            start = lab.start(2, lab.line(run_dir, *more), partial(slow, 0.05), partial(clock, jumps, in_save, rank))
            start.ended()
            most = (time.monotonic() - begin) / (60 * every)
            count = len(saves(run_dir)) - 1  # the last is the run's end
            expect(0 < count <= most, f"{count} saves by the clock, where there should be at most {most:.1f}")
            row.lose(0)
            agree(row, run_dir, whole)
    if lab.short:
        return
    with lab.trial(row, "back by years, with a time limit"):
        run_dir, plant = lab.folder("clock"), partial(clock, {3: -9 * year}, [], None)
        start = lab.start(2, lab.line(run_dir, "train.max_minutes=0.06"), partial(slow, 0.2), plant)
        start.ended()
        expect("resume with" in start.said() and 0 < done(run_dir) < 40, f"not stopped: {tail(start.said())}")
        row.lose(done(run_dir) - newest(run_dir))
        go_on(lab, row, lab.line(run_dir), lab.whole())


def two_starts(lab: Lab, row: Row) -> None:
    """A run is started while it goes on, and several are started at the same instant on an empty folder."""
    whole, alone = lab.whole(), lab.whole(world=1)
    with lab.trial(row, "a second start"):
        run_dir, sign = lab.folder("twice"), lab.scratch / "the second is refused"
        first = lab.start(2, lab.line(run_dir), partial(wait_for, 7, sign))
        reached(first, run_dir, 6)
        assert isinstance(first.processes, list)
        refused(lab.start(2, lab.line(run_dir)), rf"in use by process {first.processes[0].pid} on \S+ since")
        sign.touch()
        first.ended()
        agree(row, run_dir, whole)
    for _ in range(lab.times(6, 1)):
        with lab.trial(row, "four starts at once"):
            run_dir = lab.folder("at-once")
            sign = lab.folder("sign") / "three are refused"
            starts = [lab.start(1, lab.line(run_dir), partial(wait_for, 2, sign)) for _ in range(4)]
            until(lambda: sum(start.statuses() == [2] for start in starts) == 3, "the end of three")  # noqa: B023
            sign.touch()
            until(lambda: all(None not in start.statuses() for start in starts), "the end of the fourth")  # noqa: B023
            for start in starts:
                if start.statuses() == [2]:
                    one_message(start.said(), r"in use by (process \d+ on \S+ since|another process)")
            expect([0] in [start.statuses() for start in starts], f"statuses {[s.statuses() for s in starts]}")
            agree(row, run_dir, alone)


def same_weights(run_dir: Path, other: Path) -> None:
    """See that two runs ended with the same weights and moments, bit for bit."""
    for folder in (run_dir, other):
        expect(steps(folder), f"no checkpoint in {folder}")
    mine, theirs = (checkpoint.manifest(path_of(folder, newest(folder))) for folder in (run_dir, other))
    differ = [name for name in theirs if name.endswith(".distcp") and mine.get(name) != theirs[name]]
    expect(not differ, f"other weights or moments than after leaving the step out: {differ}")


def agree_but(row: Row, number: int, run_dir: Path, other: Path) -> None:
    """See that a run equals one that left a step out by being told to."""
    mine, theirs = ([entry for entry in series(folder) if entry[0] != number] for folder in (run_dir, other))
    row.moved = (row.moved or 0) + len(set(mine) ^ set(theirs))
    expect(mine == theirs, f"other rows than those of a run that left step {number} out")
    expect(len(series(run_dir)) == len(series(other)), "a step is missing or double")
    state = checkpoint.read_state(path_of(run_dir, newest(run_dir)))
    expect(state.refused == [number], f"refused {state.refused}, not {[number]}")
    same_weights(run_dir, other)
    same_ledger(run_dir, other)
    tidy(run_dir)


def nan(lab: Lab, row: Row) -> None:
    """A gradient is not a number on one rank alone: no rank applies the update; or all go back."""
    row.asked = "the refused step, as asked"
    for action, reduced, more in (
        ("skip", False, ()),
        ("roll_back", True, ()),
        ("skip", True, ("parallel.replicate=2", "guard.compare_replicas_every_steps=1")),
        ("roll_back", False, ("parallel.replicate=2",)),
    )[: lab.times(4, 2)]:
        for number in (7, 11)[: lab.times(2, 1)]:
            rank = lab.draw.randrange(2)
            where = "in its shard" if reduced else "where it is computed"
            with lab.trial(row, f"rank {rank}, step {number}, {where}, {action} {more}"):
                other = lab.whole(*more, total=20, plants=[partial(leave_out, number)])
                run_dir = lab.folder("nan")
                plant = partial(nan_in_gradient, number, rank, reduced)
                start = lab.start(2, lab.line(run_dir, *more, f"guard.nonfinite={action}", total=20), plant)
                start.ended()
                agree_but(row, number, run_dir, other)
                if action == "roll_back":
                    again = f"going back to step {number // 5 * 5}; left out on the way: {number}"
                    expect(again in start.said(), f"unsaid: {again}: {tail(start.said())}")
                    row.lose(number - number // 5 * 5)


def spike(lab: Lab, row: Row) -> None:
    """A batch whose labels are garbage on one rank: the update is refused on all ranks, or all go back."""
    number, total, more = 52, 60, ("optim.lr=1e-2", "checkpoint.every_steps=25", "guard.window=20")
    row.asked = "the refused step, as asked"
    other = lab.whole(*more, total=total, plants=[partial(leave_out, number)])
    for action, rank in (("skip", 0), ("skip", 1), ("roll_back", 1))[: lab.times(3, 1)]:
        with lab.trial(row, f"rank {rank}, {action}"):
            run_dir = lab.folder("spike")
            line = lab.line(run_dir, *more, f"guard.spike={action}", total=total)
            start = lab.start(2, line, partial(bad_batch, number, rank))
            start.ended()
            expect(re.search(rf"step {number}: loss .*limit.*update refused", start.said()), tail(start.said()))
            agree_but(row, number, run_dir, other)
            if action == "roll_back":
                expect("going back to step 50; left out on the way: 52" in start.said(), tail(start.said()))
                row.lose(number - 50)


def stopped(lab: Lab, row: Row) -> None:
    """SIGTERM or SIGINT reaches a random rank at a random moment: all finish the step, save, and end with status 0."""
    whole, count = lab.whole(), lab.times(12, 2)
    while count > 0 and len(row.wrong) < 3:
        run_dir = lab.folder("stopped")
        line = lab.line(run_dir)
        while count > 0 and newest(run_dir) < 30:
            rank, number = lab.draw.randrange(2), lab.draw.choice((signal.SIGTERM, signal.SIGINT))
            with lab.trial(row, f"{number.name} on rank {rank} after step {newest(run_dir)}") as trial:
                start = lab.start(2, line, partial(slow, 0.03, 0.01))
                reached(start, run_dir, newest(run_dir) + lab.draw.randint(1, 9))
                time.sleep(lab.draw.uniform(0, 0.06))
                start.send(rank, number)
                start.ended()
                said = start.said()
                ended = re.search(r"stopped after step (\d+) of 40; resume with:\n  (.*)\n", said)
                expect(ended, f"unsaid: {tail(said)}")
                assert ended is not None
                expect(ended[2].endswith(f"-m magnum_train.train {' '.join(line)}"), f"resume with {ended[2]}")
                expect(done(run_dir) == newest(run_dir) == int(ended[1]), f"{done(run_dir)} steps, {newest(run_dir)}")
                row.lose(0)
                agree_so_far(row, run_dir, whole)
                tidy(run_dir)
                count -= 1
            if not trial.survived:
                break
        with lab.trial(row, f"the end of {run_dir.name}") as trial:
            trial.count = 0
            go_on(lab, row, line, whole)


def stopped_twice(lab: Lab, row: Row) -> None:
    """A second signal ends a rank at once, whether it works or waits for another."""
    whole = lab.whole()
    for rank in (0, 1)[: lab.times(2, 1)]:
        with lab.trial(row, f"rank {rank}, while rank 1 reads"):
            run_dir = lab.folder("twice-stopped")
            start = lab.start(2, lab.line(run_dir), partial(sleep_in_data, 8, 1))
            reached(start, run_dir, 7)
            time.sleep(0.5)  # until all are in step 8, which does not end
            start.send(rank, signal.SIGTERM)
            until(lambda: rank or "SIGTERM: finishing the step" in start.said(), "an answer to the first")  # noqa: B023
            time.sleep(1.2)  # two signals within a second count as one
            expect(start.statuses() == [None, None], f"ended by the first: {start.statuses()}")
            start.send(rank, signal.SIGTERM)
            until(lambda: start.statuses()[rank] is not None, "the end", 2.0)  # noqa: B023
            expect(start.statuses()[rank] == 128 + signal.SIGTERM, f"status {start.statuses()[rank]}")
            lab.end_all()
            go_on(lab, row, lab.line(run_dir), whole)


def stopped_under_torchrun(lab: Lab, row: Row) -> None:
    """SIGTERM reaches torchrun, which passes it on."""
    total = 80
    whole = lab.whole(total=total)
    with lab.trial(row, "SIGTERM to torchrun"):
        run_dir = lab.folder("torchrun-stopped")
        line = lab.line(run_dir, total=total)
        start = lab.torchrun(line, restarts=0)
        reached(start, run_dir, lab.draw.randint(6, 40))
        assert isinstance(start.processes, subprocess.Popen)
        start.processes.terminate()
        start.ended(None)
        said = start.said()
        expect(re.search(r"resume with:\n  torchrun --nproc-per-node 2 -m magnum_train\.train ", said), tail(said))
        expect(done(run_dir) == newest(run_dir), f"{done(run_dir)} steps, saved {newest(run_dir)}")
        row.lose(0)
        row.remarks.append(f"torchrun itself ended with status {start.processes.returncode}")
        go_on(lab, row, line, whole)


def hung(lab: Lab, row: Row) -> None:
    """A rank stands still (SIGSTOP), or sleeps where it should read data: the others name it and end."""
    more, seconds = (SHORT_LIMIT,), {"SIGSTOP": list[float](), "asleep": list[float]()}
    whole = lab.whole()
    for rank in (1, 0)[: lab.times(2, 0)]:
        with lab.trial(row, f"SIGSTOP of rank {rank}"):
            run_dir = lab.folder("hung")
            line = lab.line(run_dir, *more)
            start = lab.start(2, line, slow)
            reached(start, run_dir, lab.draw.randint(6, 9))
            start.send(rank, signal.SIGSTOP)
            begin = time.monotonic()
            until(lambda: start.statuses()[1 - rank] is not None, "the end of the other rank")  # noqa: B023
            seconds["SIGSTOP"].append(time.monotonic() - begin)
            words = rf"error: rank {rank} on host \S+: found no sign of life for .* phase .* of step \d+"
            expect(start.statuses()[1 - rank] == 1 and re.search(words, start.said()), tail(start.said()))
            lab.end_all()
            go_on(lab, row, line, whole)
    for rank in (1, 0)[: lab.times(2, 1)]:
        with lab.trial(row, f"rank {rank} sleeps"):
            run_dir = lab.folder("hung")
            line = lab.line(run_dir, *more)
            start = lab.start(2, line, partial(sleep_in_data, 8, rank))
            reached(start, run_dir, 7)
            begin = time.monotonic()
            start.ended(1)
            seconds["asleep"].append(time.monotonic() - begin)
            words = rf"error: rank {rank} on host \S+: found .* in phase data of step 8, while rank {1 - rank} waits"
            expect(re.search(words, start.said()), f"not named: {tail(start.said(), 3000)}")
            stacks = "".join(file.read_text() for file in (run_dir / "stacks").glob("*"))
            expect("sleeping" in stacks, "no stack in RUN/stacks shows where it sleeps")
            go_on(lab, row, line, whole)
    for what, limit in seconds.items():
        if limit:
            expect(max(limit) <= 1.1 * TIMEOUT, f"{what}: {limit}")  # this machine may have other work
            row.remarks.append(f"{what}: all ended after {max(limit):.1f} s at most, of {TIMEOUT} s allowed")
    row.figures |= {"seconds until all ended": seconds}


def hung_under_torchrun(lab: Lab, row: Row) -> None:
    """The same under torchrun, which starts the ranks again by itself."""
    more = (SHORT_LIMIT,)
    whole = lab.whole(total=60)
    for what in ("asleep", "SIGSTOP")[: lab.times(2, 1)]:
        with lab.trial(row, what):
            run_dir, rank = lab.folder("torchrun-hung"), lab.draw.randrange(2)
            plant = f"sleep_in_data(23, {rank})" if what == "asleep" else "slow(0.02, 0)"
            start = lab.torchrun(lab.line(run_dir, *more, total=60), restarts=1, plant=plant)
            reached(start, run_dir, 22)
            if what == "SIGSTOP":
                start.send(rank, signal.SIGSTOP)  # torchrun has to kill it, and takes 30 s before it does
            start.ended(limit=120)
            expect(re.search(rf"error: rank {rank} on host \S+: found", start.said()), f"unnamed: {tail(start.said())}")
            row.lose(22 - resumed(start))
            agree(row, run_dir, whole)


def elastic(lab: Lab, row: Row) -> None:
    """One run of 40 steps on 1, 2, 4 and 1 ranks, all killed on the way."""
    with lab.trial(row, "1, 2, 4, 1 ranks"):
        whole, run_dir = lab.whole(world=1), lab.folder("elastic")
        for world, last, more in ((1, 8, ()), (2, 21, ()), (4, 33, ("parallel.replicate=2",))):
            start = lab.start(world, lab.line(run_dir, *more), slow)
            reached(start, run_dir, last)
            lab.end_all()
            row.lose(done(run_dir) - newest(run_dir))
        last = newest(run_dir)
        start = lab.start(1, lab.line(run_dir))
        start.ended()
        row.lose(0, last - resumed(start))
        mine, theirs = series(run_dir), series(whole)
        expect([entry[0] for entry in mine] == [entry[0] for entry in theirs], "a step is missing or double")
        pairs = [pair for a, b in zip(mine, theirs, strict=True) for pair in zip(a[1:], b[1:], strict=True)]
        largest = max(abs((a or 0) - (b or 0)) / abs(b or 1) for a, b in pairs)
        row.figures["largest relative difference"] = largest
        row.remarks.append(f"loss and gradient norm differ by {largest:.1e} at most, relatively; allowed: 1e-5")
        expect(largest <= 1e-5, f"differs by {largest}")
        same_ledger(run_dir, whole)
        row.moved = 0
        tidy(run_dir)


def stall(lab: Lab, row: Row) -> None:
    """How long training waits for a save that is written in the background, and for one that is not."""
    each, every = lab.times(7, 2), 4
    model = ["dim=512", "n_layers=8", "n_heads=8", "n_kv_heads=4", "head_dim=64", "hidden_dim=1536"]
    more = (
        *(f"model.{word}" for word in model), "train.tokens_per_step=256", "validation.every_steps=null",
        f"checkpoint.every_steps={every}",
    )  # fmt: skip
    with lab.trial(row, "saves in turns"):
        run_dir = lab.folder("stall")
        start = lab.start(1, lab.line(run_dir, *more, total=2 * each * every), alternate)
        start.ended(limit=240)
        rows = [entry for _, entry in metrics.whole_rows(run_dir / "metrics.jsonl")]
        saved = [entry for entry in rows if "save_seconds" in entry]
        ran = {entry["step"]: (entry["time"], entry["step_seconds"]) for entry in rows if "loss" in entry}
        apart, waited = ([entry for entry in saved if entry["step"] // every % 2 == odd][1:] for odd in (1, 0))
        begun = {entry["step"]: ran[entry["step"]][0] for entry in saved}
        writing = [(begun[s["step"]] + s["save_stall_seconds"], begun[s["step"]] + s["save_seconds"]) for s in apart]
        inside = [s for end, s in ran.values() if any(a <= end - s and end <= b for a, b in writing)]
        busy = [(begun[s["step"]], begun[s["step"]] + s["save_seconds"]) for s in saved]
        outside = [s for end, s in ran.values() if not any(a < end and end - s < b for a, b in busy)]
        stalls, waits = ([entry["save_stall_seconds"] for entry in some] for some in (apart, waited))
        ratio = statistics.median(stalls) / statistics.median(waits)
        row.figures |= {
            "bytes": saved[-1]["save_bytes"], "stalls of asynchronous saves": stalls, "synchronous saves": waits,
            "asynchronous saves": [entry["save_seconds"] for entry in apart], "steps while a save is written": inside,
            "other steps": outside, "stall as a share of the synchronous save": ratio,
        }  # fmt: skip
        row.remarks.append(
            f"{saved[-1]['save_bytes'] / 1e6:,.0f} MB: training waits {statistics.median(stalls):.3f} s for an "
            f"asynchronous save and {statistics.median(waits):.3f} s for a synchronous one (medians of {len(stalls)} "
            f"and {len(waits)}, in turns in one process): {ratio:.1%}"
        )
        if inside and outside:
            slower = statistics.median(inside) / statistics.median(outside)
            row.figures["a step while a save is written, times another"] = slower
            row.remarks.append(f"a step takes {slower:.2f} × as long while a save is written ({len(inside)} steps)")
        expect(ratio < 0.5, f"training waits for {ratio:.0%} of a synchronous save")


def pruned_while_read(lab: Lab, row: Row) -> None:
    """Somebody reads a checkpoint that pruning would take, and is killed."""
    whole = lab.whole()
    with lab.trial(row, "a reader that is killed"):
        run_dir = lab.folder("read")
        reader = lab.fork([partial(read_and_wait, path_of(run_dir, 5))])
        start = lab.start(2, lab.line(run_dir, "checkpoint.keep_last=1"), partial(slow, 0.05))
        until(lambda: {5, 15} <= set(steps(run_dir)) and 10 not in steps(run_dir), "the pruning of step 10")
        reader.send(0, signal.SIGKILL)
        until(lambda: 5 not in steps(run_dir), "the pruning of step 5")
        start.ended()
        expect(steps(run_dir) == [40], f"{steps(run_dir)} are left")
        row.lose(0)
        agree(row, run_dir, whole)


PARTS: list[tuple[str, Callable[[Lab, Row], None], float]] = [
    ("SIGKILL of one of two ranks, at any moment", killed, 600),
    ("SIGKILL under torchrun --max-restarts", killed_under_torchrun, 180),
    ("disk full in the midst of a save", disk_full, 120),
    ("folder read-only", read_only, 120),
    ("checkpoint files damaged", damaged, 120),
    ("clock jumps", clock_jumps, 60),
    ("checkpoint of another model", other_model, 60),
    ("two starts of one run", two_starts, 100),
    ("NaN in one rank's gradient", nan, 100),
    ("loss spike by a bad batch", spike, 60),
    ("SIGTERM or SIGINT on one rank", stopped, 120),
    ("a second signal", stopped_twice, 60),
    ("SIGTERM to torchrun", stopped_under_torchrun, 60),
    ("a rank hangs", hung, 120),
    ("a rank hangs, under torchrun --max-restarts", hung_under_torchrun, 180),
    ("1, 2, 4 and 1 ranks", elastic, 60),
    ("stall of asynchronous saves", stall, 200),
    ("pruning while a checkpoint is read", pruned_while_read, 60),
]
"""Every fault, and the seconds that it may take."""


def in_namespaces(words: list[str]) -> tuple[list[str], str]:
    """How to run a command in namespaces of its own; empty, and why, where that cannot be."""
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    flags = ["--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "private"]
    begin = ["unshare", *user, *flags]
    try:
        probe = "d=$(mktemp -d) && mount -t tmpfs tmpfs $d && umount $d && rmdir $d"
        tried = subprocess.run([*begin, "sh", "-c", probe], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return [], f"no namespaces, and so no mounts, on this machine ({error})"
    if tried.returncode:
        return [], f"no namespaces, and so no mounts, on this machine ({tried.stderr.strip()})"
    return [*begin, sys.executable, *words], ""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="JSON file for the record")
    parser.add_argument("--short", action="store_true", help="a few of everything, for the tests")
    parser.add_argument("--seed", type=int, default=1, help="of all that is random")
    parser.add_argument("--patience", type=float, default=1.0, help="times each part's time limit, on a busy machine")
    parser.add_argument("--only", nargs="*", choices=[part.__name__ for _, part, _ in PARTS], help="parts to try")
    parser.add_argument("--inside", help=argparse.SUPPRESS)  # why there are no mounts, empty where there are
    line = parser.parse_args()
    if line.inside is None:
        words, why_not = in_namespaces([*sys.argv, "--inside", ""])
        if words:
            os.execvp(words[0], words)
        line.inside = why_not
    # Also where this was started in the background: an ignored SIGINT is inherited, and runs respect that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    scratch = Path(tempfile.mkdtemp(prefix="faults-"))
    lab, rows, begin, status = Lab(scratch, line.seed, line.short, line.inside), list[Row](), time.monotonic(), 1
    print(f"seed {line.seed}, {'short form, ' if line.short else ''}{os.cpu_count()} cores, in {scratch}", flush=True)
    load = os.getloadavg()
    try:
        for fault, part, limit in PARTS:
            if line.only is None or part.__name__ in line.only:
                rows.append(run_part(lab, fault, part, limit * line.patience))
                print(" | ".join(rows[-1].cells()), flush=True)
        status = int(any(row.wrong or row.survived < row.tried for row in rows))
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        status = 130
    finally:
        lab.end_all()
        if status == 0:
            shutil.rmtree(scratch, ignore_errors=True)
    seconds = time.monotonic() - begin
    print(f"\n{table(rows)}\n\n{seconds:.0f} seconds; record in {line.out}")
    about = environment(2, torch.device("cpu"))
    about["uncommitted"] = bool(about["uncommitted"])
    machine = {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "load before": load,
        "load after": os.getloadavg(),
    }
    record = {"seed": line.seed, "short": line.short, "seconds": seconds, "machine": machine, "about": about}
    line.out.parent.mkdir(parents=True, exist_ok=True)
    line.out.write_text(
        json.dumps(record | {"verdict": verdict(rows), "rows": list(map(asdict, rows))}, indent=1) + "\n"
    )
    print("interrupted before all were tried." if status == 130 else verdict(rows), flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
