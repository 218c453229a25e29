"""Rows of each accepted form become the conversation that they mean, or are refused with the reason."""

from typing import Any

import pytest

from data import Conversation, Message
from data.conversation import parse
from data.errors import RowError


def said(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in conversation.messages]


def turn(role: object = "human", value: object = "hi", **more: object) -> dict[str, object]:
    return {"from": role, "value": value, **more}


ANSWERED = [turn(), turn("gpt", "yo")]


@pytest.mark.parametrize("form", ["sharegpt", "auto"])
def test_sharegpt_rows_are_read_with_every_role_name(form: str) -> None:
    names = [
        "system",
        "human",
        "user",
        "gpt",
        "assistant",
        "chatgpt",
        "model",
        "function_call",
        "observation",
        "tool",
    ]
    conversation = parse({"conversations": [turn(name, name) for name in names]}, form, "src")
    roles = ["system", "user", "user", *["assistant"] * 5, "tool", "tool"]
    assert said(conversation) == list(zip(roles, names, strict=True))
    assert conversation.source == "src"
    assert conversation.weight == 1.0


@pytest.mark.parametrize("form", ["messages", "auto"])
def test_messages_rows_are_read(form: str) -> None:
    row = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}
    assert said(parse(row, form)) == [("system", "s"), ("user", "u")]


@pytest.mark.parametrize("form", ["alpaca", "auto"])
def test_alpaca_rows_are_read_with_input_history_and_system(form: str) -> None:
    row = {"instruction": "add", "input": "1 2", "output": "3", "system": "s", "history": [["a", "b"]]}
    expected = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "add\n1 2"), ("assistant", "3")]
    assert said(parse(row, form)) == expected
    assert said(parse({"instruction": "add", "input": "", "output": "3"}, form))[0] == ("user", "add")


def test_a_greeting_first_and_repeated_roles_are_taken_as_they_are() -> None:
    turns = [turn("gpt", "welcome"), turn("gpt", "again"), turn("human", "a"), turn("human", "b")]
    assert [m.content for m in parse({"conversations": turns}).messages] == ["welcome", "again", "a", "b"]


def test_text_is_kept_to_the_character() -> None:
    text = "\n \u0000 e\u0301 \ufeff<|im_end|>\r\n "
    assert parse({"conversations": [turn("human", text)]}).messages[0].content == text


@pytest.mark.parametrize("tools", [None, "", " ", "[]", "{}", "null", [], {}])
def test_empty_tools_change_nothing(tools: object) -> None:
    assert len(parse({"conversations": ANSWERED, "tools": tools}).messages) == 2


def test_tools_are_written_into_the_system_message_or_make_one() -> None:
    made = parse({"conversations": ANSWERED, "tools": '[{"name": "f"}]'})
    assert said(made)[0] == ("system", 'Tools:\n[{"name": "f"}]')
    with_system = parse({"conversations": ANSWERED, "tools": [{"name": "ü"}], "system": "be kind"})
    assert said(with_system)[0] == ("system", 'be kind\n\nTools:\n[{"name": "ü"}]')
    assert len(with_system.messages) == 3


def test_weights_of_messages_and_rows_are_read() -> None:
    turns = [
        turn(weight=2),
        turn("gpt", "a", weight=0.5),
        turn("gpt", "b", train=False, weight=3),
        turn(train=True),
    ]
    conversation = parse({"conversations": turns, "weight": 0.25})
    assert [m.weight for m in conversation.messages] == [2.0, 0.5, 0.0, 1.0]
    assert conversation.weight == 0.25


def test_columns_that_hold_none_count_as_absent() -> None:
    turns = [turn(weight=None, train=None), turn("gpt", "yo", weight=None, train=None)]
    row = {
        "conversations": turns,
        "messages": None,
        "instruction": None,
        "system": None,
        "tools": None,
        "weight": None,
    }
    assert parse(row) == parse({"conversations": ANSWERED})


def test_a_conversation_without_an_assistant_is_valid() -> None:
    assert said(parse({"conversations": [turn()]})) == [("user", "hi")]


REFUSED: list[tuple[str, Any, str, str]] = [
    ("not an object", ["a"], "not an object", "a list"),
    ("nothing known", {"text": "x"}, "missing field", "fields text; expected one of 'conversations'"),
    ("two forms", {"messages": [], "conversations": []}, "ambiguous form", "name the source's form"),
    ("no list", {"conversations": "x"}, "wrong type", "'conversations' is text ('x')"),
    ("turn no object", {"conversations": ["x"]}, "wrong type", "message 1 is text"),
    (
        "no value",
        {"conversations": [{"from": "human"}]},
        "missing field",
        "message 1 has the fields from; expected 'va",
    ),
    (
        "null value",
        {"conversations": [turn(value=None)]},
        "missing field",
        "message 1 has the fields from, value",
    ),
    (
        "number",
        {"conversations": [turn(), turn("gpt", 3)]},
        "wrong type",
        "message 2, field 'value' is a number ('3')",
    ),
    (
        "parts",
        {"messages": [{"role": "user", "content": [{}]}]},
        "wrong type",
        "'content' is a list; expected text",
    ),
    (
        "role",
        {"conversations": [turn("bot")]},
        "unknown role",
        "message 1 has the unknown role 'bot'; expected one of",
    ),
    ("alias", {"messages": [{"role": "gpt", "content": "x"}]}, "unknown role", "unknown role 'gpt'"),
    ("no messages", {"conversations": []}, "empty conversation", "no messages"),
    (
        "no text",
        {"messages": [{"role": "user", "content": " \n"}]},
        "empty conversation",
        "1 messages, all of",
    ),
    ("negative", {"conversations": [turn(weight=-1)]}, "bad weight", "message 1: weight is -1"),
    ("nan", {"conversations": [turn(weight=float("nan"))]}, "bad weight", "message 1: weight is nan"),
    ("infinite", {"conversations": ANSWERED, "weight": float("inf")}, "bad weight", "the row: weight is inf"),
    ("huge", {"conversations": ANSWERED, "weight": 10**400}, "bad weight", "the row: weight is 1000"),
    ("boolean", {"conversations": [turn(weight=True)]}, "wrong type", "'weight' is a boolean"),
    (
        "train",
        {"conversations": [turn(train="no")]},
        "wrong type",
        "'train' is text ('no'); expected true or false",
    ),
    (
        "surrogate",
        {"conversations": [turn(value="a\ud800")]},
        "not valid Unicode",
        "message 1: character 2 is half",
    ),
    (
        "calls",
        {"messages": [{"role": "assistant", "tool_calls": [{}]}]},
        "tool_calls",
        "message 1 has 'tool_calls'",
    ),
    ("tools", {"conversations": ANSWERED, "tools": 3}, "wrong type", "'tools' is a number"),
    ("no output", {"instruction": "x"}, "missing field", "expected 'output'"),
    ("history", {"instruction": "x", "output": "y", "history": [["a"]]}, "wrong type", "history 1 is a list"),
    ("history text", {"instruction": "x", "output": "y", "history": "a"}, "wrong type", "'history' is text"),
]


@pytest.mark.parametrize(("row", "kind", "reason"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_a_row_that_cannot_be_used_is_refused_with_place_and_reason(row: Any, kind: str, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        parse(row)
    assert caught.value.kind == kind
    assert reason in str(caught.value)


def test_an_unknown_form_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="form is 'chat'; expected one of auto"):
        parse({}, "chat")


@pytest.mark.parametrize(("role", "weight"), [("bot", 1.0), ("user", -1.0), ("user", float("nan"))])
def test_messages_made_by_hand_are_checked_too(role: str, weight: float) -> None:
    with pytest.raises(ValueError, match="expected"):
        Message(role, "x", weight)
