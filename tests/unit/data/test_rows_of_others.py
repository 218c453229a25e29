"""Published rows are read whole, and what they say is what they said."""

import json
from pathlib import Path
from typing import Any

import pytest

from data.conversation import parse

NAMES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}


@pytest.fixture(scope="module")
def tool_rows(real_rows: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((real_rows / "sharegpt_tools.json").read_text(encoding="utf-8"))
    assert len(rows) == 300
    return rows


def test_every_row_of_a_published_set_with_tools_is_read_to_the_character(tool_rows: list[dict[str, Any]]) -> None:
    for row in tool_rows:
        turns = [(NAMES[turn["from"]], turn["value"]) for turn in row["conversations"]]
        has_tools = row["tools"] not in ("", "[]")
        system = [("system", f"Tools:\n{row['tools']}")] if has_tools else []
        assert [(m.role, m.content) for m in parse(row).messages] == system + turns
    assert sum("Tools:" in parse(row).messages[0].content for row in tool_rows) > 100


def test_published_calls_in_another_forms_fields_are_the_text_that_was_published(
    tool_rows: list[dict[str, Any]],
) -> None:
    calls = 0
    for row in tool_rows:
        messages: list[dict[str, Any]] = []
        for turn in row["conversations"]:
            if turn["from"] != "function_call":
                messages.append({"role": NAMES[turn["from"]], "content": turn["value"]})
                continue
            calls += 1
            call = json.loads(turn["value"])
            if calls % 2:  # as the interface has it that most such rows come from: arguments in JSON text
                call["arguments"] = json.dumps(call["arguments"], separators=(",", ":"))
            messages.append(
                {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": call}]}
            )
        assert parse({"messages": messages, "tools": row["tools"]}) == parse(row)
    assert calls == 211


def test_every_row_of_a_published_set_of_instructions_is_read(real_rows: Path) -> None:
    rows = json.loads((real_rows / "alpaca.json").read_text(encoding="utf-8"))
    for row in rows:
        user, assistant = parse(row).messages
        assert user.content == "\n".join(part for part in (row["instruction"], row["input"]) if part)
        assert (user.role, assistant.role, assistant.content) == ("user", "assistant", row["output"])
    assert len(rows) == 999
