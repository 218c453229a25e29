"""The exceptions whose message is meant for the user. Knows nothing of the rest of the program."""

import re
from typing import Self


class UserError(ValueError):
    """A mistake that the user can mend; printed as one message without a traceback, exit status 2.

    Args:
        place: Where: a configuration key, a file and row, a folder.
        found: What stands there.
        expected: What would have been right.
        remedy: What to do about it; may be empty where `expected` says it.
    """

    def __init__(self, place: str, found: str, expected: str, remedy: str = "") -> None:
        self.place, self.found, self.expected, self.remedy = place, found, expected, remedy
        super().__init__(f"{place}: found {found}; expected {expected}." + (f"\n  {remedy}" if remedy else ""))

    @classmethod
    def of(cls, error: ValueError) -> Self:
        """A complaint of `model`, which has the same form in plain words: "PLACE: found F, expected E; remedy"."""
        parts = re.fullmatch(r"(.+?): found (.*), expected (.*?)(?:; (.*))?", str(error), re.DOTALL)
        if parts is None:
            return cls("model", str(error), "what the model can do")
        return cls(parts[1], parts[2], parts[3], f"{parts[4][0].upper()}{parts[4][1:]}." if parts[4] else "")


class ConfigError(UserError):
    """A setting that is unknown, of the wrong type, out of range, or at odds with another."""


class CheckpointError(UserError):
    """A run folder or checkpoint that cannot be used as asked."""


class RunError(UserError):
    """A run that stops because its own rules say so, such as too many refused updates."""


class LostRankError(UserError):
    """Another rank is gone, hangs or failed, so this one cannot go on.

    One process of the run has already said so on stderr (`watch.py`): it is not printed again. Exit status 1, at which
    torchrun restarts.
    """
