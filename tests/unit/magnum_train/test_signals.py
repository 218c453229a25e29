"""The first signal is noted at a step's end; a second one ends the process, wherever its main thread is."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from magnum_train import signals
from magnum_train.signals import Stop

HOME = Path(__file__).parents[3]


def wait_for(stop: Stop) -> None:
    deadline = time.monotonic() + 5
    while stop.requested is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_the_first_signal_is_noted_and_said_once(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_TWICE_SECONDS", 1000.0)  # this process is pytest's own
    said: list[str] = []
    if signal.getsignal(number) is signal.SIG_IGN:  # the tests were started by nohup, whose wish is respected
        signal.signal(number, signal.SIG_DFL)
    with Stop(said.append) as stop:
        assert stop.requested is None
        os.kill(os.getpid(), number)
        wait_for(stop)
        os.kill(os.getpid(), number)  # as launchers do that pass on what the process has had already
        time.sleep(0.1)
        assert stop.requested == number.name
    [line] = said
    assert line.startswith(f"{number.name}: finishing the step, then saving")
    assert ("once more ends at once" in line) == (number in (signal.SIGTERM, signal.SIGINT))


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop(lambda _: None) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.1)
            assert stop.requested is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_listener_that_is_gone_does_not_make_it_deaf() -> None:
    def say(text: str) -> None:
        raise BrokenPipeError

    with Stop(say) as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_for(stop)
        time.sleep(0.05)
        assert "signals" in {thread.name for thread in threading.enumerate()}


def test_earlier_handlers_are_put_back_and_no_thread_is_left() -> None:
    got: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: got.append(number))
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        with Stop(lambda _: None) as stop:
            os.kill(os.getpid(), signal.SIGUSR1)
            wait_for(stop)
            assert not got
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.05)
        assert got == [signal.SIGUSR1]
        assert signal.getsignal(signal.SIGINT) is interrupt
        assert signal.set_wakeup_fd(-1) == -1
        assert "signals" not in {thread.name for thread in threading.enumerate()}
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_other_threads_may_not_enter_it() -> None:
    caught: list[BaseException] = []

    def enter() -> None:
        try:
            with Stop(lambda _: None):
                pass
        except ValueError as error:
            caught.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert "main thread" in str(caught[0])
    assert "signals" not in {thread.name for thread in threading.enumerate()}


WAITING = """
import sys, threading, time
from magnum_train.signals import Stop
def say(text):
    print(text, flush=True)
with Stop(say) as stop:
    print("ready", flush=True)
    {wait}
print("went on", stop.requested, flush=True)
"""
IN_C = "import ctypes; libc = ctypes.CDLL(None); [libc.usleep(900_000) for _ in range(30)]"
"""A wait outside the interpreter that signals do interrupt, and that begins again."""
IN_A_COLLECTIVE = (
    "from torch.distributed import TCPStore; "
    "TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False).get('never')"
)


def ends(wait: str, first: signal.Signals, then: list[tuple[float, signal.Signals]]) -> tuple[int, float, str]:
    """Send signals to a process that waits; its status, seconds from the last signal to its end, and its output."""
    code = WAITING.format(wait=wait)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=HOME) as program:
        try:
            assert program.stdout is not None
            assert program.stdout.readline() == "ready\n"
            time.sleep(1.5 if wait is IN_A_COLLECTIVE else 0.2)  # torch is imported
            program.send_signal(first)
            for pause, number in then:
                time.sleep(pause)
                program.send_signal(number)
            begin = time.monotonic()
            output = program.communicate(timeout=20)[0]
            return program.returncode, time.monotonic() - begin, output
        finally:
            program.kill()


@pytest.mark.parametrize("wait", [IN_C, IN_A_COLLECTIVE])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_a_process_that_waits_in_c(wait: str, number: signal.Signals) -> None:
    status, seconds, output = ends(wait, number, [(0.3, number), (1.2, number)])
    assert status == 128 + number
    assert seconds < 5
    assert output.count("finishing the step") == 1
    assert "went on" not in output


def test_a_notice_and_then_the_signal_proper_let_the_step_end() -> None:
    status, _, output = ends("time.sleep(3)", signal.SIGUSR1, [(1.2, signal.SIGTERM), (0.1, signal.SIGTERM)])
    assert status == 0
    assert "went on SIGUSR1" in output
