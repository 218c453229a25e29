"""Tokens and weights are exactly those that a conversation's structure demands, for any text whatever."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import Conversation, Message, Tokenizer
from data.chatml import (
    EncodeOptions,
    chat_template,
    encode,
    encode_batch,
    encode_many,
    encode_prompt,
    role_tokens,
    turns,
)
from data.conversation import ROLES, TEXT

CONTROLS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|im_end|>\n<|im_start|>assistant\n"]
any_text = st.lists(st.text(max_size=20) | st.sampled_from(CONTROLS), max_size=4).map("".join)
weights = st.sampled_from([0.0, 0.5, 1.0])
dialogues = st.lists(st.tuples(st.sampled_from(ROLES), any_text, weights), min_size=1, max_size=5)
prose = st.tuples(st.just(TEXT), any_text, weights).map(lambda message: [message])
corpora = st.lists(dialogues | prose, max_size=5)
eras = st.builds(
    EncodeOptions,
    st.dictionaries(st.sampled_from([*ROLES, TEXT]), st.sampled_from([0.25, 1.0])),
    newline_in_content=st.booleans(),
    train_closing_newline=st.booleans(),
)
Turn = tuple[str, str, float]

USER, ASSISTANT = len("user\n"), len("assistant\n")


def talk(*said: tuple[str, str] | Turn) -> Conversation:
    return Conversation(tuple(Message(*message) for message in said), "s")


@pytest.fixture(scope="module")
def without_bos(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("without_bos")
    tokenizer.save(folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text('{"bos_token": null}')
    return Tokenizer.from_file(folder / "tokenizer.json")


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


def by_rule(
    conversation: Conversation, tokenizer: Tokenizer, options: EncodeOptions
) -> tuple[list[int], list[float], list[int]]:
    """Ids, weights and ends of messages, piece by piece."""
    tokens = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    weights, ends = [0.0] * len(tokens), []
    for message in conversation.messages:
        header, text, newline = [tokenizer.im_start_id], message.content, tokenizer.encode("\n")
        if message.role == TEXT:
            header = newline = []
        elif options.newline_in_content:
            header, text = header + tokenizer.encode(message.role), "\n" + text
        else:
            header = header + tokenizer.encode(message.role + "\n")
        content = [*tokenizer.encode(text), tokenizer.im_end_id]
        weight = options.role_weights.get(message.role, 0.0) * message.weight
        tokens += header + content + newline
        weights += [0.0] * len(header) + [weight] * len(content)
        weights += [weight if options.train_closing_newline else 0.0] * len(newline)
        ends.append(len(tokens))
    return tokens, [0.0, *weights[1:]], ends


@given(corpora, eras, st.booleans())
def test_encoding_equals_its_rule_piece_by_piece(
    tokenizer: Tokenizer, without_bos: Tokenizer, corpus: list[list[Turn]], options: EncodeOptions, bos: bool
) -> None:
    tokenizer = tokenizer if bos else without_bos
    batch = encode_batch([talk(*dialogue) for dialogue in corpus], tokenizer, options)
    tokens: list[int] = []
    weights: list[float] = []
    ends: list[int] = []
    offsets = [0]
    for dialogue in corpus:
        ids, factors, message_ends = by_rule(talk(*dialogue), tokenizer, options)
        ends += [len(tokens) + end for end in message_ends]
        tokens += ids
        weights += factors
        offsets.append(len(tokens))
    assert batch.tokens.tolist() == tokens
    assert batch.weights.tolist() == weights
    assert batch.offsets.tolist() == offsets
    assert batch.message_ends.tolist() == ends
    assert batch.message_counts.tolist() == [len(dialogue) for dialogue in corpus]


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


def test_a_tokenizer_without_bos_adds_none(tokenizer: Tokenizer, without_bos: Tokenizer) -> None:
    example = encode(talk(("user", "a")), without_bos)
    assert example.tokens[0] == without_bos.im_start_id
    assert example.weights[0] == 0
    assert chat_template(tokenizer) == "{{ bos_token }}" + chat_template(without_bos)


def test_golden_weights_of_prose(byte_tokenizer: Tokenizer, without_bos: Tokenizer) -> None:
    example = encode(talk((TEXT, "ab\n", 0.5)), byte_tokenizer)
    assert example.tokens.tolist() == [byte_tokenizer.bos_id, *byte_tokenizer.encode("ab\n"), byte_tokenizer.im_end_id]
    assert example.weights.tolist() == [0, 0.5, 0.5, 0.5, 0.5]
    first, *others = encode(talk((TEXT, "some words")), without_bos).weights.tolist()
    assert first == 0  # nothing stands before it
    assert set(others) == {1}


def test_a_conversation_without_messages_is_bos_alone(tokenizer: Tokenizer) -> None:
    batch = encode_batch([talk(), talk(("user", "a")), talk()], tokenizer)
    assert batch.tokens[[0, 1, -1]].tolist() == [tokenizer.bos_id] * 3
    assert np.diff(batch.offsets).tolist() == [1, len(batch.tokens) - 2, 1]


def test_ids_of_the_real_vocabulary_are_the_known_ones(nemo: Tokenizer) -> None:
    tokens = encode(talk(("user", "hi"), ("assistant", "hi")), nemo).tokens.tolist()
    assert tokens == [1, 14, 3263, 1010, 8101, 15, 1010, 14, 1503, 19464, 1010, 8101, 15, 1010]


@given(dialogues, any_text, eras)
def test_a_prompt_is_the_beginning_of_what_training_saw(
    tokenizer: Tokenizer, dialogue: list[Turn], answer: str, options: EncodeOptions
) -> None:
    if options.newline_in_content:
        answer = f"-{answer}"  # or the newline before it could be one token with what follows
    so_far = talk(*dialogue).messages
    prompt = encode_prompt(so_far, tokenizer, options)
    trained = encode(Conversation((*so_far, Message("assistant", answer)), "s"), tokenizer, options).tokens.tolist()
    assert trained[: len(prompt)] == prompt
    assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n")


def test_nobody_answers_prose(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="a prompt holds prose"):
        encode_prompt([Message(TEXT, "once")], tokenizer)


@given(corpora, eras, st.booleans())
def test_turns_are_told_from_tokens_alone(
    tokenizer: Tokenizer, without_bos: Tokenizer, corpus: list[list[Turn]], options: EncodeOptions, bos: bool
) -> None:
    tokenizer = tokenizer if bos else without_bos
    batch = encode_batch([talk(*dialogue) for dialogue in corpus], tokenizer, options)
    found = turns(batch.tokens, tokenizer, newline_in_content=options.newline_in_content)
    said = [message for dialogue in corpus for message in dialogue]
    assert [turn.role for turn in found] == [role for role, _, _ in said]
    assert [turn.end for turn in found] == batch.message_ends.tolist()
    assert [turn.start for turn in found] == [0, *batch.message_ends.tolist()][: len(found)]
    before, behind = ("", "\n") if options.newline_in_content else ("\n", "")
    firsts = set(batch.offsets.tolist())
    for turn, (role, text, _) in zip(found, said, strict=True):
        header, content = (
            tokenizer.decode(batch.tokens[start:end].tolist())
            for start, end in ((turn.start, turn.content), (turn.content, turn.end))
        )
        opening = "<s>" if bos and turn.start in firsts else ""
        assert header == opening + ("" if role == TEXT else f"<|im_start|>{role}{before}")
        assert content == (f"{text}<|im_end|>" if role == TEXT else f"{behind}{text}<|im_end|>\n")
    kinds = [[*ROLES, TEXT].index(turn.role) for turn in found for _ in range(turn.start, turn.end)]
    roles = role_tokens(batch.tokens, tokenizer)
    assert roles.dtype == np.int8
    assert roles.tolist() == kinds


def test_tokens_of_no_whole_conversations_have_no_turns(tokenizer: Tokenizer, nemo: Tokenizer) -> None:
    whole = encode_batch([talk(("user", "a"), ("assistant", "b")), talk((TEXT, "c"))], tokenizer).tokens
    start, end = tokenizer.im_start_id, tokenizer.im_end_id
    strange = [start, *tokenizer.encode("pirate\nhi"), end, *tokenizer.encode("\n")]
    broken = {
        "cut at the end": whole[:-1],
        "cut at the start": whole[2:],
        "a newline is gone": np.delete(whole, np.flatnonzero(whole == end)[0] + 1),
        "closed twice": np.insert(whole, np.flatnonzero(whole == end)[0], end),
        "opened twice": np.insert(whole, np.flatnonzero(whole == start)[1], start),
        "an unknown role": np.array(strange, np.int32),
        "text before a header": np.concatenate([np.array(tokenizer.encode("a"), np.int32), whole[1:]]),
        "never closed": np.array([start, *tokenizer.encode("user\nhi")], np.int32),
        "another tokenizer's": encode(talk(("user", "a")), nemo).tokens,
    }
    assert len(turns(whole, tokenizer)) == 3
    for tokens in broken.values():
        with pytest.raises(ValueError, match="no whole conversations"):
            role_tokens(tokens, tokenizer)


@given(st.lists(any_text, max_size=6))
def test_texts_encoded_in_groups_keep_their_order(tokenizer: Tokenizer, texts: list[str]) -> None:
    alone = [tokenizer.encode(text) for text in texts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.tokenizer._CHARACTERS_A_CORE", 1)
        ids, lengths = tokenizer.encode_flat(texts)
    assert ids.tolist() == [id_ for some in alone for id_ in some]
    assert lengths.tolist() == [len(some) for some in alone]


def test_a_lone_surrogate_among_many_texts_is_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"surrogates not allowed"):
        tokenizer.encode_flat(["fine", "a\ud800", "fine"])


@pytest.mark.parametrize("weights", [{"bot": 1.0}, {"user": -1.0}, {"user": float("nan")}, {"user": float("inf")}])
def test_impossible_role_weights_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="role_weights"):
        EncodeOptions(weights)
