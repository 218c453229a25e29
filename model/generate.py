"""Text from a trained network, one token at a time.

Owns the loop and the choice of the next token. Knows nothing of text: ids in, ids out.

Letters: V vocab_size, B sequences.
"""

import itertools
import math
from collections.abc import Collection, Iterator, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from model.attention import KeyValueCache
from model.transformer import Transformer

PREFILL_TOKENS = 16_384
"""Most tokens of several prompts in one forward: bounds its activations, which grow with them."""


class Past:
    """What a model has read of one conversation, so that the next reply reads only what is new.

    For one model, and for one reply at a time.

    Args:
        model: Whose keys and values it will hold.

    Attributes:
        tokens: Those that have passed through the model.
        cache: Their keys and values.
    """

    def __init__(self, model: Transformer) -> None:
        self.tokens: list[int] = []
        self.cache = KeyValueCache(model.config.n_layers)

    def rest(self, tokens: Sequence[int]) -> list[int]:
        """Cut the past back to where it agrees with `tokens`, and return those that follow: at least the last."""
        # An interrupt may fall between the forward and the note of it, and then the cache holds one more.
        known = min(len(self.tokens), len(tokens) - 1)
        same = next((i for i in range(known) if self.tokens[i] != tokens[i]), known)
        del self.tokens[same:]
        self.cache.cut([same])
        return list(tokens[same:])


def generate(
    model: Transformer,
    tokens: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    vocab_size: int | None = None,
    seed: int = 0,
    past: Past | None = None,
) -> Iterator[int]:
    """Continue a prompt, yielding each id as soon as it is known.

    The model is called once for every id that is yielded: with the prompt, then with the newest token and a
    cache. So where its parameters are sharded, ranks that consume the same number of ids stay in step. Ids
    are drawn on the CPU in float64 from a generator of this call's own: the same seed gives the same reply on
    every rank and device whose logits agree.

    Args:
        model: Called through `__call__` without gradients; its parameters' device is used.
        tokens: The prompt, at least one id.
        max_new_tokens: The most ids to yield.
        stop_ids: The reply ends after any of these, which is yielded too.
        temperature: Logits are divided by it; 0 takes the likeliest id.
        top_p: Draw only from the likeliest ids whose probabilities together first reach this, in (0, 1].
        repetition_penalty: Logits of ids that stand in the prompt or the reply are divided by it where they are
            positive, multiplied where negative; 1 leaves them.
        vocab_size: Only ids below it are chosen; a matrix may have rows for which the tokenizer has no text.
        seed: Of the draws.
        past: What the model has read already; the prompt's tokens that follow what both share are read, and all
            is noted there. It stays true where the iterator is left or interrupted half-way.

    Returns:
        An iterator over new ids.

    Raises:
        ValueError: An argument is out of range, at the call and not at the first id.

    Source:
        top_p: Holtzman et al., The Curious Case of Neural Text Degeneration (arXiv 1904.09751), section 3.1.
        repetition_penalty: Keskar et al., CTRL (arXiv 1909.05858), section 4.1; there logits are divided whatever
            their sign, which would favour an id whose logit is negative. As here in transformers.
    """
    choices = _Choices([tokens], max_new_tokens, temperature, top_p, repetition_penalty, vocab_size, seed)
    past = Past(model) if past is None else past
    return _stream(model, list(tokens), past, choices, max_new_tokens, frozenset(stop_ids))


def _stream(
    model: Transformer,
    tokens: list[int],
    past: Past,
    choices: "_Choices",
    max_new_tokens: int,
    stop_ids: frozenset[int],
) -> Iterator[int]:
    newest = past.rest(tokens)
    for _ in range(max_new_tokens):
        logits = _next_logits(model, [newest], past.cache)
        past.tokens += newest
        [token] = choices.next(logits)
        yield token
        if token in stop_ids:
            return
        newest = [token]


def generate_batch(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    vocab_size: int | None = None,
    seed: int = 0,
) -> list[list[int]]:
    """Continue many prompts at once, each as `generate` would continue it alone with the same seed.

    Prompts are read as packs, without padding. Then every forward gives each unfinished reply its next id; a
    finished one leaves the cache. All caches are in memory at once: so many tokens as the longest prompt and
    reply, times the prompts.

    Args:
        model: As in `generate`.
        prompts: At least one id each.
        max_new_tokens: The most ids of a reply.
        stop_ids: A reply ends after any of these, which is its last id.
        temperature: As in `generate`.
        top_p: As in `generate`.
        repetition_penalty: As in `generate`.
        vocab_size: As in `generate`.
        seed: Every prompt draws from a generator of its own, with this seed: what is beside it does not matter.

    Returns:
        The new ids of each prompt. Logits of a batch differ from a single prompt's by rounding, so equal ids are
        as certain as the logits' distances are above it: in float32 practically always, in bfloat16 not.

    Raises:
        ValueError: An argument is out of range.
    """
    choices = _Choices(prompts, max_new_tokens, temperature, top_p, repetition_penalty, vocab_size, seed)
    replies: list[list[int]] = [[] for _ in prompts]
    cache = KeyValueCache(model.config.n_layers, len(prompts))
    live = list(range(len(prompts)))
    newest = [list(prompt) for prompt in prompts]
    for _ in range(max_new_tokens):
        if not live:
            break
        ids = choices.next(_next_logits(model, newest, cache))
        for i, token in zip(live, ids, strict=True):
            replies[i].append(token)
        going = [n for n, token in enumerate(ids) if token not in stop_ids]
        if len(going) < len(live):
            live = [live[n] for n in going]
            cache.keep(going)
            choices.keep(going)
        newest = [[replies[i][-1]] for i in live]
    return replies


@torch.no_grad()  # here and not around the loop: a generator would leave its caller without gradients
def _next_logits(model: Transformer, newest: Sequence[Sequence[int]], cache: KeyValueCache) -> Float[Tensor, "B V"]:
    """Logits after each sequence's newest tokens, on the model's device; by several packs where they are many."""
    device = next(model.parameters()).device
    logits = []
    for begin, end in _packs([len(tokens) for tokens in newest]):
        # The others' documents are empty in this pack.
        documents = [tokens if begin <= i < end else () for i, tokens in enumerate(newest)]
        counts = [len(tokens) for tokens in documents]
        bounds = [0, *itertools.accumulate(counts)]
        positions = [n + i for n, count in zip(cache.lengths, counts, strict=True) for i in range(count)]
        out: Tensor = model(
            torch.tensor([token for tokens in documents for token in tokens], device=device),
            torch.tensor(positions, device=device),
            torch.tensor(bounds, dtype=torch.int32, device=device),
            max(counts),
            label_positions=torch.tensor([bound - 1 for bound in bounds[begin + 1 : end + 1]], device=device),
            cache=cache,
        )
        logits.append(out)
    return torch.cat(logits)


def _packs(counts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Runs of sequences, [begin, end), of at most `PREFILL_TOKENS` together or one sequence alone."""
    begin, total = 0, 0
    for i, count in enumerate(counts):
        if i > begin and total + count > PREFILL_TOKENS:
            yield begin, i
            begin, total = i, 0
        total += count
    yield begin, len(counts)


class _Choices:
    """The next id of each of B sequences, which share the settings and nothing else.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        repetition_penalty: float,
        vocab_size: int | None,
        seed: int,
    ) -> None:
        if not all(prompts):
            raise ValueError("tokens: found an empty prompt, expected at least one id")
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens: found {max_new_tokens}, expected 0 or more")
        if not temperature >= 0:
            raise ValueError(f"temperature: found {temperature}, expected 0 or more")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p: found {top_p}, expected more than 0 and at most 1")
        if not 0 < repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty: found {repetition_penalty}, expected more than 0")
        self.temperature, self.top_p, self.penalty = temperature, top_p, repetition_penalty
        self.prompts, self.vocab_size = prompts, vocab_size
        self.generators = [torch.Generator().manual_seed(seed) for _ in prompts]
        self.seen: Bool[Tensor, "B V"] | None = None  # made when the logits' device is known

    def next(self, logits: Float[Tensor, "B V"]) -> list[int]:
        """An id for each sequence; the likeliest are found on the device, which then need not hand over the logits."""
        logits = logits[:, : self.vocab_size]
        if self.penalty != 1:
            if self.seen is None:
                self.seen = torch.zeros_like(logits, dtype=torch.bool)
                for seen, prompt in zip(self.seen, self.prompts, strict=True):
                    seen[torch.tensor(prompt, device=logits.device)] = True
            penalised = torch.where(logits < 0, logits * self.penalty, logits / self.penalty)
            logits = torch.where(self.seen, penalised, logits)
        if self.temperature == 0:
            newest = logits.argmax(dim=1)
        else:
            rows = zip(logits.double().cpu(), self.generators, strict=True)
            newest = torch.tensor([_draw(row, self.temperature, self.top_p, generator) for row, generator in rows])
        if self.seen is not None:
            self.seen.scatter_(1, newest[:, None].to(logits.device), True)
        return newest.tolist()

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all other sequences."""
        self.generators = [self.generators[i] for i in rows]
        if self.seen is not None:
            self.seen = self.seen[list(rows)]


def _draw(logits: Float[Tensor, " V"], temperature: float, top_p: float, generator: torch.Generator) -> int:
    """An id, by inverting the distribution function at a random point."""
    # Shifted first: a tiny temperature would else divide to infinity, and infinity minus itself is not a
    # number.
    kept = ((logits - logits.max()) / temperature).softmax(dim=0)
    ids = torch.arange(len(kept))
    if top_p < 1:
        # Ids below this bound together have less than 1 - top_p, so none of them is needed: few are left to sort.
        ids = (~(kept < (1 - top_p) / len(kept))).nonzero()[:, 0]
        kept, order = kept[ids].sort(descending=True, stable=True)
        ids = ids[order]
        kept = kept[: 1 + int((kept.cumsum(dim=0) < top_p).sum())]
    cumulative = kept.cumsum(dim=0)
    point = torch.rand((), dtype=torch.float64, generator=generator) * cumulative[-1]
    return int(ids[min(int(torch.searchsorted(cumulative, point, right=True)), len(kept) - 1)])
