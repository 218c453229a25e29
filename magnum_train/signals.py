"""Signals that ask a run to stop: the first is noted, a second one ends the process whatever it is doing.

Knows neither ranks nor training: the loop looks at `Stop.requested` between steps and agrees on it with the others.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

_AT_ONCE = (signal.SIGTERM, signal.SIGINT)
"""The second of these ends the process. SIGUSR1 gives notice of a SIGTERM to come, and SIGHUP says that a terminal is
gone; they never do."""
_TWICE_SECONDS = 1.0
"""Launchers send a signal twice: torchrun passes on what the terminal or Slurm has sent to its workers as well."""


class Stop:
    """Notes SIGTERM, SIGINT, SIGHUP and SIGUSR1 while it is entered; in the main thread alone, as Python demands.

    A handler of Python's runs only when the main thread comes back to the interpreter, which one inside a collective
    may never do. So the signal's number goes through a pipe to a thread, which acts at once.

    Attributes:
        requested: Name of the first signal; None before it.
        ending: Whether the process ends already, so that a signal is no news.
    """

    requested: str | None = None
    ending = False

    def __init__(self, say: Callable[[str], None]) -> None:
        """Prepare; nothing is caught yet.

        Args:
            say: Told of the first signal, from the thread; may be silent on all ranks but one.
        """
        self._say = say

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            raise ValueError("signals are caught in the main thread alone")
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._handlers: dict[signal.Signals, Any] = {
            number: signal.signal(number, _noted)
            for number in (*_AT_ONCE, signal.SIGHUP, signal.SIGUSR1)
            if signal.getsignal(number) is not signal.SIG_IGN  # nohup's wish
        }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: it was not Python's
        signal.set_wakeup_fd(self._wakeup)
        os.write(self._write, b"\0")
        self._thread.join()
        os.close(self._write)
        os.close(self._read)

    def _listen(self) -> None:
        first: float | None = None
        while (number := os.read(self._read, 1)[0]) != 0:
            if number not in self._handlers:
                continue  # of another handler in this process
            name = signal.Signals(number).name
            if number in _AT_ONCE and first is not None and time.monotonic() - first > _TWICE_SECONDS:
                os._exit(128 + number)
            if number in _AT_ONCE and first is None:
                first = time.monotonic()
            if self.requested is None:
                self.requested = name
                if self.ending:
                    continue
                ends = "; once more ends at once" if number in _AT_ONCE else ""
                with contextlib.suppress(OSError, ValueError):  # nobody listens any more; a second one must be heard
                    self._say(f"{name}: finishing the step, then saving{ends}")


def _noted(number: int, frame: FrameType | None) -> None:
    """A handler of Python's must be there, or no number goes through the pipe."""
