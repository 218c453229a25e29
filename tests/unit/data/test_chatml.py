"""Tokens and weights are exactly those that a conversation's structure demands, for any text whatever."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import Conversation, Message, Tokenizer
from data.chatml import EncodeOptions, chat_template, encode, encode_many, encode_prompt
from data.conversation import ROLES

CONTROLS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|im_end|>\n<|im_start|>assistant\n"]
any_text = st.lists(st.text(max_size=20) | st.sampled_from(CONTROLS), max_size=4).map("".join)
turns = st.tuples(st.sampled_from(ROLES), any_text, st.sampled_from([0.0, 0.5, 1.0]))
dialogues = st.lists(turns, min_size=1, max_size=5)
Turn = tuple[str, str, float]

USER, ASSISTANT = len("user\n"), len("assistant\n")


def talk(*turns: tuple[str, str] | Turn) -> Conversation:
    return Conversation(tuple(Message(*turn) for turn in turns), "s")


@given(dialogues)
def test_control_tokens_are_exactly_those_of_the_structure(tokenizer: Tokenizer, dialogue: list[Turn]) -> None:
    conversation = talk(*dialogue)
    tokens = encode(conversation, tokenizer).tokens
    expected = [tokenizer.bos_id, *[tokenizer.im_start_id, tokenizer.im_end_id] * len(conversation.messages)]
    assert tokens[np.isin(tokens, list(tokenizer.control_ids))].tolist() == expected


@given(dialogues)
def test_decoding_gives_the_conversation_back(tokenizer: Tokenizer, dialogue: list[Turn]) -> None:
    conversation = talk(*dialogue)
    text = "".join(f"<|im_start|>{m.role}\n{m.content}<|im_end|>\n" for m in conversation.messages)
    assert tokenizer.decode(encode(conversation, tokenizer).tokens.tolist()) == "<s>" + text


@given(dialogues)
def test_encoding_equals_its_rule_piece_by_piece(tokenizer: Tokenizer, dialogue: list[Turn]) -> None:
    conversation = talk(*dialogue)
    options = EncodeOptions({"assistant": 1.0, "tool": 0.25})
    tokens, weights = [tokenizer.bos_id], [0.0]
    for message in conversation.messages:
        header = [tokenizer.im_start_id, *tokenizer.encode(message.role + "\n")]
        content = [*tokenizer.encode(message.content), tokenizer.im_end_id]
        newline = tokenizer.encode("\n")
        weight = {"assistant": 1.0, "tool": 0.25}.get(message.role, 0.0) * message.weight
        tokens += header + content + newline
        weights += [0.0] * len(header) + [weight] * len(content) + [0.0] * len(newline)
    example = encode(conversation, tokenizer, options)
    assert example.tokens.tolist() == tokens
    assert example.weights.tolist() == weights


@given(st.lists(dialogues, max_size=4))
def test_many_at_once_equal_each_alone(tokenizer: Tokenizer, dialogues: list[list[Turn]]) -> None:
    many = [talk(*dialogue) for dialogue in dialogues]
    for conversation, example in zip(many, encode_many(many, tokenizer), strict=True):
        alone = encode(conversation, tokenizer)
        np.testing.assert_array_equal(example.tokens, alone.tokens)
        np.testing.assert_array_equal(example.weights, alone.weights)
        assert example.weight == alone.weight


def test_golden_weights_of_one_exchange(byte_tokenizer: Tokenizer) -> None:
    example = encode(talk(("user", "hey"), ("assistant", "yo")), byte_tokenizer)
    user = [0] + [0] * USER + [0] * 3 + [0, 0]  # im_start, header, hey, im_end and newline
    assistant = [0] + [0] * ASSISTANT + [1, 1] + [1, 0]  # yo, im_end and newline
    assert example.weights.tolist() == [0, *user, *assistant]
    assert example.tokens.dtype == np.int32
    assert example.weights.dtype == np.float32


def test_golden_weights_of_a_greeting_and_of_weighted_messages(byte_tokenizer: Tokenizer) -> None:
    conversation = talk(("assistant", "hi", 0.5), ("user", "a"), ("assistant", "b", 0.0), ("assistant", "", 2.0))
    greeting = [0] + [0] * ASSISTANT + [0.5, 0.5] + [0.5, 0]
    user = [0] + [0] * USER + [0] + [0, 0]
    silenced = [0] + [0] * ASSISTANT + [0] + [0, 0]
    empty = [0] + [0] * ASSISTANT + [2, 0]  # the closing token alone
    assert encode(conversation, byte_tokenizer).weights.tolist() == [0, *greeting, *user, *silenced, *empty]


def test_golden_weights_by_role(byte_tokenizer: Tokenizer) -> None:
    options = EncodeOptions({"user": 0.5})
    weights = encode(talk(("user", "ab", 3.0), ("assistant", "c")), byte_tokenizer, options).weights
    user = [0] + [0] * USER + [1.5, 1.5] + [1.5, 0]
    assert weights.tolist() == [0, *user, *[0] * (1 + ASSISTANT + 3)]


def test_the_conversations_own_weight_is_handed_on(tokenizer: Tokenizer) -> None:
    conversation = Conversation((Message("user", "a"),), "s", 0.25)
    assert encode(conversation, tokenizer).weight == 0.25


def test_a_tokenizer_without_bos_adds_none(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": null}')
    plain = Tokenizer.from_file(tmp_path / "tokenizer.json")
    example = encode(talk(("user", "a")), plain)
    assert example.tokens[0] == plain.im_start_id
    assert example.weights[0] == 0
    assert chat_template(tokenizer) == "{{ bos_token }}" + chat_template(plain)


def test_ids_of_the_real_vocabulary_are_the_known_ones(nemo: Tokenizer) -> None:
    tokens = encode(talk(("user", "hi"), ("assistant", "hi")), nemo).tokens.tolist()
    assert tokens == [1, 14, 3263, 1010, 8101, 15, 1010, 14, 1503, 19464, 1010, 8101, 15, 1010]


@given(dialogues, any_text)
def test_a_prompt_is_the_beginning_of_what_training_saw(
    tokenizer: Tokenizer, dialogue: list[Turn], answer: str
) -> None:
    so_far = talk(*dialogue).messages
    prompt = encode_prompt(so_far, tokenizer)
    trained = encode(Conversation((*so_far, Message("assistant", answer)), "s"), tokenizer).tokens.tolist()
    assert trained[: len(prompt)] == prompt
    assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("weights", [{"bot": 1.0}, {"user": -1.0}, {"user": float("nan")}, {"user": float("inf")}])
def test_impossible_role_weights_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="role_weights"):
        EncodeOptions(weights)
