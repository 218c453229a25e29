"""Rows of the accepted forms → `Conversation`.

Owns what a row means: names of fields and roles, and the reason for which a row is refused. Knows no files,
no tokens and no settings; `prepared.py` calls it for each row.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from data.errors import RowError

ROLES = ("system", "user", "assistant", "tool")
LARGEST_WEIGHT = 1_000_000
"""So that the product of a message's, a role's, a row's and a source's weight is a float32."""

FORMS = ("auto", "sharegpt", "messages", "alpaca")

# A function call is text that the model has to write, so it is the assistant's; what comes back is the
# tool's.
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
}
_MESSAGES_ROLES = {role: role for role in ROLES}
_SIGNS = {"sharegpt": "conversations", "messages": "messages", "alpaca": "instruction"}


@dataclass(frozen=True)
class Message:
    """What one side says once.

    Args:
        role: one of `ROLES`.
        content: any Unicode text, control tokens typed in it included; they stay text.
        weight: factor on the loss of this message's tokens, at least 0.

    Raises:
        RowError: an unknown role, a weight that is negative or not finite, text that is not valid Unicode.
    """

    role: str
    content: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise RowError("unknown role", f"unknown role {self.role!r}; expected one of {', '.join(ROLES)}")
        _check_weight(self.weight)
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
    """Messages in their order, as they are: any role first, several of one role in a row.

    Args:
        messages: what was said.
        source: name of the source that it came from, for reports.
        weight: factor on the loss of the whole conversation, at least 0.

    Raises:
        RowError: a weight that is negative or not finite.
    """

    messages: tuple[Message, ...]
    source: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        _check_weight(self.weight)


def parse(row: object, form: str = "auto", source: str = "") -> Conversation:
    r"""Read one row.

    Nothing is repaired and nothing is dropped in silence: what has a meaning here is taken, what would change
    the text that the model sees and has none is refused.

    Args:
        row: an object with the columns of its form. Columns that hold None count as absent, because columnar
            files fill absent fields with None.

            - sharegpt: `conversations`, a list of {from, value}
            - messages: `messages`, a list of {role, content}
            - alpaca: `instruction`, `output`, optional `input` and `history` (pairs of user and assistant)

            In each form optional: `system` (goes first), `weight` (≥ 0, the conversation's) and `tools`,
            whose text is appended to the system message as "Tools:\n…", or makes one. A message may have
            `weight` (≥ 0) and `train` (false: weight 0).
        form: sharegpt, messages or alpaca; auto tells by the columns.
        source: name of the source, kept for reports.

    Returns:
        The conversation. It may be one without an assistant: that is valid, and has no weight to train on.

    Raises:
        RowError: the row cannot be used, and why.
        ValueError: `form` is none of `FORMS`.
    """
    if form not in FORMS:
        raise ValueError(f"form is {form!r}; expected one of {', '.join(FORMS)}")
    if not isinstance(row, Mapping):
        raise RowError("not an object", f"the row is {_kind(row)}; expected an object with named fields")
    if form == "auto":
        form = _form_of(row)
    if form == "alpaca":
        messages = _alpaca(row)
    elif form == "sharegpt":
        messages = _turns(row, "conversations", "from", "value", _SHAREGPT_ROLES)
    else:
        messages = _turns(row, "messages", "role", "content", _MESSAGES_ROLES)
    if not any(message.content.strip() for message in messages):
        found = "no messages" if not messages else f"{len(messages)} messages, all of them without text"
        raise RowError("empty conversation", f"the conversation has {found}")
    system = _text(row, "system", "the row", default="")
    if system:
        messages.insert(0, _message("column 'system'", "system", system))
    _append_tools(messages, row.get("tools"))
    return Conversation(tuple(messages), source, _weight(row, "the row"))


def _form_of(row: Mapping[str, Any]) -> str:
    found = [form for form, column in _SIGNS.items() if row.get(column) is not None]
    if len(found) == 1:
        return found[0]
    expected = ", ".join(f"{column!r} ({form})" for form, column in _SIGNS.items())
    if not found:
        raise RowError("missing field", f"the row has the fields {_names(row)}; expected one of {expected}")
    raise RowError("ambiguous form", f"the row has more than one of {expected}; name the source's form")


def _turns(
    row: Mapping[str, Any], column: str, role_field: str, text_field: str, roles: Mapping[str, str]
) -> list[Message]:
    turns = row.get(column)
    if turns is None:
        raise RowError("missing field", f"the row has the fields {_names(row)}; expected {column!r}")
    if not isinstance(turns, list | tuple):
        raise RowError("wrong type", f"field {column!r} is {_kind(turns)}; expected a list of messages")
    messages = []
    for number, turn in enumerate(turns, 1):
        place = f"message {number}"
        if not isinstance(turn, Mapping):
            raise RowError("wrong type", f"{place} is {_kind(turn)}; expected an object")
        if turn.get("tool_calls"):
            raise RowError(
                "tool_calls",
                f"{place} has 'tool_calls', which have no text form; write the call into {text_field!r}",
            )
        name = _text(turn, role_field, place)
        if name not in roles:
            raise RowError("unknown role", f"{place} has the unknown role {name!r}; expected one of {', '.join(roles)}")
        train = turn.get("train")
        if train is not None and not isinstance(train, bool):
            raise RowError("wrong type", f"{place}, field 'train' is {_kind(train)}; expected true or false")
        weight = _weight(turn, place)
        text = _text(turn, text_field, place)
        messages.append(_message(place, roles[name], text, 0.0 if train is False else weight))
    return messages


def _alpaca(row: Mapping[str, Any]) -> list[Message]:
    messages = []
    history = row.get("history")
    if history is not None and not isinstance(history, list | tuple):
        raise RowError("wrong type", f"field 'history' is {_kind(history)}; expected a list of pairs")
    for number, pair in enumerate(history or (), 1):
        place = f"history {number}"
        two_texts = isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(t, str) for t in pair)
        if not two_texts:
            raise RowError("wrong type", f"{place} is {_kind(pair)}; expected a pair of texts, user and assistant")
        messages += [_message(place, "user", pair[0]), _message(place, "assistant", pair[1])]
    user = _text(row, "instruction", "the row")
    extra = _text(row, "input", "the row", default="")
    messages.append(_message("field 'instruction'", "user", f"{user}\n{extra}" if extra else user))
    messages.append(_message("field 'output'", "assistant", _text(row, "output", "the row")))
    return messages


def _append_tools(messages: list[Message], tools: object) -> None:
    """Write the tools that a row offers into its system message, since the model is to know them."""
    if isinstance(tools, str):
        text = "" if tools.strip() in ("", "[]", "{}", "null") else tools
    elif isinstance(tools, list | tuple | Mapping):
        text = json.dumps(tools, ensure_ascii=False, default=str) if tools else ""
    elif tools is None:
        text = ""
    else:
        raise RowError("wrong type", f"field 'tools' is {_kind(tools)}; expected text or a list")
    if not text:
        return
    block = f"Tools:\n{text}"
    for index, message in enumerate(messages):
        if message.role == "system":
            content = f"{message.content}\n\n{block}" if message.content else block
            messages[index] = _message("column 'tools'", "system", content, message.weight)
            return
    messages.insert(0, _message("column 'tools'", "system", block))


def _message(place: str, role: str, content: str, weight: float = 1.0) -> Message:
    try:
        return Message(role, content, weight)
    except RowError as error:
        raise RowError(error.kind, f"{place}: {error}") from None


def _text(fields: Mapping[str, Any], name: str, place: str, default: str | None = None) -> str:
    value = fields.get(name)
    if value is None:
        if default is not None:
            return default
        raise RowError("missing field", f"{place} has the fields {_names(fields)}; expected {name!r}")
    if not isinstance(value, str):
        raise RowError("wrong type", f"{place}, field {name!r} is {_kind(value)}; expected text")
    return value


def _weight(fields: Mapping[str, Any], place: str) -> float:
    value = fields.get("weight")
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowError("wrong type", f"{place}, field 'weight' is {_kind(value)}; expected a number")
    try:
        _check_weight(value)
    except RowError as error:
        raise RowError(error.kind, f"{place}: {error}") from None
    return float(value)


def _check_weight(weight: float | int) -> None:
    if not 0 <= weight <= LARGEST_WEIGHT:  # NaN is on neither side
        raise RowError("bad weight", f"weight is {str(weight)[:40]}; expected from 0 to {LARGEST_WEIGHT:,}")


def _names(fields: Iterable[object]) -> str:
    """Up to eight field names, for a message that a person reads."""
    names = [str(name) for name in fields]
    return (", ".join(names[:8]) + (", …" if len(names) > 8 else "")) or "(none)"


def _kind(value: object) -> str:
    """A value's type in the words of JSON, and the value where it is short."""
    names = {dict: "an object", list: "a list", tuple: "a list", str: "text", bool: "a boolean"}
    if value is None:
        return "null"
    name = names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
    shown = "" if isinstance(value, dict | list | tuple) else f" ({str(value)[:40]!r})"
    return name + shown
