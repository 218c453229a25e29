r"""`Conversation` → tokens and loss weights, in ChatML.

    [BOS] then per message  <|im_start|> role\n  content  <|im_end|>  \n

Each piece is encoded by itself, so the weight of a token is known when the token is made and never searched
for afterwards, and a control token is an id put there by this file, never the outcome of encoding text. Knows
no files and no packs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float32, Int32

from data.conversation import LARGEST_WEIGHT, ROLES, Conversation, Message
from data.tokenizer import Tokenizer


@dataclass(frozen=True)
class EncodeOptions:
    """What of a conversation is trained.

    Args:
        role_weights: loss weight of a role's content and its closing token; roles not named have 0.
            Multiplied by the message's own weight.

    Raises:
        ValueError: an unknown role, or a weight that is negative or not finite.
    """

    role_weights: Mapping[str, float] = field(default_factory=lambda: {"assistant": 1.0})

    def __post_init__(self) -> None:
        for role, weight in self.role_weights.items():
            if role not in ROLES:
                raise ValueError(f"role_weights names {role!r}; expected roles among {', '.join(ROLES)}")
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


def encode(conversation: Conversation, tokenizer: Tokenizer, options: EncodeOptions | None = None) -> Example:
    """Encode one conversation.

    The content and its `<|im_end|>` weigh role weight × message weight: a model that never gets a loss on the
    closing token never learns to stop. Headers, BOS and the newline after `<|im_end|>` weigh 0.

    Args:
        conversation: what to encode.
        tokenizer: text ↔ ids.
        options: what is trained; by default the assistant alone.

    Returns:
        Its tokens [n], their weights [n] and the conversation's own weight.
    """
    return encode_many([conversation], tokenizer, options)[0]


def encode_many(
    conversations: Sequence[Conversation], tokenizer: Tokenizer, options: EncodeOptions | None = None
) -> list[Example]:
    """Encode many conversations at once; the same as `encode` on each, several times as fast.

    Args:
        conversations: what to encode; all of it is in memory at once, so callers bound the number.
        tokenizer: text ↔ ids.
        options: what is trained; by default the assistant alone.

    Returns:
        One example for each conversation, in order.
    """
    role_weights = (options or EncodeOptions()).role_weights
    contents = tokenizer.encode_batch([m.content for c in conversations for m in c.messages])
    headers, newline = _headers(tokenizer), tokenizer.encode("\n")
    examples = []
    position = 0
    for conversation in conversations:
        tokens = _opening(tokenizer)
        weights = [0.0] * len(tokens)
        for message in conversation.messages:
            header, content = headers[message.role], contents[position]
            position += 1
            tokens += [*header, *content, tokenizer.im_end_id, *newline]
            weight = role_weights.get(message.role, 0.0) * message.weight
            weights += [0.0] * len(header) + [weight] * (len(content) + 1) + [0.0] * len(newline)
        examples.append(Example(np.array(tokens, np.int32), np.array(weights, np.float32), float(conversation.weight)))
    return examples


def encode_prompt(messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    r"""Encode messages and open the assistant's answer, for generation.

    Args:
        messages: the conversation so far.
        tokenizer: text ↔ ids.

    Returns:
        Exactly the ids that training put before an answer: the messages, then `<|im_start|>assistant\n`.
    """
    so_far = encode(Conversation(tuple(messages), source=""), tokenizer)
    return [*so_far.tokens.tolist(), *_headers(tokenizer)["assistant"]]


def chat_template(tokenizer: Tokenizer) -> str:
    r"""The Jinja template by which servers and other libraries write conversations as `encode` does.

    Rendered and encoded by them, messages give the ids of `encode`, and with `add_generation_prompt` those of
    `encode_prompt`, for any contents but two kinds. Both concern Tekken's split of text into words, which the
    tokenizers trained here share.

    - Contents whose leading white space (Unicode's White_Space) holds a line feed or a carriage return.
      Others split header and content as one text, where the header's `\n` and that white space up to its last
      line break are one word; here they are two, since header and content weigh differently. Their ids differ
      where the vocabulary has a token across that border: with Nemo's those of `\nhi` (`\n\n` is a token), not
      those of ` \nhi`. All other contents, `  hi` or `hi` after a tab or a U+2028, have equal ids.
    - Contents that hold a control token's name. Others find it there; here it stays text.

    Args:
        tokenizer: only whether it has BOS matters.

    Returns:
        The template. It has no default system prompt, since training inserts none.
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


def _headers(tokenizer: Tokenizer) -> dict[str, list[int]]:
    return {role: [tokenizer.im_start_id, *tokenizer.encode(f"{role}\n")] for role in ROLES}
