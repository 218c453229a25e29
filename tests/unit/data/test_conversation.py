"""Rows of each accepted form become the conversation that they mean, or are refused with the reason."""

import datetime
import json
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import Conversation, DataError, Message
from data.conversation import FORMS, ROLES, TEXT, check_reading, parse, parse_own
from data.errors import RowError


def said(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in conversation.messages]


def turn(role: object = "human", value: object = "hi", **more: object) -> dict[str, object]:
    return {"from": role, "value": value, **more}


ANSWERED = [turn(), turn("gpt", "yo")]


KNOWN_ROLES = {
    "user": ["user", "human"],
    "assistant": ["assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot", "chatbot", "ai"],
    "system": ["system", "developer"],
    "tool": ["tool", "observation", "function", "function_response", "tool_response", "ipython"],
}
KNOWN_ROLES["assistant"] += ["function_call", "tool_call"]


@pytest.mark.parametrize("form", ["sharegpt", "messages", "auto"])
@pytest.mark.parametrize(("role_field", "content_field"), [("from", "value"), ("role", "content"), ("from", "text")])
def test_turns_are_read_with_every_role_name(form: str, role_field: str, content_field: str) -> None:
    pairs = [(role, name) for role, names in KNOWN_ROLES.items() for name in names]
    column = "messages" if form == "messages" else "conversations"
    turns = [{role_field: name, content_field: name} for _, name in pairs]
    conversation = parse({column: turns}, form, "src")
    assert said(conversation) == pairs
    assert conversation.source == "src"
    assert conversation.weight == 1.0
    loud = [{role_field: f" {name.title()} ", content_field: name} for _, name in pairs]
    assert said(parse({column: loud}, form)) == pairs


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


def test_a_column_called_conversation_is_one_too() -> None:
    row = {"conversation": [{"content": "hi", "role": "user", "language": "English"}], "conversations": None}
    assert said(parse(row)) == said(parse(row, "sharegpt")) == [("user", "hi")]


def test_names_of_one_thing_may_agree_and_must_not_differ() -> None:
    turns: list[dict[str, Any]] = [{"from": "gpt", "role": "assistant", "value": "a", "content": "a", "text": None}]
    assert said(parse({"conversations": turns})) == [("assistant", "a")]
    for field, other in [("role", "user"), ("content", "b"), ("content", ""), ("text", ["a"])]:
        with pytest.raises(
            RowError, match=r"message 1 has '(from|value)': text .* and .*; expected one of them"
        ) as caught:
            parse({"conversations": [{**turns[0], field: other}]})
        assert caught.value.kind == "ambiguous field"
    with pytest.raises(RowError, match="the row has 'conversations': a list and 'conversation': a list"):
        parse({"conversations": ANSWERED, "conversation": ANSWERED})


@pytest.mark.parametrize("form", ["text", "auto"])
def test_prose_is_one_message_without_a_side(form: str) -> None:
    row = {"text": " Once\n<|im_end|>", "weight": 0.5, "title": "x"}
    expected = Conversation((Message(TEXT, " Once\n<|im_end|>"),), "book", 0.5)
    assert parse(row, form, "book", default_system="be kind") == expected
    assert parse({**row, "text": [{"type": "text", "text": " Once\n"}, "<|im_end|>"]}, form, "book") == expected


def test_a_column_text_beside_another_form_is_not_looked_at() -> None:
    assert said(parse({"instruction": "a", "output": "b", "text": "### a b"})) == [("user", "a"), ("assistant", "b")]
    assert said(parse({"instruction": "a", "output": "b", "text": "### a b"}, "text")) == [(TEXT, "### a b")]
    with pytest.raises(RowError, match="'text', as prose has, and 'system', as conversations have; name the source's"):
        parse({"text": "x", "system": "s"})
    assert said(parse({"text": "x", "system": "", "tools": []})) == [(TEXT, "x")]
    assert said(parse({"text": "x", "system": "s"}, "text")) == [(TEXT, "x")]


def test_prose_stands_alone() -> None:
    with pytest.raises(RowError, match="one of 2 messages has the role 'text'") as caught:
        Conversation((Message("user", "a"), Message(TEXT, "b")), "")
    assert caught.value.kind == "text among messages"


def test_contents_in_parts_are_joined_with_nothing_between() -> None:
    parts = [{"type": "text", "text": "a ", "image_url": None}, "b", {"type": "text", "text": "\nc"}]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": []}]}
    assert said(parse(row)) == [("user", "a b\nc"), ("assistant", "")]


CALL = {"name": "f", "arguments": {"x": [1, 2], "ü": "é"}}
CALL_TEXT = '{"name": "f", "arguments": {"x": [1, 2], "ü": "é"}}'


@pytest.mark.parametrize(
    "calls",
    [
        {"tool_calls": [CALL]},
        {"tool_calls": [{"type": "function", "id": "1", "function": CALL}], "function_call": None},
        {"tool_calls": [{"type": None, "function": {"name": "f", "arguments": '{"x":[1,2],"\\u00fc":"é"}'}}]},
        {"tool_calls": [], "function_call": {"name": "f", "arguments": json.dumps(CALL["arguments"])}},
        {"tool_calls": None, "function_call": CALL},
    ],
)
def test_calls_become_the_text_that_function_call_turns_have(calls: dict[str, Any]) -> None:
    def told(content: object) -> str:
        turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": content, **calls}]
        return parse({"messages": turns}).messages[1].content

    assert json.loads(CALL_TEXT) == CALL
    assert told(None) == told("") == told([]) == CALL_TEXT
    assert told("Let me see.") == f"Let me see.\n{CALL_TEXT}"


def test_several_calls_are_a_line_each_and_weigh_what_their_message_does() -> None:
    message = {"role": "assistant", "tool_calls": [CALL, {"name": "g", "arguments": {}}], "train": False}
    found = parse({"messages": [message, {"role": "function", "name": "f", "content": "3"}]}).messages
    assert found[0] == Message("assistant", CALL_TEXT + '\n{"name": "g", "arguments": {}}', 0.0)
    assert found[1] == Message("tool", "3")


@pytest.mark.parametrize(
    "text", ["", "x=1", "[1]", "3", "[" * 10**5, '{"a": NaN}', '{"a": 1', '{"a": ' + "1" * 5000 + "}"]
)
def test_arguments_that_are_no_json_object_stay_the_text_that_they_are(text: str) -> None:
    content = parse({"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": text}]}]})
    assert json.loads(content.messages[0].content) == {"name": "f", "arguments": text}


def test_fields_that_a_columnar_file_filled_are_no_fields_of_tools_and_arguments() -> None:
    filled = {"a": 1, "b": None, "c": {"d": None, "e": [None, {"f": None}]}}
    row = {
        "messages": [
            {"role": "assistant", "function_call": {"name": None, "arguments": None}, "content": "x"},
            {"role": "assistant", "tool_calls": [{"name": "f", "arguments": filled}], "content": None},
            {"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"a": null}'}], "content": None},
        ],
        "tools": [filled],
    }
    plain = '{"a": 1, "c": {"e": [null, {}]}}'
    contents = [message.content for message in parse(row).messages]
    assert contents[:3] == [f"Tools:\n[{plain}]", "x", f'{{"name": "f", "arguments": {plain}}}']
    assert contents[3] == '{"name": "f", "arguments": {"a": null}}'  # JSON text has what was meant


def test_dates_and_decimals_in_tools_are_text() -> None:
    values = {"a": datetime.date(2024, 1, 2), "b": datetime.datetime(2024, 1, 2, 3), "c": Decimal("1.50")}
    expected = 'Tools:\n{"a": "2024-01-02", "b": "2024-01-02 03:00:00", "c": "1.50"}'
    assert parse({"conversations": ANSWERED, "tools": values}).messages[0].content == expected


def test_a_default_system_message_is_for_conversations_without_one() -> None:
    def first(row: dict[str, Any]) -> tuple[str, str]:
        return said(parse(row, default_system="be kind"))[0]

    assert first({"conversations": ANSWERED}) == ("system", "be kind")
    assert first({"conversations": ANSWERED, "system": ""}) == ("system", "be kind")
    assert first({"conversations": ANSWERED, "tools": ["f"]}) == ("system", 'be kind\n\nTools:\n["f"]')
    assert first({"instruction": "a", "output": "b"}) == ("system", "be kind")
    assert first({"conversations": ANSWERED, "system": "own"}) == ("system", "own")
    assert first({"conversations": [*ANSWERED, turn("system", "late")]}) == ("user", "hi")
    assert parse({"conversations": ANSWERED}, default_system="") == parse({"conversations": ANSWERED})


def test_a_system_column_goes_before_the_system_messages_of_the_list() -> None:
    row = {"conversations": [turn("system", "second"), *ANSWERED], "system": "first", "tools": "t"}
    assert said(parse(row))[:2] == [("system", "first\n\nTools:\nt"), ("system", "second")]


RENAMED = {
    "conversations": "dialog",
    "from": "speaker",
    "value": "says",
    "system": "sys",
    "tools": "functions",
    "weight": "w",
    "train": "learn",
}


@pytest.mark.parametrize("form", ["sharegpt", "auto"])
def test_fields_and_roles_may_have_other_names(form: str) -> None:
    turns = [
        {"speaker": "Narrator", "says": "a", "role": "lead", "content": "b", "w": 2},
        {"speaker": "gpt", "says": "c", "learn": False},
        {"speaker": "me", "says": "d", "weight": "heavy"},
        {"speaker": "ME", "says": "e"},
    ]
    row = {"dialog": turns, "sys": "s", "functions": "t", "w": 0.5, "conversations": None, "weight": "x"}
    found = parse(row, form, fields=RENAMED, roles={"Narrator": "assistant", "gpt": "user", "me": "tool"})
    assert found.weight == 0.5
    assert [(m.role, m.content, m.weight) for m in found.messages] == [
        ("system", "s\n\nTools:\nt", 1.0),
        ("assistant", "a", 2.0),
        ("user", "c", 0.0),
        ("tool", "d", 1.0),
        ("tool", "e", 1.0),
    ]


def test_fields_of_the_other_forms_may_have_other_names() -> None:
    fields = {"instruction": "q", "input": "more", "output": "a", "history": "past", "text": "story", "messages": "log"}
    alpaca = {"q": "1", "more": "2", "a": "3", "past": [["4", "5"]], "input": "not this"}
    expected = [("user", "4"), ("assistant", "5"), ("user", "1\n2"), ("assistant", "3")]
    assert said(parse(alpaca, fields=fields)) == said(parse(alpaca, "alpaca", fields=fields)) == expected
    assert said(parse({"story": "x"}, fields=fields)) == [(TEXT, "x")]
    assert said(parse({"log": [{"role": "user", "content": "x"}]}, fields=fields)) == [("user", "x")]
    with pytest.raises(RowError, match=r"'conversations' or 'conversation' \(sharegpt\), 'log' \(messages\)"):
        parse({"messages": []}, fields=fields)


@pytest.mark.parametrize("name", ["role", "from"])
def test_one_name_of_a_pair_that_is_given_leaves_the_others_out(name: str) -> None:
    turns = [{"who": "user", "role": "gpt", "from": "gpt", "content": "x"}]
    for form in ("sharegpt", "messages"):
        row = {"conversations" if form == "sharegpt" else form: turns}
        assert said(parse(row, form, fields={name: "who"})) == [("user", "x")]


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


def content(value: object) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": value}]}


def calls(value: object, role: str = "assistant", **more: object) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": None, "tool_calls": value, **more}]}


DEEP: Any = []
for _ in range(500):
    DEEP = [DEEP]
CYCLE: dict[str, Any] = {}
CYCLE["again"] = CYCLE

REFUSED: list[tuple[str, Any, str, str]] = [
    ("not an object", ["a"], "not an object", "a list"),
    ("nothing known", {"prompt": "x"}, "missing field", "fields prompt; expected one of 'conversations'"),
    (
        "two forms",
        {"messages": [], "conversations": []},
        "ambiguous form",
        "'conversations' (sharegpt) and 'messages' (messages); n",
    ),
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
    ("parts", content([{}]), "missing field", "message 1, part 1 of 'content' has the fields (none); expected 'type'"),
    (
        "image",
        content(["a", {"type": "image_url", "image_url": {"url": "x"}}]),
        "not only text",
        "message 1, part 2 of 'content' is of type 'image_url'; expected 'text'",
    ),
    ("part of a list", content([["a"]]), "wrong type", "message 1, part 1 of 'content' is a list; expected text or"),
    ("part without text", content([{"type": "text"}]), "missing field", "part 1 of 'content' has the fields type"),
    ("weighted part", content([{"type": "text", "text": "a", "train": False}]), "weight of a part", "has 'train'"),
    ("object", content({"type": "text", "text": "a"}), "wrong type", "'content' is an object; expected text, or parts"),
    (
        "role",
        {"conversations": [turn("narrator")]},
        "unknown role",
        "message 1 has the unknown role 'narrator'; expected one of user, assistant, system, tool, human, gpt,",
    ),
    ("role no text", {"conversations": [turn(["gpt"])]}, "wrong type", "message 1, field 'from' is a list; expected t"),
    ("no role", {"messages": [{"content": "x"}]}, "missing field", "expected 'role' or 'from'"),
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
    ("empty call", calls([{}]), "missing field", "message 1, call 1 has the fields (none); expected 'name'"),
    ("call no object", calls([CALL, "f()"]), "wrong type", "message 1, call 2 is text ('f()'); expected an object"),
    ("calls no list", calls("f()"), "wrong type", "'tool_calls' is text ('f()'); expected a list of calls"),
    ("no arguments", calls([{"name": "f"}]), "missing field", "call 1 has the fields name; expected 'arguments'"),
    ("function no object", calls([{"function": "f"}]), "wrong type", "call 1, field 'function' is text ('f')"),
    (
        "call no function",
        calls([{"type": "custom"}]),
        "not a function call",
        "is of type 'custom'; expected 'function'",
    ),
    ("two kinds", calls([CALL], function_call=CALL), "ambiguous field", "has 'tool_calls' and 'function_call'"),
    ("user calls", calls([CALL], role="user"), "call by another role", "message 1, by the user, has 'tool_calls'"),
    ("nan", calls([{"name": "f", "arguments": [float("nan")]}]), "no JSON", "call 1 has a number that JSON cannot"),
    ("huge argument", calls([{"name": "f", "arguments": 10**5000}]), "no JSON", "call 1 has a number that JSON cann"),
    ("deep", calls([{"name": "f", "arguments": DEEP}]), "nested too deeply", "call 1 has lists or objects in one ano"),
    ("deep text", calls([{"name": "f", "arguments": '{"a":' * 200 + "1" + "}" * 200}]), "nested too deeply", "call 1"),
    ("very deep text", calls([{"name": "f", "arguments": '{"a":' * 10**5}]), "nested too deeply", "call 1 has lists"),
    ("deep tools", {"conversations": ANSWERED, "tools": DEEP}, "nested too deeply", "field 'tools' has lists"),
    ("cycle", {"conversations": ANSWERED, "tools": CYCLE}, "nested too deeply", "field 'tools' has lists"),
    ("bytes", {"conversations": ANSWERED, "tools": [b"a"]}, "no JSON", "'tools' has a value of type bytes"),
    ("names", {"conversations": ANSWERED, "tools": [{3: 1}]}, "no JSON", "the field a number ('3'); expected names"),
    ("no text", {"text": " \n"}, "empty text", "the text has 2 characters, none of them visible"),
    ("text number", {"text": 3}, "wrong type", "the row, field 'text' is a number ('3')"),
    ("text surrogate", {"text": "\udfff"}, "not valid Unicode", "the row: character 1 is half"),
    ("huge weight", {"conversations": ANSWERED, "weight": 10**5000}, "bad weight", "weight is int too large to show"),
    ("names of fields", {None: 1, 10**5000: 2, "\ud800": 3}, "missing field", r"None, int too large to show, \ud800;"),
    ("long names", {"a" * 10**7: 1}, "missing field", "fields " + "a" * 40 + "; expected"),
    ("long role", {"conversations": [turn("a" * 10**7)]}, "unknown role", "role '" + "a" * 40 + "'; expected"),
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


@pytest.mark.parametrize("result", [Conversation((Message("user", "a"),), "mine", 2.0), {"text": "a", "weight": 2.0}])
def test_a_form_of_ones_own_returns_a_conversation_or_a_row(result: object) -> None:
    seen: list[object] = []

    def form(row: object) -> object:
        seen.append(row)
        return result

    found = parse_own(form, {"strange": 1}, "src")
    assert seen == [{"strange": 1}]
    assert [m.content for m in found.messages] == ["a"]
    assert (found.source, found.weight) == ("src", 2.0)


def test_what_a_form_of_ones_own_returns_is_read_with_the_sources_settings() -> None:
    row = {"dialog": [{"from": "me", "value": "a"}]}
    settings: dict[str, Any] = {"fields": {"conversations": "dialog"}, "roles": {"me": "user"}, "default_system": "s"}
    expected = [("system", "s"), ("user", "a")]
    assert said(parse_own(lambda row: row, row, **settings)) == expected
    assert said(parse_own(lambda _: Conversation((Message("user", "a"),), ""), row, **settings)) == expected
    assert said(parse_own(lambda _: Conversation((Message(TEXT, "a"),), ""), row, **settings)) == [(TEXT, "a")]


def failing(error: Exception) -> Callable[[Any], object]:
    def function(row: Any) -> object:
        raise error

    return function


def of_texts(row: Any) -> Conversation:
    conversation = Conversation((Message("user", "a"),), "")
    object.__setattr__(conversation, "messages", ("a",))  # as it may be where types are not checked
    return conversation


@pytest.mark.parametrize(
    ("function", "kind", "reason"),
    [
        (failing(KeyError("prompt")), "own form failed", "KeyError: 'prompt'"),
        (failing(ValueError("\ud800" * 1000)), "own form failed", "ValueError: " + r"\ud800" * 300),
        (failing(RowError("joke", "not funny")), "joke", "not funny"),
        (lambda row: None, "own form: no conversation", "the form's function returned null; expected a Conversation"),
        (lambda row: [row], "own form: no conversation", "returned a list; expected"),
        (of_texts, "own form: no conversation", "a Conversation of text ('a'); expected it to hold a tuple of Message"),
        (lambda row: {}, "missing field", "the row has the fields (none)"),
        (lambda row: Conversation((), ""), "empty conversation", "no messages"),
        (
            lambda row: Conversation((Message("tool", " "),), ""),
            "empty conversation",
            "1 messages, all of them without",
        ),
        (lambda row: Conversation((Message("bot", "a"),), ""), "unknown role", "unknown role 'bot'"),
    ],
)
def test_a_row_on_which_a_form_of_ones_own_fails_is_refused(function: Any, kind: str, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        parse_own(function, {})
    assert caught.value.kind == kind
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("form", "fields", "roles"),
    [
        ("auto", {}, {}),
        ("auto", {"text": "story", **RENAMED}, {"me": "user"}),
        ("sharegpt", RENAMED, {"me": "user"}),
        ("alpaca", {"history": "past"}, {}),
        ("text", {"text": "story"}, {}),
        ("mine.form", {"messages": "m"}, {"me": "tool"}),
    ],
)
def test_settings_of_reading_that_can_be_followed_pass(
    form: str, fields: dict[str, str], roles: dict[str, str]
) -> None:
    check_reading(form, fields, roles, "data.sources.x")


@pytest.mark.parametrize(
    ("form", "fields", "roles", "reason"),
    [
        ("chat", {}, {}, "x.form is 'chat'; expected one of auto, sharegpt, messages, alpaca, text, or a function's"),
        ("auto", {"speaker": "who"}, {}, "x.fields names 'speaker'; expected names among conversations, from,"),
        ("auto", {"dialog": "conversations"}, {}, "(the other way round: fields.conversations=dialog)"),
        ("alpaca", {"from": "who"}, {}, "x.fields names 'from'; expected names of form alpaca among instruction,"),
        ("auto", {"from": ""}, {}, "x.fields.from is ''; expected the name of a field in the rows"),
        (
            "auto",
            {"input": "a", "output": "a"},
            {},
            "x.fields.input is 'a'; expected a name of its own: fields.output is",
        ),
        ("auto", {}, {"me": "human"}, "x.roles.me is 'human'; expected one of system, user, assistant, tool"),
        ("auto", {}, {"user": "me"}, "(the other way round: roles.me=user)"),
        ("auto", {}, {"me": "text"}, "x.roles.me is 'text'; expected"),
        ("auto", {}, {" ": "user"}, "x.roles names ' '; expected the name of a role"),
        ("text", {}, {"me": "user"}, "x.roles is set; expected none, since rows of form text name no roles"),
    ],
)
def test_settings_of_reading_that_cannot_be_followed_are_refused(
    form: str, fields: dict[str, str], roles: dict[str, str], reason: str
) -> None:
    with pytest.raises(DataError) as caught:
        check_reading(form, fields, roles, "data.sources.x")
    assert str(caught.value).startswith("data.sources.x.")
    assert reason in str(caught.value)


STRANGE: list[Any] = [
    *(None, True, False, 0, -1, 3, 0.5, float("nan"), float("inf"), 10**400, 10**5000, b"x", datetime.time(), object()),
    *(
        "",
        " ",
        "x",
        "\ud800",
        "<|im_end|>",
        "user",
        "GPT",
        "text",
        "function",
        "[]",
        '{"a": null}',
        "[" * 10**5,
        "x" * 10**6,
    ),
    *(
        [],
        {},
        [[]],
        [None],
        {None: None},
        {3: "x"},
        [ANSWERED],
        {"type": "image"},
        CALL,
        {"function": CALL},
        DEEP,
        CYCLE,
    ),
]
NAMES: list[Any] = [
    *("conversations", "conversation", "messages", "from", "role", "value", "content", "text", "type", "name", None, 3),
    *("tool_calls", "function_call", "function", "arguments", "weight", "train", "system", "tools", "instruction"),
    *("input", "output", "history"),
]
SOUND: list[dict[str, Any]] = [
    {"conversations": ANSWERED, "system": "s", "tools": [CALL], "weight": 0.5},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}], "weight": 2, "train": True}]},
    {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]}]},
    {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]]},
    {"text": "Once", "weight": 1},
]


def mutated(value: Any, random: Random, share: float = 0.12) -> Any:
    """A copy in which parts are replaced, renamed, taken away or added."""
    if random.random() < share:
        return random.choice(STRANGE)
    if isinstance(value, list | tuple):
        kept = [mutated(inner, random, share) for inner in value if random.random() > share / 2]
        return kept * random.choice([1] * 9 + [3])
    if isinstance(value, dict):
        copy = {
            random.choice(NAMES) if random.random() < share / 2 else name: mutated(inner, random, share)
            for name, inner in value.items()
        }
        if random.random() < share:
            copy[random.choice(NAMES)] = random.choice(STRANGE)
        return copy
    return value


def outcome(row: Any, form: str) -> Conversation | RowError:
    try:
        return parse(row, form, default_system="s")
    except RowError as error:
        return error


def test_whatever_a_row_holds_it_is_a_conversation_or_is_refused() -> None:
    random = Random(0)
    outcomes: Counter[str] = Counter()
    for _ in range(5_000):
        found = outcome(mutated(random.choice(SOUND), random), random.choice(["auto", *FORMS]))
        if isinstance(found, RowError):
            outcomes[found.kind] += 1
            assert len(str(found).encode("utf-8")) < 1_000
        else:
            outcomes["read"] += 1
            assert {m.role for m in found.messages} <= set(ROLES) or [m.role for m in found.messages] == [TEXT]
            assert any(m.content.encode("utf-8").strip() for m in found.messages)
            assert all(0 <= weight < float("inf") for weight in [found.weight, *(m.weight for m in found.messages)])
    assert outcomes["read"] > 500
    assert len(outcomes) > 15, outcomes


@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(ROLES)), st.text().filter(str.strip), st.none() | st.integers(0, 10)),
        min_size=1,
    )
)
def test_every_way_to_write_a_conversation_is_read_alike(turns: list[tuple[str, str, int | None]]) -> None:
    expected = parse({"messages": [{"role": r, "content": c, "weight": w} for r, c, w in turns]})
    assert [(m.role, m.content, m.weight) for m in expected.messages] == [
        (r, c, 1.0 if w is None else float(w)) for r, c, w in turns
    ]
    names = {"user": "Human", "assistant": "GPT", "system": "developer", "tool": "observation"}
    for row, fields in [
        ({"conversations": [{"from": names[r], "value": [c], "weight": w} for r, c, w in turns]}, None),
        ({"messages": [{"from": names[r], "value": c, "weight": w, "role": None} for r, c, w in turns]}, None),
        ({"conversation": [{"a": r, "b": c, "weight": w} for r, c, w in turns]}, {"from": "a", "content": "b"}),
    ]:
        assert parse(row, fields=fields) == expected
