"""The two ways in which data can be wrong: a row (set aside, counted), and all else (the run stops)."""


class DataError(ValueError):
    """A user's mistake in files or settings; its one message says place, found, expected and remedy."""


class RowError(ValueError):
    """One row cannot be used; it goes to the ledger and to the rejects file, and the others go on.

    Args:
        kind: a few words, equal for equal faults, by which the ledger counts.
        detail: the whole reason, with the place inside the row and what was found.
    """

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind
