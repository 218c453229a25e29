"""Two conventions of encoding, token by token: that of today, and that of axolotl in July 2024."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from tokenizers import Tokenizer as RawTokenizer

from data import Conversation, Message, Tokenizer
from data.chatml import EncodeOptions, chat_template, encode, encode_prompt
from data.conversation import parse

ROOT = Path(__file__).parents[3]
GOLDEN = {name: json.loads((ROOT / "tests/golden" / f"{name}.json").read_text()) for name in ("today", "axolotl_2024")}
CASES = [(name, number) for name, golden in GOLDEN.items() for number in range(len(golden["conversations"]))]

# Both switches at once; `test_an_era_is_configured_as_it_is_written_out` ties them to the era's name.
AXOLOTL = EncodeOptions(newline_in_content=True, train_closing_newline=True)
DEFAULT_SYSTEM = "You are a helpful assistant."

# Without `<` and `[`, with which all names of control tokens begin; what those become is no question of the era.
BLANKS = ["\n", "\n\n", " ", "  ", "\t", "\r\n", "\r", "\u2028", "\u00a0", "/"]
plain = st.characters(exclude_characters="<[", exclude_categories=["Cs"])
texts = st.lists(st.text(plain, max_size=12) | st.sampled_from([*BLANKS, "I'm", "🤖", "2024", "…"]), max_size=5).map(
    "".join
)
sides = st.tuples(st.sampled_from(["user", "assistant"]), texts.filter(bool), st.sampled_from([0.0, 1.0]))


@pytest.fixture(scope="module")
def vocabulary(tekken_file: Path) -> list[bytes]:
    """The bytes of each token of Nemo's file, in its order."""
    return [base64.b64decode(entry["token_bytes"]) for entry in json.loads(tekken_file.read_bytes())["vocab"]]


@pytest.fixture(scope="module")
def usual(nemo: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> RawTokenizer:
    """Nemo as the trainers' library has it: finds control tokens in text, puts BOS before each text."""
    file = tmp_path_factory.mktemp("usual") / "tokenizer.json"
    nemo.save(file)
    return RawTokenizer.from_file(str(file))


@pytest.mark.parametrize(("name", "number"), CASES, ids=lambda value: str(value))
def test_written_out_texts_are_those_of_the_ids(name: str, number: int, vocabulary: list[bytes]) -> None:
    controls = {1: "<s>", 14: "<|im_start|>", 15: "<|im_end|>"}
    for id_, text, _ in GOLDEN[name]["conversations"][number]["tokens"]:
        found = controls[id_] if id_ < 1000 else vocabulary[id_ - 1000].decode(errors="backslashreplace")
        assert found == text


@pytest.mark.parametrize(("name", "number"), CASES, ids=lambda value: str(value))
def test_tokens_and_weights_are_those_written_out_by_hand(name: str, number: int, nemo: Tokenizer) -> None:
    golden = GOLDEN[name]
    expected = golden["conversations"][number]
    conversation = parse(expected["row"], default_system=golden["default_system"])
    example = encode(conversation, nemo, EncodeOptions(**golden["options"]))
    assert example.tokens.tolist() == [id_ for id_, _, _ in expected["tokens"]]
    assert example.weights.tolist() == [weight for _, _, weight in expected["tokens"]]
    assert example.weight == expected["weight"]


@pytest.mark.parametrize("name", GOLDEN)
def test_an_era_is_configured_as_it_is_written_out(name: str) -> None:
    chosen: Any = OmegaConf.to_container(OmegaConf.load(ROOT / "conf/era" / f"{name}.yaml")) or {}
    data = chosen.get("data", {})
    assert GOLDEN[name]["options"] == {key: data.get(key, False) for key in GOLDEN[name]["options"]}
    assert GOLDEN[name]["default_system"] == data.get("default_system")


def parts_of_2024(conversation: Conversation) -> Iterator[tuple[str, str, float]]:
    """Role, text and weight of what was encoded one by one: the system message under no role, with its header."""
    system, *others = conversation.messages
    assert system.role == "system"
    yield "", f"<|im_start|>system\n{system.content}<|im_end|>\n", 1.0
    for message in others:
        yield f"<|im_start|>{message.role}\n", f"{message.content}<|im_end|>\n", message.weight


def encoded_in_2024(conversation: Conversation, usual: RawTokenizer) -> tuple[list[int], list[bool]]:
    """Ids, and whether each was a label,: each part encoded as one text, the role's own tokens masked."""

    def ids_of(text: str, *, bos: bool = False) -> list[int]:
        [first, *ids] = usual.encode(text).ids
        assert first == 1
        return [first, *ids] if bos else ids

    tokens: list[int] = []
    trained: list[bool] = []
    for role, text, weight in parts_of_2024(conversation):
        ids = ids_of(role + text, bos=not role)
        labels = [False] * len(ids)
        if "assistant" in role and weight != 0:
            masked = len(ids_of(role.rstrip()))
            labels = [False] * masked + [True] * (len(ids) - masked)
        tokens += ids
        trained += labels
    return tokens, trained


@settings(max_examples=300)
@given(st.none() | texts, st.lists(sides, min_size=1, max_size=5))
def test_2024_is_the_trainers_rule_of_that_time_on_whole_texts(
    nemo: Tokenizer, usual: RawTokenizer, system: str | None, said: list[tuple[str, str, float]]
) -> None:
    first = Message("system", DEFAULT_SYSTEM if system is None else system)
    conversation = Conversation((first, *(Message(*side) for side in said)), "s")
    tokens, trained = encoded_in_2024(conversation, usual)
    example = encode(conversation, nemo, AXOLOTL)
    assert example.tokens.tolist() == tokens
    assert example.weights.tolist() == [float(one) for one in trained]


@settings(max_examples=100)
@given(st.lists(sides, min_size=1, max_size=4))
def test_what_servers_encode_is_what_2024_trained_for_any_text(
    nemo: Tokenizer, usual: RawTokenizer, said: list[tuple[str, str, float]]
) -> None:
    messages = [Message(*side) for side in said]
    template = jinja2.Template(chat_template(nemo), keep_trailing_newline=True)
    turns = [{"role": message.role, "content": message.content} for message in messages]
    whole, prompt = (
        usual.encode(
            template.render(messages=turns, bos_token="<s>", add_generation_prompt=wanted), add_special_tokens=False
        ).ids
        for wanted in (False, True)
    )
    assert encode(Conversation(tuple(messages), "s"), nemo, AXOLOTL).tokens.tolist() == whole
    assert encode_prompt(messages, nemo, AXOLOTL) == prompt


@given(sides, sides)
def test_eras_train_the_same_texts_and_differ_in_newlines_alone(
    nemo: Tokenizer, question: tuple[str, str, float], answer: tuple[str, str, float]
) -> None:
    conversation = Conversation((Message(*question), Message(*answer)), "s")
    trained = []
    for options in (EncodeOptions(), AXOLOTL):
        example = encode(conversation, nemo, options)
        trained.append(nemo.decode(example.tokens[np.flatnonzero(example.weights)].tolist()))
    answers = [m.content for m in conversation.messages if m.role == "assistant" and m.weight]
    assert trained[0] == "".join(f"{text}<|im_end|>" for text in answers)
    assert trained[1] == "".join(f"\n{text}<|im_end|>\n" for text in answers)
