"""The ledger adds up or says by how much it does not, and reads as a table."""

import json

import pytest

from data.ledger import GATES, REASONED, Ledger


def filled() -> Ledger:
    ledger = Ledger(["stheno", "opus"])
    ledger.read("stheno", 1000, 250_000)
    ledger.ended("stheno", "unsampled", 100)
    ledger.ended("stheno", "invalid", 20, reason="unknown role")
    ledger.ended("stheno", "invalid", 5, reason="missing field")
    ledger.ended("stheno", "too_long", 75, 50_000)
    ledger.ended("stheno", "packed", 800, 200_000)
    ledger.read("opus", 10, 100)
    ledger.ended("opus", "unweighted", 4, 30)
    ledger.ended("opus", "validation", 6, 70)
    return ledger


def test_columns_that_add_up_pass() -> None:
    filled().balance()


@pytest.mark.parametrize("gate", GATES)
def test_a_row_that_vanishes_or_appears_is_noticed(gate: str) -> None:
    ledger = filled()
    ledger.ended("opus", gate, reason="x" if gate in REASONED else None)
    with pytest.raises(ValueError, match="source opus: 10 rows read, but 11 accounted for"):
        ledger.balance()


def test_tokens_and_reasons_must_add_up_too() -> None:
    ledger = filled()
    ledger.read("opus", 0, 1)
    with pytest.raises(ValueError, match="101 tokens read, but 100"):
        ledger.balance()
    ledger = filled()
    ledger.read("opus")
    ledger.ended("opus", "filtered", reason="too short")
    ledger.accounts["opus"].reasons["filtered"]["too short"] += 1
    with pytest.raises(ValueError, match="1 rows filtered, reasons"):
        ledger.balance()


def test_what_is_cut_off_is_tokens_of_rows_that_go_on() -> None:
    ledger = Ledger(["logs"])
    ledger.read("logs", 2, 300)
    ledger.was_cut("logs", 1, 60)
    ledger.ended("logs", "packed", 2, 240)
    ledger.balance()
    assert "logs: conversations cut at a turn's end: 1, 60 tokens fell off (20.0 % of the source's)" in ledger.render()
    assert ledger.loss_share("logs") == 60 / 300


def test_a_source_that_is_left_out_stands_in_the_table() -> None:
    ledger = Ledger(["opus", "stheno"])
    ledger.accounts["stheno"].skipped = "owner/name is not there (missing=skip)"
    assert ledger.render().endswith("stheno: left out, owner/name is not there (missing=skip)")
    assert Ledger.from_json(ledger.to_json()).accounts == ledger.accounts


def test_gates_in_which_nothing_ended_are_not_shown_but_losses_always() -> None:
    head = filled().render().splitlines()[0]
    assert "near duplicate" not in head
    assert "too long" in Ledger(["a"]).render()


def test_it_survives_json() -> None:
    ledger = filled()
    ledger.trained([1600, 0], [400_000, 0])
    again = Ledger.from_json(json.loads(json.dumps(ledger.to_json())))
    assert again.accounts == ledger.accounts
    assert again.to_json()["stheno"]["trained"] == {"documents": 1600, "tokens": 400_000}


def test_loss_share_counts_drawn_rows_alone() -> None:
    rows_alone = filled()
    rows_alone.accounts["stheno"].tokens = dict.fromkeys(rows_alone.accounts["stheno"].tokens, 0)
    assert rows_alone.loss_share("stheno") == 100 / 900
    assert filled().loss_share("stheno") == 50_000 / 250_000  # a tenth of the rows, a fifth of their tokens
    assert Ledger(["empty"]).loss_share("empty") == 0


def test_the_table_is_aligned_and_complete() -> None:
    ledger = filled()
    ledger.trained([1600, 0], [400_000, 0])
    text = ledger.render()
    rows, tokens, trained, reasons = text.split("\n\n")
    assert [line.split() for line in rows.splitlines()] == [
        ["rows", "read", "unsampled", "invalid", "unweighted", "too", "long", "validation", "packed"],
        ["stheno", "1,000", "100", "25", "0", "75", "0", "800"],
        ["opus", "10", "0", "0", "4", "0", "6", "0"],
        ["all", "1,010", "100", "25", "4", "75", "6", "800"],
        ["share", "100.0", "%", "9.9", "%", "2.5", "%", "0.4", "%", "7.4", "%", "0.6", "%", "79.2", "%"],
    ]
    assert len({len(line) for line in rows.splitlines()}) == 1
    assert "250,100" in tokens
    assert "1,600" in trained
    assert reasons == "stheno: 5 invalid, missing field\nstheno: 20 invalid, unknown role"


def test_one_source_has_no_line_of_totals() -> None:
    assert "all" not in Ledger(["one"]).render()
