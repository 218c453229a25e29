"""Where every row and every token went, per source.

Owns the columns, their sum and how a person reads them. Knows no files and no tokens, only counts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

GATES = (
    "unsampled",
    "invalid",
    "filtered",
    "unweighted",
    "too_long",
    "cut",
    "in_validation",
    "duplicate",
    "near_duplicate",
    "waiting",
    "validation",
    "packed",
)
"""Where a row ends, in the order in which it is asked; each row that was read ends in exactly one.

unsampled: not drawn. invalid: no conversation. filtered: left out by the source's filter. unweighted: nothing in it is
trained. too_long: more tokens than `data.max_tokens`. cut: tokens alone, those behind the turn at which a long
conversation was cut. in_validation: it would train what validates. duplicate, near_duplicate: another one stays.
waiting: read from a stream, and not yet in a step."""

LOSSES = ("invalid", "unweighted", "too_long", "cut")
"""Gates at which something is lost that nobody asked to leave out."""

REASONED = ("invalid", "filtered")
"""Gates that have several reasons, which the ledger counts apart."""

_COLUMNS = ("read", *GATES)
_ALWAYS = ("read", "invalid", "unweighted", "too_long", "validation", "packed")
"""Columns that the table shows even where nothing ends in them: that nothing was lost is worth reading."""


@dataclass
class Account:
    """One source's rows and tokens.

    Tokens are counted for rows that were encoded; rows that were not drawn or could not be read have none.

    Args:
        rows: rows read and rows in each gate.
        tokens: the same in tokens.
        reasons: for each gate in `REASONED`, the number of its rows per reason.
        cut_rows: conversations that were cut; they end in other gates.
        skipped: why the source is left out; empty where it is not.
        trained_documents: documents trained so far, visits of later epochs included.
        trained_tokens: the same in tokens.
    """

    rows: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_COLUMNS, 0))
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_COLUMNS, 0))
    reasons: dict[str, dict[str, int]] = field(default_factory=lambda: {gate: {} for gate in REASONED})
    cut_rows: int = 0
    skipped: str = ""
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
        """Count rows at the gate where they end, with the reason where the gate has several."""
        account = self.accounts[source]
        account.rows[gate] += rows
        account.tokens[gate] += tokens
        if gate in REASONED and rows:
            assert reason is not None, f"a row ends in {gate} without a reason"
            account.reasons[gate][reason] = account.reasons[gate].get(reason, 0) + rows

    def was_cut(self, source: str, rows: int, tokens: int) -> None:
        """Count conversations that were cut, and the tokens that fell off."""
        self.accounts[source].cut_rows += rows
        self.ended(source, "cut", rows=0, tokens=tokens)

    def trained(self, documents: Sequence[int] | NDArray[np.int64], tokens: Sequence[int] | NDArray[np.int64]) -> None:
        """Set what has been trained so far.

        Args:
            documents: visits of documents, one number for each source in order.
            tokens: the same in tokens.
        """
        for account, count, size in zip(self.accounts.values(), documents, tokens, strict=True):
            account.trained_documents, account.trained_tokens = int(count), int(size)

    def plus(self, other: "Ledger") -> "Ledger":
        """Both together, of the same sources; what was trained is left out."""
        added = Ledger(list(self.accounts))
        for name, account in added.accounts.items():
            for one in (self.accounts[name], other.accounts[name]):
                for counts, more in ((account.rows, one.rows), (account.tokens, one.tokens)):
                    for column, number in more.items():
                        counts[column] += number
                for gate, reasons in one.reasons.items():
                    for reason, number in reasons.items():
                        account.reasons[gate][reason] = account.reasons[gate].get(reason, 0) + number
                account.cut_rows += one.cut_rows
                account.skipped = account.skipped or one.skipped
        return added

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
            for gate, reasons in account.reasons.items():
                if sum(reasons.values()) != account.rows[gate]:
                    raise ValueError(f"source {name}: {account.rows[gate]} rows {gate}, reasons {reasons}")

    def loss_share(self, source: str) -> float:
        """Share of a source that was lost, from 0 to 1: of its drawn rows or of their tokens, whichever is larger.

        Lost is what is invalid, unweighted, too long or cut; not what somebody asked to leave out.
        """
        account = self.accounts[source]
        lost, drawn = (
            [sum(counts[gate] for gate in gates) for counts in (account.rows, account.tokens)]
            for gates in (LOSSES, [gate for gate in GATES if gate != "unsampled"])
        )
        return max(part / whole if whole else 0.0 for part, whole in zip(lost, drawn, strict=True))

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a JSON file."""
        return {
            name: {
                "rows": dict(account.rows),
                "tokens": dict(account.tokens),
                "reasons": {gate: dict(sorted(reasons.items())) for gate, reasons in account.reasons.items()},
                "cut_rows": account.cut_rows,
                "skipped": account.skipped,
                "trained": {"documents": account.trained_documents, "tokens": account.trained_tokens},
            }
            for name, account in self.accounts.items()
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Ledger":
        """Read back what `to_json` gave."""
        ledger = cls(list(value))
        for name, fields in value.items():
            ledger.accounts[name] = Account(
                rows=dict(fields["rows"]),
                tokens=dict(fields["tokens"]),
                reasons={gate: dict(reasons) for gate, reasons in fields["reasons"].items()},
                cut_rows=fields["cut_rows"],
                skipped=fields["skipped"],
                trained_documents=fields["trained"]["documents"],
                trained_tokens=fields["trained"]["tokens"],
            )
        return ledger

    def columns(self) -> list[str]:
        """The columns that a table shows: what was read, and every gate in which anything ended."""
        used = {c for a in self.accounts.values() for c in _COLUMNS if a.rows[c] or a.tokens[c]}
        return [c for c in _COLUMNS if c in used or c in _ALWAYS]

    def remarks(self) -> list[str]:
        """What the columns do not tell: sources that were skipped, reasons, conversations that were cut."""
        said = []
        for name, account in self.accounts.items():
            if account.skipped:
                said.append(f"{name}: left out, {account.skipped}")
            for gate, reasons in account.reasons.items():
                said += [f"{name}: {count:,} {gate}, {reason}" for reason, count in sorted(reasons.items())]
            if account.cut_rows:
                lost = account.tokens["cut"] / account.tokens["read"]
                said.append(
                    f"{name}: conversations cut at a turn's end: {account.cut_rows:,}, {account.tokens['cut']:,} "
                    f"tokens fell off ({100 * lost:.1f} % of the source's)"
                )
        return said

    def render(self) -> str:
        """The table that a person reads at the start of a run: rows, then tokens, per source and in all.

        Returns:
            Lines of text without a newline at the end; each number of a row to the right of "read" adds up to
            it.
        """
        blocks, columns = [], self.columns()
        for unit in ("rows", "tokens"):
            counted = {name: getattr(account, unit) for name, account in self.accounts.items()}
            total = {column: sum(counts[column] for counts in counted.values()) for column in columns}
            if len(counted) > 1:
                counted["all"] = total
            table = [[unit, "read", *(gate.replace("_", " ") for gate in columns[1:])]]
            table += [[name, *(f"{counts[c]:,}" for c in columns)] for name, counts in counted.items()]
            if total["read"]:
                table.append(["share", *(f"{100 * total[c] / total['read']:.1f} %" for c in columns)])
            blocks.append(_aligned(table))
        visits = {n: (a.trained_documents, a.trained_tokens) for n, a in self.accounts.items()}
        if any(documents for documents, _ in visits.values()):
            table = [["trained so far", "documents", "tokens"]]
            table += [[name, f"{documents:,}", f"{tokens:,}"] for name, (documents, tokens) in visits.items()]
            blocks.append(_aligned(table))
        return "\n\n".join([*blocks, *(["\n".join(said)] if (said := self.remarks()) else [])])


def _aligned(table: Sequence[Sequence[str]]) -> str:
    """Names to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in table
    )
