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


def _opening(tokenizer: Tokenizer) -> list[int]:
    return [] if tokenizer.bos_id is None else [tokenizer.bos_id]


def _headers(tokenizer: Tokenizer) -> dict[str, list[int]]:
    return {role: [tokenizer.im_start_id, *tokenizer.encode(f"{role}\n")] for role in ROLES}
