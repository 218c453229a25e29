"""Ranks watch each other: one that dies, stops or hangs is named, and ends all of them within a set time.

Each process tells the others about once a second, through the store, that it lives and where it is: host, step, phase.
Nothing here runs a collective, since a collective is what a rank may hang in. Two daemon threads do it: one talks to
the store and may block in it, where the store's host is gone; the other only looks at what has come in and at the
clock, and so can always end the process. It knows `torch.distributed`'s store and nothing else of the program.

Ages are told by this process's own monotonic clock and by whether a rank's count has changed, never by what another
host's clock says. Four things end the process, with status 1:

    a rank's count stands still for a quarter of `timeout_seconds`      killed, stopped, or its host is gone
    the store has not answered for as long                              its host is gone
    a phase lasts longer than three quarters of `timeout_seconds`       some rank hangs; all dump every thread's stack
    a rank failed by an error of its own, and some seconds went by      the others would wait for it

Which of them it was is decided once for all ranks (`Verdict`), and the rank that decides is the one that speaks.
"""

import contextlib
import faulthandler
import json
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.distributed import Store  # type: ignore[attr-defined]
from torch.distributed.checkpoint.api import CheckpointException

from magnum_train.errors import LostRankError, UserError

_STDERR = 2  # written to by its number: a thread that hangs may hold the lock of `sys.stderr`
_GOES_ON = "The same command goes on from the newest checkpoint."
_RANKS_A_SECOND = 64
"""Most ranks whose signs a rank reads a second: above it they are exchanged less often, to spare the store."""


class Phase(NamedTuple):
    """What the main thread is doing."""

    name: str
    step: int
    calls: int
    """Phases entered in this step: how far a rank is, where its step is that of another."""
    limited: bool
    since: float
    """When it was entered, by this process's monotonic clock."""


class Sign(NamedTuple):
    """A rank's sign of life."""

    number: int
    """Grows with every sign; one that stands still is a rank that is gone."""
    host: str
    step: int
    calls: int
    phase: str
    seconds: float
    """In this phase."""
    left: bool
    """Whether this is its last sign: it has ended in good order."""
    failed: str
    """The error that it ends by; empty where there is none."""


class Verdict(NamedTuple):
    """Why the run ends, as one rank found and all take it."""

    by: int
    """The rank that speaks; -1 where ranks could not agree on one and this is not the one of its host that does."""
    behind: list[int]
    """Where it is a hang, the ranks that are furthest behind; their stacks go to stderr too."""
    hang: bool
    place: str
    found: str
    expected: str
    remedy: str

    def error(self) -> LostRankError:
        """As an exception."""
        return LostRankError(self.place, self.found, self.expected, self.remedy)


class _Signs:
    """Signs of life of all ranks, exchanged through the store by a thread of its own.

    Attributes:
        seen: Each other rank's last sign, and when its count was seen to change. Replaced, never altered.
        contact: When the store last answered.
        trouble: Why it does not; empty while it does.
        verdict: Once there is one.
    """

    def __init__(self, store: Store, rank: int, world_size: int, beat: float, own: Callable[[int], Sign]) -> None:
        self.seen: Mapping[int, tuple[Sign, float]] = {}
        self.contact = time.monotonic()
        self.trouble = ""
        self.verdict: Verdict | None = None
        self._store, self._rank, self._world_size, self._beat, self._own = store, rank, world_size, beat, own
        self._proposal: Verdict | None = None
        self._turn = threading.Condition()
        self._begun = self._finished = 0
        self._asked = self._stopping = False
        self._thread = threading.Thread(target=self._run, name="signs of life", daemon=True)
        self._thread.start()

    def exchange_now(self, patience: float) -> bool:
        """Exchange signs without waiting for the next beat; whether that was done within `patience` seconds."""
        with self._turn:
            target = self._begun + 1
            self._asked = True
            self._turn.notify_all()
            return self._turn.wait_for(lambda: self._finished >= target, patience)

    def propose(self, verdict: Verdict, patience: float) -> Verdict | None:
        """Put a verdict before all ranks; the one that holds, which is the first; None where the store is silent."""
        self._proposal = verdict
        self.exchange_now(patience)
        return self.verdict

    def stop(self, patience: float) -> None:
        """End the thread, unless the store blocks it."""
        with self._turn:
            self._stopping = True
            self._turn.notify_all()
        self._thread.join(patience)

    def _run(self) -> None:
        while True:
            with self._turn:
                self._turn.wait_for(lambda: self._asked or self._stopping, self._beat)
                if self._stopping:
                    return
                self._asked = False
                self._begun += 1
            try:
                self._exchange()
                self.contact, self.trouble = time.monotonic(), ""
            except RuntimeError as error:  # torch's errors of a store are such
                self.trouble = str(error).strip().splitlines()[0]
                with contextlib.suppress(RuntimeError):  # no way to it yet: the next round tries again
                    self._store = self._store.clone()  # type: ignore[attr-defined]
            with self._turn:
                self._finished = self._begun
                self._turn.notify_all()

    def _exchange(self) -> None:
        self._store.set(f"sign {self._rank}", json.dumps(self._own(self._begun)))
        others = [rank for rank in range(self._world_size) if rank != self._rank]
        there = [r for r in others if r in self.seen or self._store.check([f"sign {r}"])]  # a get would wait for it
        signs = self._store.multi_get([f"sign {rank}" for rank in there]) if there else []
        now, seen = time.monotonic(), dict(self.seen)
        for rank, text in zip(there, signs, strict=True):
            sign = Sign(*json.loads(text))
            if rank not in seen or seen[rank][0].number != sign.number:
                seen[rank] = (sign, now)
        self.seen = seen
        if self._proposal is not None:
            self._store.compare_set("verdict", "", json.dumps(self._proposal))
        if self.verdict is None and self._store.check(["verdict"]):
            self.verdict = Verdict(*json.loads(self._store.get("verdict")))


class Watch:
    """One process's part in the watch; made and closed by `distributed.start`.

    Attributes:
        folder: The run's folder, once it is known: stacks are written to its `stacks` folder.
        lost: Whether the process ends because of another rank: its process groups are then past use.
    """

    folder: Path | None = None
    lost = False

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        *,
        timeout_seconds: float,
        address: str,
        speaks_for_host: bool,
        keeps_store: bool,
    ) -> None:
        """Begin to watch.

        Args:
            store: A connection of the watch's own: another's is locked while somebody waits in it.
            rank: This process's number.
            world_size: Number of processes.
            timeout_seconds: The longest that a rank may keep the others waiting.
            address: The store's, as HOST:PORT, for messages.
            speaks_for_host: Whether this process speaks where the store is gone and ranks cannot agree on one.
            keeps_store: Whether the store lives in this process, which then must outlive the others' last sign.
        """
        self.rank, self.world_size, self._host = rank, world_size, socket.gethostname()
        self._beat = min(1.0, timeout_seconds / 20) * max(1.0, world_size / _RANKS_A_SECOND)
        self._loss = timeout_seconds / 4
        self._hang = timeout_seconds * 3 / 4
        self._margin = timeout_seconds / 10
        self._grace = max(min(10.0, timeout_seconds / 4), 5 * self._beat)
        self._address, self._speaks_for_host, self._keeps_store = address, speaks_for_host, keeps_store
        self._phase = Phase("starting", 0, 0, True, time.monotonic())
        self._awake = time.monotonic()  # since then this process has run without a break
        self._left, self._failed, self._told = False, "", False
        self._own_error: BaseException | None = None
        self._deadline: float | None = None  # set while the main thread ends the process by itself
        self._stop = threading.Event()
        self._signs = _Signs(store, rank, world_size, self._beat, self._sign)
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._thread.start()
        self.meet()

    # What the main thread tells.

    def meet(self) -> None:
        """Exchange signs at once: after the ranks' first collective, which all reached, each knows every other's."""
        self._signs.exchange_now(self._grace)

    def phase(self, name: str, step: int | None = None, *, limited: bool = True) -> None:
        """The main thread enters a phase, or has made progress in it. Costs about a microsecond.

        All ranks call it in the same order: that tells, of ranks in the same step, which is behind.

        Args:
            name: As it stands in messages.
            step: Number of the step; None leaves it.
            limited: Whether to take it for a hang when it lasts longer than 0.75 × `timeout_seconds`.
        """
        before = self._phase
        if step is None:
            step = before.step
        calls = before.calls + 1 if step == before.step else 1
        self._phase = Phase(name, step, calls, limited, time.monotonic())

    @contextlib.contextmanager
    def unlimited(self, name: str) -> Iterator[None]:
        """A phase of any length within another, whose time begins anew after it."""
        before = self._phase
        self.phase(name, limited=False)
        try:
            yield
        finally:
            self.phase(before.name, limited=before.limited)

    def failed(self, error: BaseException) -> None:
        """This rank ends by an error of its own: tell the others, and bound the time that ending takes.

        The last call but `close`: a process that is still there some seconds later is ended, after its traceback.
        """
        if self.lost:
            return
        self._own_error = error
        self._failed = _text(error)
        self._deadline = time.monotonic() + self._grace
        self._signs.exchange_now(self._grace / 2)

    def explain(self, error: BaseException) -> UserError | None:
        """Whether an error only reflects that another rank is gone or failed; asked of the first error, once.

        Torch knows that a connection was closed, not by whom. This waits until it is clear: a rank that misses three
        signs in a row is gone. Where all live the error is this rank's own, and likewise where others fail by the same.

        Args:
            error: What the main thread caught; errors that no rank could cause in another are answered at once.

        Returns:
            What to raise in its place, said on stderr by one rank; None where the error is this rank's own. Once it has
            returned an error, the process must end, and is ended where that takes longer than some seconds.
        """
        if self.lost or not _another_could_cause(error):
            return None
        self._deadline = time.monotonic() + 5 * self._grace
        # What a rank said before it died may not have come in yet, and would look like signs of life from then on.
        fresh = self._signs.exchange_now(self._grace)
        begin = time.monotonic()  # after it: a store that is gone can take all of its patience
        counts = {rank: sign.number for rank, (sign, _) in self._signs.seen.items()}
        # Where this process itself stood still meanwhile, what the others did in that time is not known yet.
        while time.monotonic() < min(max(begin, self._awake) + self._grace, begin + 3 * self._grace):
            verdict = self._signs.verdict or self._judged(3.5 * self._beat, 0.0, _text(error))
            if verdict is not None:
                self.lost = True
                verdict = self._agreed(verdict)
                self._deadline = time.monotonic() + self._grace
                self._tell(verdict)
                return verdict.error()
            seen = self._signs.seen
            if (
                fresh
                and len(seen) == self.world_size - 1
                and all(
                    sign.left or sign.number >= counts.get(rank, sign.number) + 3 for rank, (sign, _) in seen.items()
                )
            ):
                break
            time.sleep(self._beat / 4)
        self._deadline = None
        return None

    def close(self) -> None:
        """Say farewell and stop watching. Where a rank was lost, the process has some more seconds to end."""
        if self._stop.is_set():
            return
        self._left = True
        if not self._signs.trouble:
            self._signs.exchange_now(self._grace / 2)
        if self._keeps_store and not self.lost:
            deadline = time.monotonic() + self._grace
            while time.monotonic() < deadline and not self._all_left():
                time.sleep(self._beat / 4)
        self._stop.set()
        self._signs.stop(self._beat)
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        if self.lost:  # threads that wait for the lost rank can keep an interpreter from ending
            faulthandler.dump_traceback_later(self._grace, exit=True, file=_STDERR)

    # What the threads see.

    def _sign(self, number: int) -> Sign:
        phase = self._phase
        seconds = time.monotonic() - phase.since
        return Sign(number, self._host, phase.step, phase.calls, phase.name, seconds, self._left, self._failed)

    def _all_left(self) -> bool:
        quiet = self._signs.contact - 3.5 * self._beat
        return all(sign.left or sign.failed or changed < quiet for sign, changed in self._signs.seen.values())

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(self._beat / 2):
            now = time.monotonic()
            if now - last > 3 * self._beat:  # stopped, with all its threads; nobody is blamed for that time
                self._awake = now
            last = now
            phase = self._phase
            elapsed = now - max(phase.since, self._awake)
            self._arm(phase, elapsed)
            if self._deadline is not None:
                if now > self._deadline:
                    self._give_up()
                continue
            verdict = self._signs.verdict or self._judged(self._loss, self._grace)
            if verdict is None and phase.limited and elapsed > self._hang:
                verdict = self._hung()
            if verdict is not None:
                self._end(verdict)

    def _arm(self, phase: Phase, elapsed: float) -> None:
        """Set the alarm that needs no interpreter lock, for a hang that holds it and so keeps this thread still too.

        From here and not from `phase`, since it starts a thread of C every time. Outside a limited phase it only guards
        against what others have long taken for a loss; a single process may hold the lock for as long as it likes.
        """
        if phase.limited or self.world_size > 1:
            limit = self._hang - elapsed if phase.limited else self._hang
            faulthandler.dump_traceback_later(max(limit, 0.0) + self._margin, exit=True, file=_STDERR)
        else:
            faulthandler.cancel_dump_traceback_later()

    def _judged(self, silence: float, patience: float, own: str = "") -> Verdict | None:
        """A rank, or the store, that is lost after `silence` seconds; or one that failed `patience` seconds ago.

        A rank that failed by this one's `own` error is none: what goes wrong on all is each one's to tell.
        """
        signs, now = self._signs, time.monotonic()
        quiet = now - max(signs.contact, self._awake)
        if quiet > silence and (signs.trouble or quiet > self._loss):
            why = f" ({signs.trouble})" if signs.trouble else ""
            return self._verdict(
                f"the ranks' store at {self._address}", f"no answer for {quiet:.1f} s{why}",
                f"one every {self._beat:g} s",
                f"The host that holds it, its network or its process is gone: look there first. {_GOES_ON}",
            )  # fmt: skip
        # Ages end where the store was last heard: without it nothing is known of the others.
        age = {rank: signs.contact - max(changed, self._awake) for rank, (_, changed) in signs.seen.items()}
        there = {rank: sign for rank, (sign, _) in signs.seen.items()}
        failed = [r for r, s in there.items() if s.failed not in ("", own) and now - signs.seen[r][1] >= patience]
        if failed:
            first = there[failed[0]]
            return self._verdict(
                _named(failed, there), f"failed in {_where(first)}: {first.failed}", "every rank to go on",
                f"Its own message says more; mend that first. {_GOES_ON}",
            )  # fmt: skip
        lost = [rank for rank in there if age[rank] > silence and not there[rank].left and not there[rank].failed]
        if not lost:
            return None
        return self._verdict(
            _named(lost, there),
            f"no sign of life for {max(age[rank] for rank in lost):.1f} s, last seen in {_where(there[lost[0]])}",
            f"one every {self._beat:g} s",
            f"Its process was killed or stands still, or its host is gone: look at the launcher's report and on that "
            f"host (dmesg names a process that was killed for memory). {_GOES_ON}",
        )

    def _hung(self) -> Verdict:
        """Which ranks are furthest behind, in a hang that this rank's own phase has shown."""
        signs = {rank: sign for rank, (sign, _) in self._signs.seen.items()} | {self.rank: self._sign(0)}
        here = {rank: sign for rank, sign in signs.items() if not sign.left}
        missing = [rank for rank in range(self.world_size) if rank not in signs]
        least = min((sign.step, sign.calls) for sign in here.values())
        behind = missing or [rank for rank, sign in here.items() if (sign.step, sign.calls) == least]
        ahead = [rank for rank in signs if rank not in behind]
        first = None if missing else here[behind[0]]
        found = f"{first.seconds:.1f} s in {_where(first)}" if first else "nothing of it since the start"
        if ahead:
            witness = self.rank if self.rank in ahead else ahead[0]
            other = signs[witness]
            found += f", while rank {witness} " + ("has ended" if other.left else f"waits in {_where(other)}")
        stacks = f"in {self.folder / 'stacks'}" if self.folder else "on stderr"
        remedy = f"The stacks of every thread of the ranks are {stacks}. Where a phase may rightly take longer, raise "
        return self._verdict(
            _named(behind, signs), found, f"at most {self._hang:g} s (three quarters of distributed.timeout_seconds)",
            f"{remedy}distributed.timeout_seconds. {_GOES_ON}", behind,
        )  # fmt: skip

    def _verdict(
        self, place: str, found: str, expected: str, remedy: str, behind: Sequence[int] | None = None
    ) -> Verdict:
        hang = behind is not None
        return Verdict(self.rank, list(behind or ()), hang, place, found, expected, remedy)

    # How it ends.

    def _agreed(self, verdict: Verdict) -> Verdict:
        """The verdict that all ranks take; the lowest of those that live decides it, where it can."""
        signs = self._signs
        if signs.verdict is None and not signs.trouble:
            lower = [r for r, (s, t) in signs.seen.items() if r < self.rank and not s.left and not s.failed]
            lower = [r for r in lower if signs.contact - signs.seen[r][1] < 2 * self._beat and r not in verdict.behind]
            deadline = time.monotonic() + 2 * self._beat
            while lower and signs.verdict is None and time.monotonic() < deadline:
                time.sleep(self._beat / 4)
            signs.propose(verdict, 2 * self._beat)
        if signs.verdict is None:  # the store is gone
            return verdict._replace(by=self.rank if self._speaks_for_host else -1)
        return signs.verdict

    def _tell(self, verdict: Verdict) -> None:
        if self._told:  # by the other thread
            return
        self._told = True
        if verdict.by == self.rank:
            _write(f"error: {verdict.error()}\n")
        if verdict.hang:
            self._dump_stacks(aloud=self.rank in verdict.behind)

    def _end(self, verdict: Verdict) -> None:
        # Stacks may go to a disk that does not answer: that must not keep a process either.
        faulthandler.dump_traceback_later(8 * self._beat, exit=True, file=_STDERR)
        verdict = self._agreed(verdict)
        if self._deadline is not None:  # meanwhile the main thread has begun to end by itself
            return
        self._tell(verdict)
        time.sleep(2 * self._beat)  # a launcher ends all when the first one ends: let all be heard
        os._exit(1)

    def _give_up(self) -> None:
        """The main thread did not come to an end by itself."""
        if self._own_error is not None:
            _write("".join(traceback.format_exception(self._own_error)))
        os._exit(1)

    def _dump_stacks(self, *, aloud: bool) -> None:
        phase = self._phase
        if self.folder is not None:
            try:
                stacks = self.folder / "stacks"
                stacks.mkdir(parents=True, exist_ok=True)
                with (stacks / f"step-{phase.step:08d}-rank-{self.rank:05d}.txt").open("w") as file:
                    file.write(f"rank {self.rank} on host {self._host}: {_where(self._sign(0))}\n\n")
                    file.flush()
                    faulthandler.dump_traceback(file)
            except OSError as error:  # a full disk must not keep a process that hangs
                _write(f"rank {self.rank}: its stacks could not be written: {error}\n")
                aloud = True
        if aloud:
            _write(f"rank {self.rank} on host {self._host}, stacks of its threads:\n")
            faulthandler.dump_traceback(_STDERR)


def _another_could_cause(error: BaseException) -> bool:
    """Whether an error, or one behind it, is of the kinds that torch raises where another rank is gone."""
    own = (torch.OutOfMemoryError, NotImplementedError, RecursionError)
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, CheckpointException) or (isinstance(link, RuntimeError) and not isinstance(link, own)):
            return True
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return False


def _text(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def _where(sign: Sign) -> str:
    return f"phase {sign.phase} of step {sign.step}" if sign.step else f"phase {sign.phase}"


def _named(ranks: Sequence[int], signs: Mapping[int, Sign]) -> str:
    """Ranks by host: "ranks 8, 9 on host a, rank 3 on host b"."""
    hosts: dict[str, list[int]] = {}
    for rank in sorted(ranks):
        hosts.setdefault(signs[rank].host if rank in signs else "", []).append(rank)
    parts = []
    for host, members in hosts.items():
        numbers = f"rank{'s' if len(members) > 1 else ''} {', '.join(map(str, members))}"
        parts.append(f"{numbers} on host {host}" if host else numbers)
    return ", ".join(parts)


def _write(text: str) -> None:
    os.write(_STDERR, text.encode())
