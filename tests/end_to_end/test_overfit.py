"""Control: a model that is small enough to be certain about learns ten conversations by heart and says one back."""

from pathlib import Path

import pytest

from data import Message
from magnum_train import chat
from magnum_train.config import compose
from magnum_train.train import train
from ranks import run_ranks
from tiny_runs import conversation, metrics, overrides, write_rows

FACTS = {
    "Who keeps the lighthouse?": "Mara Quill keeps it.",
    "What colour is the ferry?": "Blue, with a white rail.",
    "When is the market?": "On Thursday, in Bell Square.",
    "Who bakes the bread?": "Tobin Ash, on Anchor Lane.",
    "How many steps are there?": "There are 112 steps.",
    "What is the gull called?": "The gull is called Button.",
    "Which river is this?": "That is the Tamsel.",
    "Who mends the nets?": "Old Wenna Sprat mends them.",
    "Where is the library?": "Behind the green door.",
    "When does the ferry leave?": "At eight and at four.",
}


def learn(line: list[str]) -> None:
    train(compose(line))


@pytest.mark.slow  # some 150 steps of training, which is what it is about
def test_ten_conversations_are_learnt_and_said_back(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [conversation(ask, answer) for ask, answer in FACTS.items()])
    write_rows(tmp_path / "validation.jsonl", [conversation("Who sails the ferry?", "Captain Vane.")])
    line = overrides(
        tmp_path, "train.tokens_per_step=512", "train.max_steps=150", "optim.lr=1e-2", "validation.every_steps=150",
        "checkpoint.every_steps=150", "model.dim=64", "model.hidden_dim=128",
    )  # fmt: skip
    run_ranks(learn, 1, line)
    rows = metrics(tmp_path / "run")
    assert rows[0]["loss"] > 4
    assert rows[-1]["loss"] < 0.1
    model, tokenizer = chat.load(str(tmp_path / "run"))
    for ask, answer in FACTS.items():
        ids = list(chat.reply(model, tokenizer, [Message("user", ask)], max_new_tokens=60))
        assert ids[-1] == tokenizer.im_end_id
        assert chat.reply_text(tokenizer, ids) == answer
