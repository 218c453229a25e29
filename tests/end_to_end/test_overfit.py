"""Control: a model that is small enough to be certain about learns ten conversations by heart and says one back."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from data import Message
from magnum_train import chat, export
from magnum_train.config import ExportConfig, TokenizerFileConfig, compose
from magnum_train.train import train
from magnum_train.weights import find, load_model
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
    model, tokenizer = load_model(find(str(tmp_path / "run"), "weights"), TokenizerFileConfig(), dtype="auto")
    for ask, answer in FACTS.items():
        ids = list(chat.reply(model, tokenizer, [Message("user", ask)], max_new_tokens=60))
        assert ids[-1] == tokenizer.im_end_id
        assert chat.reply_text(tokenizer, ids) == answer

    export.main(ExportConfig(weights=str(tmp_path / "run"), out=str(tmp_path / "out"), dtype="float32"))
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    words = AutoTokenizer.from_pretrained(tmp_path / "out")
    for ask, answer in FACTS.items():
        asked = words.apply_chat_template(
            [{"role": "user", "content": ask}], add_generation_prompt=True, return_tensors="pt"
        )
        said = theirs.generate(**asked, do_sample=False, max_new_tokens=60)[0, asked["input_ids"].shape[1] :]
        assert said[-1] == tokenizer.im_end_id  # stops by itself, by what generation_config.json says
        assert words.decode(said, skip_special_tokens=True) == answer
