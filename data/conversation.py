"""Rows of the accepted forms → `Conversation`.

Owns what a row means: names of fields and roles, the text of calls and of contents in parts, and the reason for
which a row is refused. Knows no files, no tokens and no settings beyond the plain names handed to it.
"""

import datetime
import decimal
import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from data.errors import DataError, RowError

ROLES = ("system", "user", "assistant", "tool")
TEXT = "text"
"""Role of prose, which no side says: a conversation with it has that one message."""
LARGEST_WEIGHT = 1_000_000
"""So that the product of a message's, a role's, a row's and a source's weight is a float32."""

FORMS = ("auto", "sharegpt", "messages", "alpaca", "text")

# A function call is text that the model has to write, so it is the assistant's; what comes back is the tool's. Under
# `function` and `function_response` comes what a function returned, under `function_call` what was asked of it.
_ROLE_NAMES = {
    "user": "user",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "ai": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "developer": "system",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
# The column that each form is told by.
_COLUMNS = {"sharegpt": ("conversations", "conversation"), "messages": ("messages",), "alpaca": ("instruction",)}
_CALL_FIELDS = ("tool_calls", "function_call")
_TURN_FIELDS = ("from", "role", "value", "content", "train", "weight", "system", "tools")
_FIELDS = {
    "sharegpt": ("conversations", *_TURN_FIELDS),
    "messages": ("messages", *_TURN_FIELDS),
    "alpaca": ("instruction", "input", "output", "history", "weight", "system", "tools"),
    "text": ("text", "weight"),
}
_ALL_FIELDS = tuple(dict.fromkeys(name for names in _FIELDS.values() for name in names))
_DEEPEST = 100
"""Levels of lists and objects in tools and arguments. A fixed number, since what Python can still write as JSON
depends on how deep the caller's own stack is, and a row must have one fate."""


@dataclass(frozen=True)
class Message:
    """What one side says once.

    Args:
        role: one of `ROLES`, or `TEXT` for prose.
        content: any Unicode text, control tokens typed in it included; they stay text.
        weight: factor on the loss of this message's tokens, at least 0.

    Raises:
        RowError: an unknown role, a weight that is negative or not finite, text that is not valid Unicode.
    """

    role: str
    content: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.role not in ROLES and self.role != TEXT:
            raise RowError(
                "unknown role", f"unknown role {_start(self.role)!r}; expected one of {', '.join((*ROLES, TEXT))}"
            )
        _check_weight(self.weight)
        if self.content.isascii():  # known without a look at the text
            return
        try:
            self.content.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RowError(
                "not valid Unicode",
                f"character {error.start + 1} is half of a surrogate pair, {self.content[error.start]!r}, "
                "which no UTF-8 text can hold",
            ) from None


@dataclass(frozen=True)
class Conversation:
    """Messages in their order, as they are: any role first, several of one role in a row. Or prose, alone.

    Args:
        messages: what was said.
        source: name of the source that it came from, for reports.
        weight: factor on the loss of the whole conversation, at least 0.

    Raises:
        RowError: a weight that is negative or not finite, prose among other messages.
    """

    messages: tuple[Message, ...]
    source: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        _check_weight(self.weight)
        if len(self.messages) > 1 and TEXT in [message.role for message in self.messages]:
            raise RowError(
                "text among messages",
                f"one of {len(self.messages)} messages has the role {TEXT!r}; prose has no sides, so it stands alone",
            )


def parse(
    row: object,
    form: str = "auto",
    source: str = "",
    *,
    fields: Mapping[str, str] | None = None,
    roles: Mapping[str, str] | None = None,
    default_system: str | None = None,
) -> Conversation:
    r"""Read one row.

    Nothing is repaired and nothing is dropped in silence: what has a meaning here is taken, what would change
    the text that the model sees and has none is refused.

    Args:
        row: an object with the columns of its form. Columns that hold None count as absent, because columnar
            files fill absent fields with None.

            - sharegpt: `conversations` (or `conversation`), a list of turns
            - messages: `messages`, a list of turns
            - alpaca: `instruction`, `output`, optional `input` and `history` (pairs of user and assistant)
            - text: `text`, prose without sides; of the other columns only `weight` is looked at

            A turn has its role under `from` or `role` and its content under `value`, `content` or `text`, in both
            forms; two of them that differ are refused, since nothing tells which is meant. Roles, letter case
            and white space around them ignored:

            - user: user, human
            - assistant: assistant, gpt, chatgpt, bing, bard, model, bot, chatbot, ai, function_call, tool_call
            - system: system, developer
            - tool: tool, observation, function, function_response, tool_response, ipython

            A content (and prose) is text or a list of parts, each text or {"type": "text", "text": …}. Parts are
            joined with nothing between them, as chat templates write them one after the other; a part of another
            type is refused. An assistant's `tool_calls` (or `function_call`) follow its content, if it has one,
            after a newline: one JSON object {"name": …, "arguments": …} a line, which is also the usual text of
            a function_call turn. Arguments in JSON text are written as the object that they are. A turn may have
            `weight` (≥ 0) and `train` (false: weight 0).

            In each form but text optional: `system` (goes first, before system messages of the list, which
            stay), `weight` (≥ 0, the conversation's) and `tools`, whose text is appended to the first system
            message as "Tools:\n…", or makes one. In objects of tools and arguments too, fields of None are absent.
        form: sharegpt, messages, alpaca or text; auto tells by the columns. `text` beside columns of another form
            is not looked at.
        source: name of the source, kept for reports.
        fields: for names above (one of each pair of turn fields is enough), what the rows call them instead.
        roles: further names of roles, one of `ROLES` for each; they win over those above.
        default_system: text of a system message for conversations without one. Not for prose.

    Returns:
        The conversation. It may be one without an assistant: that is valid, and has no weight to train on.

    Raises:
        RowError: the row cannot be used, and why.
        ValueError: `form` is none of `FORMS`.
    """
    if form not in FORMS:
        raise ValueError(f"form is {form!r}; expected one of {', '.join(FORMS)}")
    reading = _reading(tuple(fields.items()) if fields else (), tuple(roles.items()) if roles else ())
    if not isinstance(row, Mapping):
        raise RowError("not an object", f"the row is {_kind(row)}; expected an object with named fields")
    if form == "auto":
        form = _form_of(row, reading)
    weight = _weight(row, reading.names["weight"], "the row")
    if form == "text":
        content = _content(row, (reading.names["text"],), "the row")
        if not content or content.isspace():
            raise RowError("empty text", f"the text has {len(content)} characters, none of them visible")
        return Conversation((_message("the row", TEXT, content),), source, weight)
    messages = _alpaca(row, reading) if form == "alpaca" else _turns(row, reading, form)
    _refuse_empty(messages)
    system = _text(row, reading.names["system"], "the row", default="")
    if system:
        messages.insert(0, _message(f"column {reading.names['system']!r}", "system", system))
    _add_default_system(messages, default_system)
    _append_tools(messages, row.get(reading.names["tools"]), reading.names["tools"])
    return Conversation(tuple(messages), source, weight)


def parse_own(
    function: Callable[[Any], object],
    row: object,
    source: str = "",
    *,
    fields: Mapping[str, str] | None = None,
    roles: Mapping[str, str] | None = None,
    default_system: str | None = None,
) -> Conversation:
    """Read one row of a form of one's own.

    Args:
        function: gets the row; returns a `Conversation`, or a row that `parse` can read as auto.
        row: what the file holds.
        source: name of the source; a returned conversation bears it too.
        fields: as for `parse`, for returned rows.
        roles: as for `parse`, for returned rows.
        default_system: as for `parse`, for conversations too.

    Returns:
        The conversation.

    Raises:
        RowError: raised by the function, or it failed with another exception, or what it returned cannot be used.
    """
    try:
        result = function(row)
    except RowError:
        raise
    except Exception as error:
        raise RowError("own form failed", f"{type(error).__name__}: {_printable(_start(error, 300))}") from error
    if isinstance(result, Mapping):
        return parse(result, "auto", source, fields=fields, roles=roles, default_system=default_system)
    if not isinstance(result, Conversation):
        raise RowError(
            "own form: no conversation",
            f"the form's function returned {_kind(result)}; expected a Conversation or a row of a known form",
        )
    if other := [message for message in result.messages if not isinstance(message, Message)]:
        raise RowError(
            "own form: no conversation",
            f"the form's function returned a Conversation of {_kind(other[0])}; expected it to hold a tuple of Message",
        )
    messages = list(result.messages)
    _refuse_empty(messages)
    if messages[0].role != TEXT:
        _add_default_system(messages, default_system)
    return replace(result, messages=tuple(messages), source=source)


def check_reading(form: str, fields: Mapping[str, str], roles: Mapping[str, str], key: str) -> None:
    """Refuse a source's settings of form, fields and roles that `parse` cannot follow, or would not look at.

    Args:
        form: one of `FORMS`, or the dotted name of a function for `parse_own`.
        fields: names of fields, as for `parse`.
        roles: names of roles, as for `parse`.
        key: configuration key of the source, for messages.

    Raises:
        DataError: naming the key, what was found and what is expected.
    """

    def refuse(place: str, found: object, expected: str) -> NoReturn:
        raise DataError(f"{key}.{place} is {found!r}; expected {expected}")

    if form not in FORMS and "." not in form:
        refuse("form", form, f"one of {', '.join(FORMS)}, or a function's dotted name (package.module.function)")
    known = _FIELDS.get(form, _ALL_FIELDS)
    for standard, name in fields.items():
        if standard not in known:
            turned = f" (the other way round: fields.{name}={standard})" if name in known else ""
            of = f" of form {form}" if form in _FIELDS else ""
            raise DataError(
                f"{key}.fields names {standard!r}; expected names{of} among {', '.join(known)}, "
                f"each with what the rows call it{turned}"
            )
        if not name:
            refuse(f"fields.{standard}", name, "the name of a field in the rows")
        if double := [other for other in fields if other != standard and fields[other] == name]:
            refuse(f"fields.{standard}", name, f"a name of its own: fields.{double[0]} is the same")
    if roles and form in ("alpaca", "text"):
        raise DataError(f"{key}.roles is set; expected none, since rows of form {form} name no roles")
    for name, role in roles.items():
        if role not in ROLES:
            turned = f" (the other way round: roles.{role}={name})" if name in ROLES else ""
            refuse(f"roles.{name}", role, f"one of {', '.join(ROLES)}{turned}")
        if not name.strip():
            raise DataError(f"{key}.roles names {name!r}; expected the name of a role in the rows")


@dataclass(frozen=True)
class _Reading:
    """The names by which rows are read: made once for a source, looked at for each row."""

    names: Mapping[str, str]
    """Each standard name's name in the rows."""
    columns: Mapping[str, tuple[str, ...]]
    """By form, where its list of turns, or its own first field, may be."""
    role_fields: Mapping[str, tuple[str, ...]]
    """By form, where a turn may have its role; the form's own name for it first."""
    content_fields: Mapping[str, tuple[str, ...]]
    other_fields: Mapping[str, tuple[str, ...]]
    """By form, what else a turn may have that matters."""
    roles: Mapping[str, str]


@functools.lru_cache(maxsize=256)
def _reading(fields: tuple[tuple[str, str], ...], roles: tuple[tuple[str, str], ...]) -> _Reading:
    given = dict(fields)

    def either(*standard: str) -> tuple[str, ...]:
        """Names that were given win: who says where a thing is does not mean its other usual places."""
        return tuple(given[name] for name in standard if name in given) or standard

    columns = {form: either(*names) for form, names in _COLUMNS.items()}
    role_fields = {"sharegpt": either("from", "role"), "messages": either("role", "from")}
    content_fields = {"sharegpt": either("value", "content"), "messages": either("content", "value")}
    if "value" not in given and "content" not in given:
        content_fields = {form: (*names, "text") for form, names in content_fields.items()}
    names = {name: name for name in _ALL_FIELDS} | given
    others = (names["weight"], names["train"], *_CALL_FIELDS)
    without_case = {_without_case(name): role for name, role in roles}
    return _Reading(
        names=names,
        columns=columns,
        role_fields=role_fields,
        content_fields=content_fields,
        other_fields={form: (*role_fields[form][1:], *content_fields[form][1:], *others) for form in role_fields},
        roles=_ROLE_NAMES | without_case | dict(roles),
    )


def _without_case(role: str) -> str:
    return role.strip().lower()


def _form_of(row: Mapping[Any, Any], reading: _Reading) -> str:
    found = [
        (form, column) for form, columns in reading.columns.items() for column in columns if row.get(column) is not None
    ]
    if len({form for form, _ in found}) == 1:
        return found[0][0]
    if found:
        shown = " and ".join(f"{column!r} ({form})" for form, column in found)
        raise RowError("ambiguous form", f"the row has {shown}; name the source's form")
    text = reading.names["text"]
    if row.get(text) is None:
        columns = {**reading.columns, "text": (text,)}
        expected = ", ".join(f"{' or '.join(map(repr, names))} ({form})" for form, names in columns.items())
        raise RowError("missing field", f"the row has the fields {_names(row)}; expected one of {expected}")
    for standard in ("system", "tools"):
        if not _is_absent(row.get(reading.names[standard])):
            raise RowError(
                "ambiguous form",
                f"the row has {text!r}, as prose has, and {reading.names[standard]!r}, as conversations have; "
                "name the source's form",
            )
    return "text"


def _turns(row: Mapping[Any, Any], reading: _Reading, form: str) -> list[Message]:
    column, turns = _one_of(row, reading.columns[form], "the row")
    if turns is None:
        expected = " or ".join(map(repr, reading.columns[form]))
        raise RowError("missing field", f"the row has the fields {_names(row)}; expected {expected}")
    if not isinstance(turns, list | tuple):
        raise RowError("wrong type", f"field {column!r} is {_kind(turns)}; expected a list of messages")
    role_fields, content_fields, roles = reading.role_fields[form], reading.content_fields[form], reading.roles
    first_role, first_content, others = role_fields[0], content_fields[0], reading.other_fields[form]
    messages = []
    for number, turn in enumerate(turns, 1):
        place = f"message {number}"
        if not isinstance(turn, Mapping):
            raise RowError("wrong type", f"{place} is {_kind(turn)}; expected an object")
        name, content = turn.get(first_role), turn.get(first_content)
        if (
            isinstance(name, str)
            and isinstance(content, str)
            and name in roles
            and (len(turn) == 2 or all(turn.get(field) is None for field in others))
        ):
            messages.append(_message(place, roles[name], content))  # nothing else to look at: the fast way for most
            continue
        role = _role(turn, role_fields, roles, place)
        calls = _calls(turn, role, place)
        content = _content(turn, content_fields, place, default="" if calls else None)
        content = f"{content}\n{calls}" if content and calls else content or calls
        train = turn.get(reading.names["train"])
        if train is not None and not isinstance(train, bool):
            field = reading.names["train"]
            raise RowError("wrong type", f"{place}, field {field!r} is {_kind(train)}; expected true or false")
        weight = _weight(turn, reading.names["weight"], place)
        messages.append(_message(place, role, content, 0.0 if train is False else weight))
    return messages


def _role(turn: Mapping[Any, Any], fields: Sequence[str], roles: Mapping[str, str], place: str) -> str:
    found = {field: turn[field] for field in fields if turn.get(field) is not None}
    if not found:
        raise _missing(turn, fields, place)
    meant = set()
    for field, name in found.items():
        if not isinstance(name, str):
            raise RowError("wrong type", f"{place}, field {field!r} is {_kind(name)}; expected text")
        role = roles.get(name) or roles.get(_without_case(name))
        if role is None:
            raise RowError(
                "unknown role",
                f"{place} has the unknown role {_start(name)!r}; expected one of {', '.join(roles)}, "
                "or a name given in the source's roles",
            )
        meant.add(role)
    if len(meant) > 1:
        raise _ambiguous(found, place)
    return meant.pop()


def _content(turn: Mapping[Any, Any], fields: Sequence[str], place: str, default: str | None = None) -> str:
    """Text, or the texts of its parts one after the other: any separator would be text that nobody wrote."""
    field, content = _one_of(turn, fields, place)
    if isinstance(content, str):
        return content
    if content is None:
        if default is None:
            raise _missing(turn, fields, place)
        return default
    if not isinstance(content, list | tuple):
        raise RowError("wrong type", f"{place}, field {field!r} is {_kind(content)}; expected text, or parts of text")
    return "".join(
        part if isinstance(part, str) else _part(part, f"{place}, part {number} of {field!r}")
        for number, part in enumerate(content, 1)
    )


def _part(part: object, place: str) -> str:
    if not isinstance(part, Mapping):
        raise RowError("wrong type", f"{place} is {_kind(part)}; expected text or an object with 'type': 'text'")
    kind = part.get("type")
    if kind is None:
        raise _missing(part, ("type",), place)
    if kind != "text":
        raise RowError("not only text", f"{place} is of type {_start(kind)!r}; expected 'text', which alone is trained")
    for field in ("train", "weight"):
        if part.get(field) is not None:
            raise RowError("weight of a part", f"{place} has {field!r}; expected it at the message: it has one weight")
    return _text(part, "text", place)


def _calls(turn: Mapping[Any, Any], role: str, place: str) -> str:
    """The text form of a message's calls, one a line; empty where it has none."""
    found = {field: turn[field] for field in _CALL_FIELDS if not _is_absent(turn.get(field))}
    if not found:
        return ""
    if len(found) > 1:
        raise RowError("ambiguous field", f"{place} has {' and '.join(map(repr, found))}; expected one of them")
    field, calls = found.popitem()
    if role != "assistant":
        raise RowError("call by another role", f"{place}, by the {role}, has {field!r}; expected it of assistants")
    if field == "function_call":
        return _call(calls, f"{place}, field {field!r}")
    if not isinstance(calls, list | tuple):
        raise RowError("wrong type", f"{place}, field {field!r} is {_kind(calls)}; expected a list of calls")
    return "\n".join(_call(call, f"{place}, call {number}") for number, call in enumerate(calls, 1))


def _call(call: object, place: str) -> str:
    if not isinstance(call, Mapping):
        raise RowError("wrong type", f"{place} is {_kind(call)}; expected an object")
    if call.get("type") not in (None, "function"):
        raise RowError("not a function call", f"{place} is of type {_start(call['type'])!r}; expected 'function'")
    function = call if call.get("function") is None else call["function"]
    if not isinstance(function, Mapping):
        raise RowError("wrong type", f"{place}, field 'function' is {_kind(function)}; expected an object")
    name, arguments = _text(function, "name", place), function.get("arguments")
    if arguments is None:
        raise _missing(function, ("arguments",), place)
    arguments = _object_in(arguments, place) if isinstance(arguments, str) else _plain(arguments, place)
    return _json({"name": name, "arguments": arguments}, place)


def _object_in(text: str, place: str) -> Any:
    """The object whose JSON a text is; the text itself where it is not."""
    if not text.lstrip(" \t\n\r").startswith("{"):
        return text
    try:
        value = json.loads(text, parse_constant=_no_json)
    except RecursionError:
        raise _too_deep(place) from None
    except ValueError:
        return text
    return _plain(value, place, nulls=True)


def _no_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _alpaca(row: Mapping[Any, Any], reading: _Reading) -> list[Message]:
    names = reading.names
    messages = []
    history = row.get(names["history"])
    if history is not None and not isinstance(history, list | tuple):
        raise RowError("wrong type", f"field {names['history']!r} is {_kind(history)}; expected a list of pairs")
    for number, pair in enumerate(history or (), 1):
        place = f"history {number}"
        two_texts = isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(t, str) for t in pair)
        if not two_texts:
            raise RowError("wrong type", f"{place} is {_kind(pair)}; expected a pair of texts, user and assistant")
        messages += [_message(place, "user", pair[0]), _message(place, "assistant", pair[1])]
    user = _text(row, names["instruction"], "the row")
    extra = _text(row, names["input"], "the row", default="")
    messages.append(_message(f"field {names['instruction']!r}", "user", f"{user}\n{extra}" if extra else user))
    answer = _text(row, names["output"], "the row")
    messages.append(_message(f"field {names['output']!r}", "assistant", answer))
    return messages


def _refuse_empty(messages: Sequence[Message]) -> None:
    for message in messages:
        if message.content and not message.content.isspace():
            return
    found = "no messages" if not messages else f"{len(messages)} messages, all of them without text"
    raise RowError("empty conversation", f"the conversation has {found}")


def _add_default_system(messages: list[Message], text: str | None) -> None:
    if text and not any(message.role == "system" for message in messages):
        messages.insert(0, _message("the default system message", "system", text))


def _append_tools(messages: list[Message], tools: object, column: str) -> None:
    """Write the tools that a row offers into its system message, since the model is to know them."""
    if _is_absent(tools) or (isinstance(tools, str) and tools.strip() in ("", "[]", "{}", "null")):
        return
    if isinstance(tools, str):
        text = tools
    elif isinstance(tools, list | tuple | Mapping):
        text = _json(_plain(tools, f"field {column!r}"), f"field {column!r}")
    else:
        raise RowError("wrong type", f"field {column!r} is {_kind(tools)}; expected text or a list")
    block = f"Tools:\n{text}"
    for index, message in enumerate(messages):
        if message.role == "system":
            content = f"{message.content}\n\n{block}" if message.content else block
            messages[index] = _message(f"column {column!r}", "system", content, message.weight)
            return
    messages.insert(0, _message(f"column {column!r}", "system", block))


def _is_absent(value: object) -> bool:
    """None, empty, or an object of nothing but None, which is how some columnar files hold None for an object."""
    if isinstance(value, Mapping):
        return all(inner is None for inner in value.values())
    return value is None or (isinstance(value, str | list | tuple) and not value)


def _plain(value: object, place: str, nulls: bool = False, level: int = 0) -> Any:
    """What JSON can hold of a value, dates and decimals as text.

    Fields of objects that hold None are left out, since a columnar file gives all objects of a column the fields of
    each; `nulls` keeps them, for what comes from JSON text.
    """
    if value is None or isinstance(value, str | int | float):
        return value
    if level == _DEEPEST:
        raise _too_deep(place)
    if isinstance(value, Mapping):
        if other := [name for name in value if not isinstance(name, str)]:
            raise RowError("no JSON", f"{place} has an object with the field {_kind(other[0])}; expected names in text")
        kept = value.items() if nulls else [pair for pair in value.items() if pair[1] is not None]
        return {name: _plain(inner, place, nulls, level + 1) for name, inner in kept}
    if isinstance(value, list | tuple):
        return [_plain(inner, place, nulls, level + 1) for inner in value]
    if isinstance(value, datetime.date | datetime.time | datetime.timedelta | decimal.Decimal):
        return str(value)
    raise RowError("no JSON", f"{place} has a value of type {type(value).__name__}; expected what JSON can hold")


def _json(value: object, place: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError as error:  # NaN, an infinity, or an integer of more digits than Python writes
        raise RowError("no JSON", f"{place} has a number that JSON cannot hold: {error}") from None


def _too_deep(place: str) -> RowError:
    return RowError("nested too deeply", f"{place} has lists or objects in one another on over {_DEEPEST} levels")


def _message(place: str, role: str, content: str, weight: float = 1.0) -> Message:
    try:
        return Message(role, content, weight)
    except RowError as error:
        raise RowError(error.kind, f"{place}: {error}") from None


def _one_of(fields: Mapping[Any, Any], names: Sequence[str], place: str) -> tuple[str, Any]:
    """The value under the one of these names that has one, and that name; None if none has."""
    found = {name: fields[name] for name in names if fields.get(name) is not None}
    if not found:
        return names[0], None
    if len(found) > 1:
        texts = {value if isinstance(value, str) else None for value in found.values()}
        if None in texts or len(texts) > 1:
            raise _ambiguous(found, place)
    return next(iter(found.items()))


def _text(fields: Mapping[Any, Any], name: str, place: str, default: str | None = None) -> str:
    value = fields.get(name)
    if value is None:
        if default is not None:
            return default
        raise _missing(fields, (name,), place)
    if not isinstance(value, str):
        raise RowError("wrong type", f"{place}, field {name!r} is {_kind(value)}; expected text")
    return value


def _missing(fields: Mapping[Any, Any], names: Sequence[str], place: str) -> RowError:
    expected = " or ".join(map(repr, names))
    return RowError("missing field", f"{place} has the fields {_names(fields)}; expected {expected}")


def _ambiguous(found: Mapping[str, Any], place: str) -> RowError:
    shown = " and ".join(f"{field!r}: {_kind(value)}" for field, value in found.items())
    return RowError(
        "ambiguous field",
        f"{place} has {shown}; expected one of them, or name the one that is meant in the source's fields",
    )


def _weight(fields: Mapping[Any, Any], name: str, place: str) -> float:
    value = fields.get(name)
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowError("wrong type", f"{place}, field {name!r} is {_kind(value)}; expected a number")
    try:
        _check_weight(value)
    except RowError as error:
        raise RowError(error.kind, f"{place}: {error}") from None
    return float(value)


def _check_weight(weight: float | int) -> None:
    if not 0 <= weight <= LARGEST_WEIGHT:  # NaN is on neither side
        raise RowError("bad weight", f"weight is {_start(weight)}; expected from 0 to {LARGEST_WEIGHT:,}")


def _names(fields: Iterable[object]) -> str:
    """Up to eight field names, for a message that a person reads."""
    names = [_printable(_start(name)) for name in fields]
    return (", ".join(names[:8]) + (", …" if len(names) > 8 else "")) or "(none)"


def _kind(value: object) -> str:
    """A value's type in the words of JSON, and the value where it is short."""
    names = {dict: "an object", list: "a list", tuple: "a list", str: "text", bool: "a boolean"}
    if value is None:
        return "null"
    name = names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
    shown = "" if isinstance(value, Mapping | list | tuple) else f" ({_start(value)!r})"
    return name + shown


def _start(value: object, length: int = 40) -> str:
    """The beginning of a value as text, whatever it is."""
    try:
        return str(value)[:length]
    except (ValueError, RecursionError):  # an integer of more digits than Python writes; lists in one another
        return f"{type(value).__name__} too large to show"


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
