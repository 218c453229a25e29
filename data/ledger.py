"""Where every row and every token went, per source.

Owns the columns, their sum and how a person reads them. Knows no files and no tokens, only counts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

GATES = ("unsampled", "invalid", "too_long", "unweighted", "validation", "packed")
"""Where a row ends, in the order in which it is asked; each row that was read ends in exactly one."""


@dataclass
class Account:
    """One source's rows and tokens.

    Tokens are counted for rows that were encoded; rows that were not drawn or could not be read have none.

    Args:
        rows: rows read and rows in each gate.
        tokens: the same in tokens.
        reasons: number of invalid rows per reason.
        trained_documents: documents trained so far, visits of later epochs included.
        trained_tokens: the same in tokens.
    """

    rows: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("read", *GATES), 0))
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("read", *GATES), 0))
    reasons: dict[str, int] = field(default_factory=dict)
    trained_documents: int = 0
    trained_tokens: int = 0


class Ledger:
    """Accounts of all sources, which must add up.

    Args:
        sources: their names.
    """

    def __init__(self, sources: Sequence[str]) -> None:
        self.accounts: dict[str, Account] = {name: Account() for name in sources}

    def read(self, source: str, rows: int = 1, tokens: int = 0) -> None:
        """Count rows where they come in (and tokens where they are made), apart from where they go out."""
        self.accounts[source].rows["read"] += rows
        self.accounts[source].tokens["read"] += tokens

    def ended(self, source: str, gate: str, rows: int = 1, tokens: int = 0, reason: str | None = None) -> None:
        """Count rows at the gate where they end, with the reason where they are invalid."""
        account = self.accounts[source]
        account.rows[gate] += rows
        account.tokens[gate] += tokens
        if reason is not None:
            account.reasons[reason] = account.reasons.get(reason, 0) + rows

    def trained(self, documents: Sequence[int] | NDArray[np.int64], tokens: Sequence[int] | NDArray[np.int64]) -> None:
        """Set what has been trained so far.

        Args:
            documents: visits of documents, one number for each source in order.
            tokens: the same in tokens.
        """
        for account, count, size in zip(self.accounts.values(), documents, tokens, strict=True):
            account.trained_documents, account.trained_tokens = int(count), int(size)

    def balance(self) -> None:
        """Check that what was read is what ended somewhere, in rows, tokens and reasons.

        Raises:
            ValueError: it is not, and by how much. That is a fault of this package, not of the data.
        """
        for name, account in self.accounts.items():
            for unit, counts in (("rows", account.rows), ("tokens", account.tokens)):
                ended = sum(counts[gate] for gate in GATES)
                if counts["read"] != ended:
                    raise ValueError(f"source {name}: {counts['read']} {unit} read, but {ended} accounted for")
            if sum(account.reasons.values()) != account.rows["invalid"]:
                raise ValueError(f"source {name}: {account.rows['invalid']} invalid rows, reasons {account.reasons}")

    def loss_share(self, source: str) -> float:
        """Share of a source's drawn rows that were lost as invalid or too long, from 0 to 1."""
        rows = self.accounts[source].rows
        drawn = rows["read"] - rows["unsampled"]
        return (rows["invalid"] + rows["too_long"]) / drawn if drawn else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a JSON file."""
        return {
            name: {
                "rows": dict(account.rows),
                "tokens": dict(account.tokens),
                "reasons": dict(sorted(account.reasons.items())),
                "trained": {"documents": account.trained_documents, "tokens": account.trained_tokens},
            }
            for name, account in self.accounts.items()
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Ledger":
        """Read back what `to_json` gave."""
        ledger = cls(list(value))
        for name, fields in value.items():
            trained = fields["trained"]
            ledger.accounts[name] = Account(
                dict(fields["rows"]),
                dict(fields["tokens"]),
                dict(fields["reasons"]),
                trained["documents"],
                trained["tokens"],
            )
        return ledger

    def render(self) -> str:
        """The table that a person reads at the start of a run: rows, then tokens, per source and in all.

        Returns:
            Lines of text without a newline at the end; each number of a row to the right of "read" adds up to
            it.
        """
        blocks = []
        for unit in ("rows", "tokens"):
            counted = {name: getattr(account, unit) for name, account in self.accounts.items()}
            total = {column: sum(counts[column] for counts in counted.values()) for column in ("read", *GATES)}
            if len(counted) > 1:
                counted["all"] = total
            table = [[unit, "read", *(gate.replace("_", " ") for gate in GATES)]]
            table += [[name, *(f"{counts[c]:,}" for c in ("read", *GATES))] for name, counts in counted.items()]
            if total["read"]:
                table.append(["share", *(f"{100 * total[c] / total['read']:.1f} %" for c in ("read", *GATES))])
            blocks.append(_aligned(table))
        visits = {n: (a.trained_documents, a.trained_tokens) for n, a in self.accounts.items()}
        if any(documents for documents, _ in visits.values()):
            table = [["trained so far", "documents", "tokens"]]
            table += [[name, f"{documents:,}", f"{tokens:,}"] for name, (documents, tokens) in visits.items()]
            blocks.append(_aligned(table))
        reasons = [
            f"{name}: {count:,} invalid, {reason}"
            for name, account in self.accounts.items()
            for reason, count in sorted(account.reasons.items())
        ]
        return "\n\n".join([*blocks, *(["\n".join(reasons)] if reasons else [])])


def _aligned(table: Sequence[Sequence[str]]) -> str:
    """Names to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in table
    )
