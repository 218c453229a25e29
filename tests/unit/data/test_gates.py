"""What a source's settings make of its rows: filters, cuts, forms of one's own, duplicates, sources not there."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import data.reading
from data import DataError, Tokenizer
from data.chatml import encode
from data.conversation import parse
from data.gates import Rules
from data.prepared import Prepared, prepare
from data.sources import FilterConfig, SourceConfig

Write = Callable[..., Path]
Run = Callable[..., Prepared]

OWN = """
from data import Conversation, Message
from data.errors import RowError

def lines(row):
    if "skip" in row:
        raise RowError("not for us", "it says skip")
    if "as" in row:
        return {"messages": row["as"]}
    sides = ["user", "assistant"] * len(row["lines"])
    return Conversation(tuple(Message(role, text) for role, text in zip(sides, row["lines"])), "")

def polite(conversation):
    return "please" in conversation.messages[0].content

def undecided(conversation):
    return None
"""


def turns(*texts: str, system: str | None = None, **more: Any) -> dict[str, Any]:
    sides = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    return {"messages": ([{"role": "system", "content": system}] if system else []) + sides, **more}


@pytest.fixture
def run(tmp_path: Path, tokenizer: Tokenizer) -> Run:
    """Prepare under rules that tests vary, with losses allowed."""

    def run(sources: dict[str, SourceConfig], tokenizer: Tokenizer = tokenizer, **rules: Any) -> Prepared:
        folder = tmp_path / "prepared"
        return prepare(
            sources,
            Rules(**({"max_tokens": 200} | rules)),
            prepared_dir=folder,
            tokenizer=tokenizer,
            max_loss_share=1.0,
        )

    return run


def gates(prepared: Prepared, source: str = "a") -> dict[str, int]:
    return {gate: rows for gate, rows in prepared.ledger.accounts[source].rows.items() if rows and gate != "read"}


def rejects(prepared: Prepared) -> dict[int, str]:
    lines = [json.loads(line) for line in prepared.rejects.read_text().splitlines()]
    return {line["row"]: line["reason"] for line in lines}


def train_texts(prepared: Prepared) -> list[str]:
    train = prepared.train
    return [prepared.tokenizer.decode(train.example(n).tokens.tolist()) for n in range(len(train))]


FILTERS: list[tuple[FilterConfig, int, str]] = [
    (FilterConfig(min_turns=3), 1, "fewer than 3 turns"),
    (FilterConfig(max_turns=3), 2, "more than 3 turns"),
    (FilterConfig(max_tokens=60), 3, "more than 60 tokens"),
    (FilterConfig(min_tokens=40), 1, "fewer than 40 tokens"),
    (FilterConfig(exclude=[r"\bas an AI\b"]), 3, r"matches \bas an AI\b"),
    (FilterConfig(exclude=["^again$"], exclude_in=["user"]), 2, "matches ^again$"),
    (FilterConfig(require_roles=["system"]), 1, "no system"),
]


@pytest.mark.parametrize(("chosen", "row", "reason"), FILTERS)
def test_a_filter_leaves_out_what_it_names_and_says_why(
    write_rows: Write, run: Run, chosen: FilterConfig, row: int, reason: str
) -> None:
    rows = [
        turns("hi", "yo"),
        turns("hi", "hello", "again", "hello again", system="be kind"),
        turns("hi", "Well, AS AN ai model, I would rather not talk about this at any length", "oh", system="be kind"),
        turns("tell me", "it is so, and it was so", "fine", system="be kind"),
    ]
    prepared = run({"a": SourceConfig(str(write_rows(rows)), filter=chosen)})
    found = rejects(prepared)
    assert found[row] == reason
    assert gates(prepared) == {"filtered": len(found), "packed": 4 - len(found)}
    assert sum(prepared.ledger.accounts["a"].reasons["filtered"].values()) == len(found)
    assert prepared.ledger.accounts["a"].tokens["filtered"] > 0  # what is left out is counted in tokens too
    assert set(prepared.train.rows.tolist()) == {1, 2, 3, 4} - set(found)


def test_a_long_conversation_is_cut_at_the_last_trained_turn_that_fits(
    write_rows: Write, run: Run, tokenizer: Tokenizer
) -> None:
    row = turns("q one", "a one", "q two", "a two", "q three", "a three is longer than the others by far" * 9)
    kept = encode(parse(turns("q one", "a one", "q two", "a two")), tokenizer)
    first = encode(parse(turns("q one", "a one")), tokenizer)
    source = {"a": SourceConfig(str(write_rows([row, turns("q", "a")])))}
    whole = len(encode(parse(row), tokenizer).tokens)
    for limit, expected in ((len(kept.tokens), kept), (len(kept.tokens) + 9, kept), (len(kept.tokens) - 1, first)):
        prepared = run(source, max_tokens=limit, too_long="cut_turns")
        example = prepared.train.example(0)
        np.testing.assert_array_equal(example.tokens, expected.tokens)
        np.testing.assert_array_equal(example.weights, expected.weights)
        account = prepared.ledger.accounts["a"]
        assert account.cut_rows == 1
        assert account.tokens["cut"] == whole - len(expected.tokens)
        assert account.tokens["packed"] == prepared.train.lengths.sum()
        assert f"{len(expected.tokens)} up to message" in rejects(prepared)[1]
    nothing = run(source, max_tokens=len(first.tokens) - 1, too_long="cut_turns")
    assert rejects(nothing)[1].endswith("and no turn that is trained ends before")
    assert gates(nothing) == {"too_long": 1, "packed": 1}
    with pytest.raises(
        DataError, match=r"data.sources.a: rows.jsonl, row 1 has [\d,]+ tokens; the most is 200 .*cut_turns"
    ):
        run(source, too_long="error")


def test_prose_is_trained_whole_and_not_cut(write_rows: Write, run: Run, tokenizer: Tokenizer) -> None:
    rows = [{"text": "Once upon a time."}, {"text": "word " * 300}]
    prepared = run({"a": SourceConfig(str(write_rows(rows)), form="text")}, too_long="cut_turns")
    assert train_texts(prepared) == ["<s>Once upon a time.<|im_end|>"]
    assert gates(prepared) == {"too_long": 1, "packed": 1}


def test_a_form_and_a_filter_of_ones_own(
    write_rows: Write, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    module = tmp_path / "own_rows.py"
    module.write_text(OWN)
    rows = [
        {"lines": ["please", "yes"]},
        {"lines": ["now", "no"]},
        {"skip": 1},
        {"line": 1},
        {"as": turns("please", "of course")["messages"]},
    ]
    chosen = FilterConfig(predicate="own_rows.polite")
    source = {"a": SourceConfig(str(write_rows(rows)), form="own_rows.lines", filter=chosen)}
    prepared = run(source)
    assert gates(prepared) == {"invalid": 2, "filtered": 1, "packed": 2}
    assert prepared.ledger.accounts["a"].reasons == {
        "invalid": {"not for us": 1, "own form failed": 1},
        "filtered": {"refused by own_rows.polite": 1},
    }
    assert "KeyError" in rejects(prepared)[4]
    assert run(source).reused
    module.write_text(OWN + "\n# another thought\n")
    assert not run(source).reused  # its file is part of the key

    undecided = FilterConfig(predicate="own_rows.undecided")
    with pytest.raises(DataError, match="none of its 5 rows is left to train"):
        run({"a": SourceConfig(source["a"].path, form="own_rows.lines", filter=undecided)})
    with pytest.raises(DataError, match=r"data.sources.a.filter.predicate"):
        run({"a": SourceConfig(source["a"].path, filter=FilterConfig(predicate="own_rows.nobody"))})


def test_the_systems_default_message_is_a_source_or_the_rules_own(write_rows: Write, run: Run) -> None:
    rows = [turns("hi", "yo"), turns("hi", "hey", system="be kind")]
    path = str(write_rows(rows))
    sources = {
        "a": SourceConfig(path),
        "b": SourceConfig(path, default_system="B"),
        "c": SourceConfig(path, default_system=""),
    }
    prepared = run(sources, default_system="R")
    heads = [text.split("<|im_end|>")[0].split("\n")[-1] for text in train_texts(prepared)]
    assert heads == ["R", "be kind", "B", "be kind", "hi", "be kind"]


def test_duplicates_go_within_and_across_sources_and_the_first_stays(write_rows: Write, run: Run) -> None:
    same, other = turns("hi", "yo"), turns("hi", "yo!")
    a = {"a": SourceConfig(str(write_rows([same, other, same | {"weight": 2}], "a.jsonl")))}
    b = {"b": SourceConfig(str(write_rows([turns("x", "y"), other], "b.jsonl")))}
    assert gates(run(a | b)) == {"packed": 3}
    prepared = run(a | b, deduplicate="exact")
    assert gates(prepared, "a") == {"duplicate": 1, "packed": 2}
    assert gates(prepared, "b") == {"duplicate": 1, "packed": 1}
    lines = [json.loads(line) for line in prepared.rejects.read_text().splitlines()]
    assert [(line["source"], line["file"], line["row"], line["reason"]) for line in lines] == [
        ("a", "a.jsonl", 3, "equal to a, row 1"),
        ("b", "b.jsonl", 2, "equal to a, row 2"),
    ]
    texts = train_texts(prepared)
    assert len(texts) == len(set(texts)) == 3


def test_near_duplicates_go_too(write_rows: Write, run: Run) -> None:
    words = [f"word{n}" for n in range(120)]
    changed = " ".join([*words[:60], "CHANGED", *words[61:]])
    rows = [turns("tell", " ".join(words)), turns("tell", changed), turns("tell", " ".join(words[::-1]))]
    source = {"a": SourceConfig(str(write_rows(rows)))}
    prepared = run(source, deduplicate="near", max_tokens=2000)
    assert gates(prepared) == {"near_duplicate": 1, "packed": 2}
    assert rejects(prepared)[2] == "nearly the same as a, row 1"
    assert gates(run(source, deduplicate="exact", max_tokens=2000)) == {"packed": 3}
    assert gates(run(source, deduplicate="near", near_threshold=1.0, max_tokens=2000)) == {"packed": 3}


@pytest.mark.parametrize("deduplicate", ["none", "exact", "near"])
def test_no_validation_conversation_trains_in_any_source(write_rows: Write, run: Run, deduplicate: str) -> None:
    held = turns("hi", "held out")
    a = SourceConfig(str(write_rows([turns("x", "y"), held], "a.jsonl")))
    b = SourceConfig(
        str(write_rows([held, turns("p", "q")], "b.jsonl")), validation_path=str(write_rows([held], "v.jsonl"))
    )
    prepared = run({"a": a, "b": b}, deduplicate=deduplicate)
    assert gates(prepared, "a") == {"in_validation": 1, "packed": 1}
    assert gates(prepared, "b") == {"in_validation": 1, "validation": 1, "packed": 1}
    assert not any("held out" in text for text in train_texts(prepared))
    assert set(rejects(prepared).values()) == {"validation has it: b, row 1"}


def test_shares_that_differ_do_not_leak_either(write_rows: Write, run: Run) -> None:
    path = str(write_rows([turns("say", f"it is {n}") for n in range(300)]))
    prepared = run({"a": SourceConfig(path, validation_share=0.3), "b": SourceConfig(path, validation_share=0.1)})
    held, trained = (
        {part.example(n).tokens.tobytes() for n in range(len(part))} for part in (prepared.validation, prepared.train)
    )
    assert not held & trained
    assert prepared.ledger.accounts["b"].rows["in_validation"] > 20


def test_a_source_that_is_not_there_is_an_error_or_stands_in_the_ledger(
    write_rows: Write, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = SourceConfig(str(write_rows([turns("hi", "yo")], "here.jsonl")))
    gone = SourceConfig(str(tmp_path / "gone.jsonl"), missing="skip")
    prepared = run({"here": here, "gone": gone})
    assert prepared.sources == ("gone", "here")
    assert "is not there" in prepared.ledger.accounts["gone"].skipped
    assert prepared.notes == (f"gone is left out: {gone.path} is not there (missing=skip)",)
    assert run({"here": here, "gone": gone}).reused
    with pytest.raises(
        DataError, match=r"data.sources.gone.path is .*no such file.*leave the source out with ~data.sources"
    ):
        run({"here": here, "gone": SourceConfig(gone.path)})
    with pytest.raises(DataError, match=r"all of them were left out .gone"):
        run({"gone": gone})
    Path(gone.path).write_text(json.dumps(turns("a", "b")) + "\n")
    found = run({"here": here, "gone": gone})
    assert (found.reused, len(found.train)) == (False, 2)

    def unreachable(origin: Any, ask: bool) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr(data.reading, "fingerprint", unreachable)
    with pytest.raises(
        DataError, match=r"the hub cannot be reached or does not give it \(no route\)"
    ):  # nobody knows whether it is there
        run({"hub": SourceConfig("owner/name", missing="skip")})


def test_rules_that_cannot_be_meant_are_refused() -> None:
    with pytest.raises(ValueError, match="too_long is 'truncate'; expected one of drop, cut_turns, error"):
        Rules(10, too_long="truncate")
    with pytest.raises(ValueError, match=r"near_threshold is 1.5; expected above 0, to 1"):
        Rules(10, near_threshold=1.5)


def test_what_is_not_about_the_contents_keeps_the_key(write_rows: Write, run: Run) -> None:
    path = str(write_rows([turns("hi", "yo")]))
    first = run({"a": SourceConfig(path)})
    assert run({"a": SourceConfig(path, repeat=2.0, missing="skip")}).key == first.key
    assert run({"a": SourceConfig(path)}, near_threshold=0.5).key == first.key  # not read without deduplicate=near


@pytest.mark.parametrize("deduplicate", ["none", "exact", "near"])
def test_what_is_equal_once_it_is_cut_neither_leaks_nor_stays_twice(
    write_rows: Write, run: Run, deduplicate: str
) -> None:
    """Logs of one play, saved at different lengths: cut to the same turn they are one conversation."""
    rows = [
        turns(*(f"{play} {turn} " + "la " * 9 for turn in range(length)))
        for play in range(40)
        for length in (8, 10, 12)
    ]
    source = {"a": SourceConfig(str(write_rows(rows)), validation_share=0.3)}
    prepared = run(source, too_long="cut_turns", deduplicate=deduplicate, max_tokens=120)
    parts = prepared.train, prepared.validation
    train, validation = ([part.example(n).tokens.tobytes() for n in range(len(part))] for part in parts)
    assert validation
    assert not set(train) & set(validation)
    assert gates(prepared)["in_validation"] > 0
    if deduplicate != "none":
        assert len(set(train)) == len(train)
        assert len(set(validation)) == len(validation)


def test_a_system_message_moves_no_row_to_another_side(write_rows: Write, run: Run) -> None:
    """So that the same rows validate in both eras, and none of them trains in a source with another default."""
    path = str(write_rows([turns("say", f"it is {n}") for n in range(300)]))
    plain = run({"a": SourceConfig(path, validation_share=0.2)})
    with_system = run({"a": SourceConfig(path, validation_share=0.2)}, default_system="You are a helpful assistant.")
    assert plain.validation.rows.tolist() == with_system.validation.rows.tolist()
    both = run({"a": SourceConfig(path, default_system="X"), "b": SourceConfig(path, validation_share=0.2)})
    assert gates(both, "a")["in_validation"] == len(plain.validation)


def test_prose_is_filtered_by_its_text(write_rows: Write, run: Run) -> None:
    rows = [{"text": "Once upon a time."}, {"text": "As an AI, I once lived."}]
    chosen = FilterConfig(exclude=["as an ai"])
    prepared = run({"a": SourceConfig(str(write_rows(rows)), form="text", filter=chosen)})
    assert gates(prepared) == {"filtered": 1, "packed": 1}


def test_a_conversation_that_no_pack_could_hold_is_not_encoded(write_rows: Write, run: Run) -> None:
    rows = [turns("hi", "yo"), turns("hi", "x" * 4_000_001)]
    prepared = run({"a": SourceConfig(str(write_rows(rows)))})
    assert prepared.ledger.accounts["a"].reasons["invalid"] == {"too long to encode": 1}
    assert rejects(prepared)[2] == "4,000,003 characters; the most is 4,000,000"


def test_a_vocabulary_that_finds_no_text_says_why_there_is_none(write_rows: Write, tmp_path: Path) -> None:
    source = {"a": SourceConfig(str(write_rows([{"log": "x"}, {"log": "y"}])))}
    with pytest.raises(DataError) as caught:
        prepare(source, Rules(100), prepared_dir=tmp_path / "prepared", tokenizer=None, vocab_size=400)
    message = str(caught.value)
    assert message.startswith("data.sources.a: none of its 2 rows is left to train a tokenizer on (2 invalid)")
    assert "Such as rows.jsonl, row 1: the row has the fields log; expected one of" in message


def test_two_sources_of_the_same_rows_are_said(write_rows: Write, run: Run) -> None:
    path = str(write_rows([turns("hi", "yo")]))
    prepared = run({"a": SourceConfig(path), "b": SourceConfig(path)})
    assert prepared.notes == ("data.sources.b has the same rows as data.sources.a",)


def test_a_refusal_shows_a_row_and_the_setting_that_would_help(
    write_rows: Write, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    source = {"a": SourceConfig(str(write_rows([turns("hi", "yo"), turns("hi", "la " * 99)])))}
    with pytest.raises(
        DataError, match=r"Such as rows.jsonl, row 2: \d+ tokens; .* raise data.max_tokens or data.pack_tokens"
    ):
        prepare(source, Rules(100), prepared_dir=tmp_path, tokenizer=tokenizer)
