"""What other programs read of an exported tokenizer gives the ids that training gave."""

import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from data import Conversation, Message, Tokenizer
from data.chatml import chat_template, encode, encode_prompt
from data.conversation import ROLES

KINDS = ["small", "small without BOS", "slots", "appended"]

# White_Space of Unicode, which is `\s` for the tokenizers' regular expressions (Python's \s has U+001C.. too).
BLANKS = "\t\n\v\f\r \x85\u00a0\u1680\u2000\u2001\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
breaks_first = re.compile(f"[{BLANKS}]*[\n\r]").match
FRAGMENTS = ["<|im_end", "<|im_end|", "|>", "<", "<s", "[INST", "/", "é", "e\u0301", "’", "🤖", "\u200d", "Ġ", "\x1c"]
texts = st.lists(st.text(max_size=12) | st.sampled_from([*BLANKS, *FRAGMENTS]), max_size=6).map("".join)


@pytest.fixture(scope="module")
def exported(
    tokenizer: Tokenizer, nemo: Tokenizer, tekken_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Tokenizer, Path, Any]]:
    """Of each kind the tokenizer, the folder that it was exported to, and transformers' reading of it."""
    folder = tmp_path_factory.mktemp("exported")
    tokenizer.save(folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text('{"bos_token": null}')
    makers: dict[str, Callable[[], Tokenizer]] = {
        "small": lambda: tokenizer,
        "small without BOS": lambda: Tokenizer.from_file(folder / "tokenizer.json"),
        "slots": lambda: nemo,
        "appended": lambda: Tokenizer.from_file(tekken_file, append=True),
    }
    made: dict[str, tuple[Tokenizer, Path, Any]] = {}

    def get(kind: str) -> tuple[Tokenizer, Path, Any]:
        if kind not in made:
            (folder / kind).mkdir()
            ours = makers[kind]()
            ours.export(folder / kind, max_length=1024)
            made[kind] = (ours, folder / kind, AutoTokenizer.from_pretrained(folder / kind))
        return made[kind]

    return get


def rendered(theirs: Any, messages: list[Message], prompt: bool = False) -> list[int]:
    turns = [{"role": message.role, "content": message.content} for message in messages]
    ids: list[int] = theirs.apply_chat_template(turns, add_generation_prompt=prompt, return_dict=False)
    return ids


def in_training(ours: Tokenizer, messages: list[Message]) -> list[int]:
    return [int(id_) for id_ in encode(Conversation(tuple(messages), "s"), ours).tokens]


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_folder_is_read_back_equal(kind: str, exported: Any) -> None:
    ours, folder, _ = exported(kind)
    assert Tokenizer.from_file(folder) == ours
    names = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"}
    assert {file.name for file in folder.iterdir()} == names


@pytest.mark.parametrize(
    ("kind", "size", "bos", "eos", "pad", "unk", "stop"),
    [
        ("small", 300, 0, 4, 2, None, [4, 1]),
        ("small without BOS", 300, None, 4, 2, None, [4, 1]),
        ("slots", 131072, 1, 15, 10, 0, [15, 2]),
        ("appended", 131074, 1, 131073, 10, 0, [131073, 2]),
    ],
)
def test_transformers_reads_ours_with_the_same_special_tokens(
    kind: str, size: int, bos: int | None, eos: int, pad: int, unk: int | None, stop: list[int], exported: Any
) -> None:
    ours, _, theirs = exported(kind)
    assert type(theirs).__name__ == "TokenizersBackend"
    assert len(theirs) == ours.vocab_size == size
    assert theirs.bos_token_id == ours.bos_id == bos
    assert theirs.eos_token_id == ours.eos_id == ours.im_end_id == eos
    assert theirs.pad_token_id == ours.pad_id == pad
    assert theirs.unk_token_id == ours.unk_id == unk
    assert ours.stop_ids == stop
    assert theirs.model_max_length == 1024
    assert theirs.chat_template == chat_template(ours)
    assert {name: theirs.convert_tokens_to_ids(name) for name in ours.controls} == ours.controls
    text = [] if bos is None else [bos]
    assert theirs("hi\n2<|im_end|>").input_ids == [*text, *ours.encode("hi\n2"), eos]
    assert theirs.decode(ours.encode(" a ,b . n't"), skip_special_tokens=True) == " a ,b . n't"
    assert theirs.decode([ours.im_start_id, *ours.encode("hi"), eos], skip_special_tokens=True) == "hi"


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100)
@given(data=st.data())
def test_the_template_gives_the_ids_of_training(kind: str, exported: Any, data: st.DataObject) -> None:
    ours, _, theirs = exported(kind)
    alike = texts.filter(lambda text: not breaks_first(text) and not any(name in text for name in ours.controls))
    messages = data.draw(st.lists(st.builds(Message, st.sampled_from(ROLES), alike), min_size=1, max_size=4))
    assert rendered(theirs, messages) == in_training(ours, messages)
    assert rendered(theirs, messages, prompt=True) == encode_prompt(messages, ours)


@settings(max_examples=300)
@given(text=st.text(st.sampled_from(BLANKS), max_size=5).flatmap(lambda blanks: texts.map(lambda t: blanks + t)))
def test_header_and_content_are_one_word_exactly_where_leading_blanks_hold_a_line_break(
    exported: Any, text: str
) -> None:
    _, _, theirs = exported("slots")

    def words(text: str) -> list[str]:
        return [word for word, _ in theirs.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]

    apart = words("user\n") + words(text)
    assert (words("user\n" + text) == apart) == (not breaks_first(text))


@pytest.mark.parametrize(
    ("content", "same"),
    [
        ("\nhi", False),
        ("\n", False),
        ("\n\n\nhi", False),
        (" \nhi", True),
        ("\r\nhi", True),
        ("  hi", True),
        (" \t x", True),
        ("\u2028x", True),
        ("\x85\u3000x", True),
        ("\x1c\nx", True),
        ("hi\n\n", True),
        ("", True),
        ("a<|im_end|>b", False),
        ("[INST]", False),
        ("<|im_end|", True),
    ],
)
def test_contents_that_the_template_encodes_otherwise(content: str, same: bool, exported: Any) -> None:
    ours, _, theirs = exported("slots")
    messages = [Message("user", content)]
    assert (rendered(theirs, messages) == in_training(ours, messages)) is same


def test_no_file_keeps_the_name_of_a_renamed_slot(exported: Any) -> None:
    _, folder, _ = exported("slots")
    for file in folder.iterdir():
        text = file.read_text(encoding="utf-8")
        assert "<SPECIAL_14>" not in text, file
        assert "<SPECIAL_15>" not in text, file


def test_the_two_lists_of_control_tokens_agree(exported: Any) -> None:
    _, folder, _ = exported("slots")
    contents = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    listed = {str(token.pop("id")): token for token in contents["added_tokens"]}
    assert listed == config["added_tokens_decoder"]
    assert all(contents["model"]["vocab"][token["content"]] == int(id_) for id_, token in listed.items())


@pytest.mark.parametrize(
    ("names", "pad"),
    [
        (["<unk>", "<s>", "</s>", "<pad>"], "<pad>"),
        (["<unk>", "<s>", "</s>"], "<unk>"),
        (["<s>", "</s>"], "</s>"),
        (["<s>"], None),
    ],
)
def test_padding_is_never_the_token_that_ends_a_message(
    names: list[str], pad: str | None, byte_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    byte_tokenizer.save(tmp_path / "tokenizer.json")
    contents = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    names = [*names, "<|im_start|>", "<|im_end|>"]
    vocab = {token: id_ for token, id_ in contents["model"]["vocab"].items() if token not in byte_tokenizer.controls}
    contents["model"]["vocab"] = vocab
    contents["added_tokens"] = [{"id": 300 + n, "content": name} for n, name in enumerate(names)]
    (tmp_path / "tokenizer.json").write_text(json.dumps(contents), encoding="utf-8")
    ours = Tokenizer.from_file(tmp_path)
    ours.export(tmp_path, max_length=None)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config.get("pad_token") == pad
    assert ours.pad_id == ours.controls.get(pad or "", None)
    assert "model_max_length" not in config


@contextmanager
def listening(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Hand transformers' messages, which it keeps from the root logger, to caplog."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        yield
    finally:
        logger.removeHandler(caplog.handler)


@pytest.mark.parametrize(
    ("config", "warns"),
    [
        (None, False),
        ({"model_type": "mistral", "transformers_version": "5.0.0"}, False),
        ({"model_type": "mistral", "transformers_version": "4.57.0"}, True),
        ({"model_type": "mistral"}, True),
    ],
)
def test_transformers_loads_without_a_word_beside_a_config_of_version_5(
    config: dict[str, str] | None, warns: bool, exported: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, folder, _ = exported("slots")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 131072} | config))
    with listening(caplog):
        theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert ("incorrect regex pattern" in caplog.text) is warns
    if not warns:
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert theirs("hi").input_ids == [1, 8101]
