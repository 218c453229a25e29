"""Mutated rows: each ends as an example or in the ledger with a reason.

    python benchmarks/fuzz_rows.py ROWS_FOLDER OUT.json [--rows 100000] [--seed 1]

ROWS_FOLDER holds sharegpt_tools.json and alpaca.json. Their rows are mutated: types, depths, huge and broken strings,
control tokens typed as text, names, numbers, missing and superfluous fields. They go through `prepare` as a JSON Lines
file, under every setting that looks at rows in another way. Exit status 1: a row vanished, a crash, or a control token
came out of text.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.chatml import turns
from data.gates import Rules
from data.prepared import Prepared, prepare
from data.sources import FilterConfig, SourceConfig
from data.tokenizer import train_tokenizer

HOSTILE = (
    "", " ", "\n", "\u0000", "\ud800", "\udfff x", "<|im_end|>\n<|im_start|>assistant\n", "<s></s><pad>", "\u2028",
    "🤖" * 99, "x" * 200_000, "a b " * 30_000, "[" * 5000, '{"a": ' * 500, "\u202e", "ﷺ" * 999, "\r\n\r\n",
)  # fmt: skip
ODD = (None, True, False, 0, -1, 1.5, 10**30, 10**400, 1e308, [], {}, [[]], [{}], {"": ""}, "")
NAMES = (
    "from", "value", "role", "content", "weight", "train", "system", "tools", "tool_calls", "function_call", "text",
    "messages", "conversations", "instruction", "output", "history", "name", "type",
)  # fmt: skip


def deep(draw: random.Random) -> Any:
    """A value that is nested up to some hundred levels."""
    value: Any = draw.choice(HOSTILE)
    for _ in range(draw.choice((2, 20, 90, 110, 400))):
        value = [value] if draw.random() < 0.5 else {draw.choice(NAMES): value}
    return value


def junk(draw: random.Random) -> Any:
    """Any JSON value."""
    return draw.choice(
        (lambda: draw.choice(HOSTILE), lambda: draw.choice(ODD), lambda: deep(draw), lambda: draw.choice(NAMES))
    )()


def mutated(value: Any, draw: random.Random, changed: float = 0.15) -> Any:
    """The value with one change somewhere in it, or another value with a probability of `changed`."""
    if isinstance(value, dict) and value and draw.random() > changed:
        key = draw.choice(list(value))
        kind = draw.random()
        if kind < 0.6:
            return {**value, key: mutated(value[key], draw)}
        if kind < 0.7:
            return {k: v for k, v in value.items() if k != key}
        if kind < 0.8:
            return {(draw.choice(NAMES) if k == key else k): v for k, v in value.items()}
        return {**value, draw.choice(NAMES): junk(draw)}
    if isinstance(value, list) and value and draw.random() < 0.9:
        place = draw.randrange(len(value))
        kind = draw.random()
        if kind < 0.75:
            return [*value[:place], mutated(value[place], draw), *value[place + 1 :]]
        if kind < 0.85:
            return value[:place] + value[place + 1 :]
        return [*value[:place], junk(draw), *value[place:]]
    if isinstance(value, str) and draw.random() < 0.6:
        place = draw.randint(0, len(value))
        return value[:place] + draw.choice(HOSTILE) + value[place:]
    return junk(draw)


def rows(folder: Path, count: int, seed: int) -> Any:
    """Mutated rows, as lines of JSON."""
    draw = random.Random(seed)
    published = [
        row for name in ("sharegpt_tools", "alpaca") for row in json.loads((folder / f"{name}.json").read_text())
    ]
    for row in published:  # the same in the third form too
        if "conversations" in row:
            messages = [{"role": turn["from"], "content": turn["value"]} for turn in row["conversations"]]
            published.append({"messages": messages})
        if len(published) > 2000:
            break
    for _ in range(count):
        row = draw.choice(published)
        for _ in range(draw.choice((1, 1, 2, 5))):
            row = mutated(row, draw, 0.01)
        yield json.dumps(row)


def wrong(prepared: Prepared, count: int) -> list[str]:
    """What must not be."""
    found = []
    account = prepared.ledger.accounts["fuzz"]
    prepared.ledger.balance()
    if account.rows["read"] != count:
        found.append(f"{account.rows['read']} rows read of {count}")
    lines = [json.loads(line) for line in prepared.rejects.read_text().splitlines()]
    lost = [line["row"] for line in lines if line["gate"] != "cut"]  # what was cut goes on
    kept = prepared.train.rows.tolist() + prepared.validation.rows.tolist()
    if sorted(lost + kept) != list(range(1, count + 1)):
        found.append("a row is neither kept nor lost, or both")
    for part in (prepared.train, prepared.validation):
        for index in range(len(part)):
            example = part.example(index)
            said = turns(example.tokens, prepared.tokenizer)  # raises where control tokens do not make turns
            if not example.weights.any() or not said:
                found.append(f"row {part.rows[index]} trains nothing")
    return found


def main() -> int:
    """Mutate, prepare, look."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    line = parser.parse_args()
    tokenizer = train_tokenizer(["hello assistant user system tool <|im_end|> <s>"] * 9, 270)
    settings: dict[str, tuple[Rules, SourceConfig]] = {
        "auto, drop": (Rules(4096), SourceConfig("")),
        "sharegpt, cut_turns, exact, a fifth validates": (
            Rules(1024, too_long="cut_turns", deduplicate="exact", default_system="be kind"),
            SourceConfig("", form="sharegpt", validation_share=0.2),
        ),
        "messages, filtered, 2024": (
            Rules(4096),
            SourceConfig(
                "", form="messages", filter=FilterConfig(min_turns=2, exclude=["sorry"], require_roles=["user"])
            ),
        ),
    }
    record: dict[str, Any] = {"rows": line.rows, "seed": line.seed, "settings": {}}
    status = 0
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "fuzz.jsonl"
        with file.open("w") as stream:
            stream.writelines(text + "\n" for text in rows(line.folder, line.rows, line.seed))
        for name, (rules, source) in settings.items():
            begin = time.perf_counter()
            config = SourceConfig(**{**vars(source), "path": str(file)})
            prepared = prepare(
                {"fuzz": config},
                rules,
                prepared_dir=Path(scratch) / "prepared",
                tokenizer=tokenizer,
                max_loss_share=1.0,
            )
            faults = wrong(prepared, line.rows)
            account = prepared.ledger.accounts["fuzz"]
            ended = {gate: rows for gate, rows in account.rows.items() if rows}
            seconds = time.perf_counter() - begin
            record["settings"][name] = {
                "seconds": seconds, "rows": ended, "reasons": account.reasons, "cut": account.cut_rows, "faults": faults
            }  # fmt: skip
            print(f"{name}: {ended}, {account.cut_rows} cut, {seconds:.1f} s; {len(faults)} faults {faults[:3]}")
            for reason, number in Counter(account.reasons["invalid"]).most_common():
                print(f"    {number:7,} {reason}")
            status |= bool(faults)
    line.out.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
