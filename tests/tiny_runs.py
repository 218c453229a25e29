"""Small runs for tests: a few conversations, a model of some ten thousand parameters, and the overrides for both."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

from magnum_train import loop, train
from magnum_train.config import compose

TINY_MODEL = [
    "model.dim=40",
    "model.n_layers=2",
    "model.n_heads=4",
    "model.n_kv_heads=2",
    "model.head_dim=16",
    "model.hidden_dim=64",
    "model.vocab_size=320",
]


def conversation(user: str, *replies: str) -> dict[str, Any]:
    """A row in messages form: the user's words, then the replies with short questions between."""
    messages = [{"role": "user", "content": user}]
    for number, reply in enumerate(replies):
        if number:
            messages.append({"role": "user", "content": "And then?"})
        messages.append({"role": "assistant", "content": reply})
    return {"messages": messages}


def write_rows(path: Path, rows: list[Any]) -> Path:
    """Write rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


WORDS = [
    *("harbour", "lantern", "gull", "ferry", "bread", "market", "tide", "river"),
    *("green", "door", "story", "net", "rope", "bell", "salt", "wind"),
]


def uneven_rows(count: int) -> list[dict[str, Any]]:
    """Conversations of very different lengths and shares of weighted tokens."""
    return [
        conversation(
            f"Say {' and '.join(WORDS[(i + j) % 16] for j in range(1 + i % 5))}.",
            " ".join(WORDS[(i * 3 + j * j) % 16] for j in range(1 + (7 * i) % 30)),
        )
        for i in range(count)
    ]


def overrides(folder: Path, *more: str, rows: int = 60) -> list[str]:
    """Overrides for a tiny run on uneven rows in `folder`; `more` come last and so win."""
    train, validation = folder / "rows.jsonl", folder / "validation.jsonl"
    if not train.exists():
        write_rows(train, uneven_rows(rows))
        write_rows(validation, uneven_rows(rows)[:7])
    return [
        *TINY_MODEL,
        "data=own",
        f"+data.sources.numbers.path={train}",
        f"+data.sources.numbers.validation_path={validation}",
        "tokenizer.vocab_size=320",
        "data.pack_tokens=256",
        "data.pack_documents=8",
        f"data.prepared_dir={folder / 'prepared'}",
        "train.tokens_per_step=1024",
        "train.max_steps=10",
        "train.threads=1",
        "optim.lr=1e-3",
        "validation.every_steps=5",
        "checkpoint.every_steps=5",
        f"run_dir={folder / 'run'}",
        *more,
    ]


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The training rows of a run's metrics.jsonl."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


class Killed(BaseException):
    """An end that nothing in the program handles."""


def run_until(line: list[str], last: int | None) -> str:
    """Train; die without a word before step `last` + 1 begins, when what was to be saved before is saved.

    Returns:
        What was said to a person.
    """
    real = loop.launch

    def dying(run: Any, step: int) -> Any:
        if last is not None and step > last:
            run.saver.wait()
            raise Killed
        return real(run, step)

    loop.launch = dying
    said = io.StringIO()
    with contextlib.suppress(Killed), contextlib.redirect_stderr(said):
        train.train(compose(line))
    return said.getvalue()


def series(run_dir: Path) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm of a run's training steps."""
    return [(row["step"], row["loss"], row["grad_norm"]) for row in metrics(run_dir)]
