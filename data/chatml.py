r"""`Conversation` → tokens and loss weights in ChatML, and from tokens back to turns.

    [BOS] then per message  <|im_start|> role\n  content  <|im_end|>  \n
    [BOS] prose <|im_end|>

Each piece is encoded by itself, so the weight of a token is known when the token is made and never searched
for afterwards, and a control token is an id put there by this file, never the outcome of encoding text. So the
turns can be told from the tokens again, whatever the texts are. Knows no files and no packs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeVar

import numpy as np
from jaxtyping import Float32, Int8, Int32, Int64
from numpy.typing import NDArray

from data.conversation import LARGEST_WEIGHT, ROLES, TEXT, Conversation, Message
from data.tokenizer import Tokenizer

_T = TypeVar("_T", bound=np.generic)

_ROLES = (*ROLES, TEXT)
_KINDS = {role: kind for kind, role in enumerate(_ROLES)}


@dataclass(frozen=True)
class EncodeOptions:
    r"""How conversations are encoded, and what of them is trained.

    By default the sound convention. Both switches together are what axolotl did in July 2024 (`type: sharegpt`,
    `conversation: chatml`): header, content and closing were one text, in which the tokens of `<|im_start|>` and
    the role's name alone were masked.

    Args:
        role_weights: loss weight of a role's content and its closing token; roles not named have 0. Multiplied by
            the message's own weight. Prose has the role `text`.
        newline_in_content: the newline after the role's name is encoded as one text with the content (Nemo has
            one token for it and a newline that follows) and weighs as the content does. Otherwise it is part of
            the header, which weighs 0.
        train_closing_newline: the newline after `<|im_end|>` weighs as the content does. Otherwise 0.

    Raises:
        ValueError: an unknown role, or a weight that is negative or not finite.
    """

    role_weights: Mapping[str, float] = field(default_factory=lambda: {"assistant": 1.0, TEXT: 1.0})
    newline_in_content: bool = False
    train_closing_newline: bool = False

    def __post_init__(self) -> None:
        for role, weight in self.role_weights.items():
            if role not in _ROLES:
                raise ValueError(f"role_weights names {role!r}; expected roles among {', '.join(_ROLES)}")
            if not 0 <= weight <= LARGEST_WEIGHT:  # NaN is on neither side
                raise ValueError(f"role_weights.{role} is {weight}; expected from 0 to {LARGEST_WEIGHT:,}")


@dataclass(frozen=True, eq=False)
class Example:
    """One encoded conversation.

    Args:
        tokens: ids, [n].
        weights: loss weight of each token (as a target), [n]; the first is always 0.
        weight: factor on the whole example (its row's and its source's).
    """

    tokens: Int32[np.ndarray, "n"]
    weights: Float32[np.ndarray, "n"]
    weight: float = 1.0


@dataclass(frozen=True, eq=False)
class EncodedBatch:
    """Many encoded conversations, one after another.

    Args:
        tokens: ids of all.
        weights: loss weight of each token (as a target); that of a conversation's first token is always 0.
        offsets: where each conversation starts in `tokens`, and where the last one ends.
        message_ends: where each message ends in `tokens`, closing token and newline included.
        message_counts: messages of each conversation.
    """

    tokens: Int32[np.ndarray, "total"]
    weights: Float32[np.ndarray, "total"]
    offsets: Int64[np.ndarray, "bounds"]
    message_ends: Int64[np.ndarray, "messages"]
    message_counts: Int64[np.ndarray, "conversations"]


@dataclass(frozen=True)
class Turn:
    """Where a message stands in tokens: header [start, content), the rest [content, end).

    Args:
        role: one of `ROLES`, or `TEXT` for prose.
        start: where its header starts, or BOS before it. Prose has BOS at most.
        content: where its content starts.
        end: behind its closing token and the newline after that; the next turn's start.
    """

    role: str
    start: int
    content: int
    end: int


def encode_batch(
    conversations: Sequence[Conversation], tokenizer: Tokenizer, options: EncodeOptions | None = None
) -> EncodedBatch:
    """Encode many conversations at once, about as fast as their texts alone.

    The content and its `<|im_end|>` weigh role weight × message weight: a model that never gets a loss on the
    closing token never learns to stop. Headers, BOS and the newline after `<|im_end|>` weigh 0. Prose has neither
    header nor newline. A conversation's first token weighs 0 whatever it is, since nothing comes before it.

    Args:
        conversations: what to encode; all of it is in memory at once, so callers bound the number.
        tokenizer: text ↔ ids.
        options: by default the sound convention, with assistants and prose trained.

    Returns:
        The tokens of all with their weights, in order.
    """
    options = options or EncodeOptions()
    messages = [message for conversation in conversations for message in conversation.messages]
    texts = [message.content for message in messages]
    if options.newline_in_content:
        texts = [m.content if m.role == TEXT else f"\n{m.content}" for m in messages]
    contents, lengths = tokenizer.encode_flat(texts)

    opening = _opening(tokenizer)
    headers, newline = _headers(tokenizer, options.newline_in_content), tokenizer.encode("\n")
    closings = {role: [tokenizer.im_end_id, *(newline if role != TEXT else [])] for role in _ROLES}
    kinds = np.array([_KINDS[message.role] for message in messages], np.int64)
    before = np.array([len(headers[role]) for role in _ROLES])[kinds]
    after = np.array([len(closings[role]) for role in _ROLES])[kinds]
    counts = np.array([len(conversation.messages) for conversation in conversations], np.int64)
    ends = np.cumsum(before + lengths + after)
    offsets = np.append(0, ends)[np.append(0, np.cumsum(counts))] + len(opening) * np.arange(len(counts) + 1)
    ends += len(opening) * np.repeat(np.arange(1, len(counts) + 1), counts)
    starts, total = ends - after - lengths, int(offsets[-1])

    tokens = np.empty(total, np.int32)
    of_text = _spread(np.ones(len(messages), np.bool_), starts, starts + lengths, total)
    tokens[of_text] = contents
    around = {role: np.array(headers[role] + closings[role], np.int32) for role in _ROLES}
    others, bos = [contents[:0]], np.array(opening, np.int32)
    for conversation in conversations:
        others.append(bos)
        others += [around[message.role] for message in conversation.messages]
    tokens[~of_text] = np.concatenate(others)

    by_role = np.array([options.role_weights.get(role, 0.0) for role in _ROLES])
    trained = by_role[kinds] * np.array([message.weight for message in messages], np.float64)
    weighed = ends if options.train_closing_newline else starts + lengths + 1
    weights = _spread(trained.astype(np.float32), starts, weighed, total)
    weights[offsets[:-1][np.diff(offsets) > 0]] = 0.0
    return EncodedBatch(tokens, weights, offsets, ends, counts)


def encode(conversation: Conversation, tokenizer: Tokenizer, options: EncodeOptions | None = None) -> Example:
    """Encode one conversation; see `encode_batch`.

    Args:
        conversation: what to encode.
        tokenizer: text ↔ ids.
        options: by default the sound convention, with assistants and prose trained.

    Returns:
        Its tokens [n], their weights [n] and the conversation's own weight.
    """
    return encode_many([conversation], tokenizer, options)[0]


def encode_many(
    conversations: Sequence[Conversation], tokenizer: Tokenizer, options: EncodeOptions | None = None
) -> list[Example]:
    """Encode many conversations at once, as `encode_batch` does, and give them one by one.

    Args:
        conversations: what to encode; all of it is in memory at once, so callers bound the number.
        tokenizer: text ↔ ids.
        options: by default the sound convention, with assistants and prose trained.

    Returns:
        One example for each conversation, in order; they share the memory of the whole.
    """
    batch = encode_batch(conversations, tokenizer, options)
    places = [slice(start, end) for start, end in pairwise(batch.offsets.tolist())]
    return [
        Example(batch.tokens[place], batch.weights[place], float(conversation.weight))
        for place, conversation in zip(places, conversations, strict=True)
    ]


def encode_prompt(messages: Sequence[Message], tokenizer: Tokenizer, options: EncodeOptions | None = None) -> list[int]:
    r"""Encode messages and open the assistant's answer, for generation.

    Args:
        messages: the conversation so far, without prose.
        tokenizer: text ↔ ids.
        options: those of the training.

    Returns:
        Exactly the ids that training put before an answer: the messages, then `<|im_start|>assistant\n`. With
        `newline_in_content` not before answers whose leading white space holds a line break, which took the `\n` in.

    Raises:
        ValueError: a message is prose, which nobody answers.
    """
    if TEXT in [message.role for message in messages]:
        raise ValueError(f"a prompt holds prose (role {TEXT!r}); expected messages of {', '.join(ROLES)}")
    options = options or EncodeOptions()
    so_far = encode(Conversation(tuple(messages), source=""), tokenizer, options)
    newline = tokenizer.encode("\n") if options.newline_in_content else []
    return [*so_far.tokens.tolist(), *_headers(tokenizer, options.newline_in_content)["assistant"], *newline]


def turns(tokens: Int32[np.ndarray, "tokens"], tokenizer: Tokenizer, *, newline_in_content: bool = False) -> list[Turn]:
    """Tell the messages in tokens, the inverse of encoding.

    Args:
        tokens: of one or more whole conversations, one after another.
        tokenizer: the one that made them.
        newline_in_content: as it was when they were encoded. It decides where a content starts, and nothing else.

    Returns:
        Their turns in order, from the first token to the last without a gap.

    Raises:
        ValueError: these are no whole conversations.
    """
    starts, opens, kinds, ends = _turns(tokens, tokenizer)
    headers = _headers(tokenizer, newline_in_content)
    contents = opens + np.array([len(headers[role]) for role in _ROLES])[kinds]
    places = zip(kinds.tolist(), starts.tolist(), contents.tolist(), ends.tolist(), strict=True)
    return [Turn(_ROLES[kind], start, content, end) for kind, start, content, end in places]


def role_tokens(tokens: Int32[np.ndarray, "tokens"], tokenizer: Tokenizer) -> Int8[np.ndarray, "tokens"]:
    """Tell the role of each token.

    Args:
        tokens: of one or more whole conversations, one after another.
        tokenizer: the one that made them.

    Returns:
        For each token its turn's role, as an index into `(*ROLES, TEXT)`. BOS belongs to the turn that follows it.

    Raises:
        ValueError: these are no whole conversations.
    """
    starts, _, kinds, ends = _turns(tokens, tokenizer)
    return np.repeat(kinds.astype(np.int8), ends - starts)


def chat_template(tokenizer: Tokenizer) -> str:
    r"""The Jinja template by which servers and other libraries write conversations as `encode` does.

    Rendered and encoded by them, messages give the ids of `encode`, and with `add_generation_prompt` those of
    `encode_prompt`, for any contents but two kinds. Both concern Tekken's split of text into words, which the
    tokenizers trained here share.

    - Contents whose leading white space (Unicode's White_Space) holds a line feed or a carriage return.
      Others split header and content as one text, where the header's `\n` and that white space up to its last
      line break are one word; here they are two, since header and content weigh differently. Their ids differ
      where the vocabulary has a token across that border: with Nemo's those of `\nhi` (`\n\n` is a token), not
      those of ` \nhi`. All other contents, `  hi` or `hi` after a tab or a U+2028, have equal ids. With
      `newline_in_content` these have equal ids too, as the border is before that `\n`.
    - Contents that hold a control token's name. Others find it there; here it stays text.

    Args:
        tokenizer: only whether it has BOS matters.

    Returns:
        The template. It has no default system prompt: training inserts none unless told to, and a model that learnt
        with one gets it as a message.
    """
    # For any Jinja engine, minijinja and llama.cpp's own too: a loop, a condition, texts and `+`. So no
    # `{% generation %}`, a tag of transformers alone, and no line break outside a text, which engines strip in
    # different ways.
    bos = "" if tokenizer.bos_id is None else "{{ bos_token }}"
    message = r"{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    prompt = r"{{ '<|im_start|>assistant\n' }}"
    return (
        f"{bos}{{% for message in messages %}}{message}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{prompt}{{% endif %}}"
    )


def _opening(tokenizer: Tokenizer) -> list[int]:
    return [] if tokenizer.bos_id is None else [tokenizer.bos_id]


def _headers(tokenizer: Tokenizer, newline_in_content: bool) -> dict[str, list[int]]:
    """What stands before a content, by role; before prose nothing."""
    names = tokenizer.encode_batch([role if newline_in_content else f"{role}\n" for role in ROLES])
    return {role: [tokenizer.im_start_id, *name] for role, name in zip(ROLES, names, strict=True)} | {TEXT: []}


def _spread(values: NDArray[_T], starts: NDArray[np.int64], ends: NDArray[np.int64], total: int) -> NDArray[_T]:
    """An array of `total` entries that holds each value from its start to its end, and 0 elsewhere."""
    runs = np.diff(np.stack([starts, ends], axis=1).ravel(), prepend=0, append=total)
    filled = np.zeros(len(runs), values.dtype)
    filled[1::2] = values
    return np.repeat(filled, runs)


def _turns(
    tokens: Int32[np.ndarray, "tokens"], tokenizer: Tokenizer
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Where each turn starts, where its header does (that is behind BOS), its role's number, and where it ends.

    Control tokens are the structure's alone, so each `<|im_end|>` closes a turn, and the `<|im_start|>` before it, if
    there is one, opened the same turn; prose has none.
    """
    refusal = ValueError(
        f"these {len(tokens):,} tokens are no whole conversations as they are encoded here: found control tokens, "
        "roles or newlines out of place; expected all tokens of one or more conversations, and their own tokenizer"
    )
    [newline] = tokenizer.encode("\n")  # a byte is one token
    closed = np.flatnonzero(tokens == tokenizer.im_end_id)
    opened = np.flatnonzero(tokens == tokenizer.im_start_id)
    chat = np.searchsorted(closed, opened)
    if (np.diff(chat, append=len(closed)) < 1).any():
        raise refusal
    ends = closed + 1
    ends[chat] += 1
    if len(tokens) != (ends[-1] if len(ends) else 0) or (tokens[closed[chat] + 1] != newline).any():
        raise refusal
    starts = np.append(0, ends[:-1])[: len(ends)]
    opens = starts + np.isin(tokens[starts], _opening(tokenizer))
    kinds = np.full(len(ends), _KINDS[TEXT])
    for headers in (_headers(tokenizer, newline_in_content) for newline_in_content in (False, True)):
        for role in ROLES:
            places = opened[:, None] + np.arange(len(headers[role]))
            same = np.take(tokens, places, mode="clip") == np.array(headers[role])
            kinds[chat[same.all(axis=1)]] = _KINDS[role]
    if (opens[chat] != opened).any() or (kinds[chat] == _KINDS[TEXT]).any():
        raise refusal
    return starts, opens, kinds, ends
