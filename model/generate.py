"""Text from a trained network, one token at a time.

Owns the loop and the choice of the next token. Knows nothing of text: ids in, ids out.

Letters: V vocab_size.
"""

from collections.abc import Collection, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from model.attention import KeyValueCache
from model.transformer import Transformer


def generate(
    model: Transformer,
    tokens: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
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
        seed: Of the draws.

    Returns:
        An iterator over new ids.

    Raises:
        ValueError: An argument is out of range, at the call and not at the first id.

    Source:
        top_p: Holtzman et al., The Curious Case of Neural Text Degeneration (arXiv 1904.09751), section 3.1.
    """
    if not tokens:
        raise ValueError("tokens: found an empty prompt, expected at least one id")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens: found {max_new_tokens}, expected 0 or more")
    if not temperature >= 0:
        raise ValueError(f"temperature: found {temperature}, expected 0 or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: found {top_p}, expected more than 0 and at most 1")
    return _stream(model, list(tokens), max_new_tokens, frozenset(stop_ids), temperature, top_p, seed)


def _stream(
    model: Transformer,
    tokens: list[int],
    max_new_tokens: int,
    stop_ids: frozenset[int],
    temperature: float,
    top_p: float,
    seed: int,
) -> Iterator[int]:
    cache = KeyValueCache(model.config.n_layers, len(tokens) + max_new_tokens)
    generator = torch.Generator().manual_seed(seed)
    newest, seen = tokens, 0
    for _ in range(max_new_tokens):
        logits = _next_logits(model, newest, seen, cache)
        seen += len(newest)
        token = _choose(logits, temperature, top_p, generator)
        yield token
        if token in stop_ids:
            return
        newest = [token]


@torch.no_grad()  # here and not around the loop: a generator would leave its caller without gradients
def _next_logits(model: Transformer, newest: list[int], seen: int, cache: KeyValueCache) -> Tensor:
    """Logits [V] after the newest tokens, the first of which has position `seen`; float64 on the CPU."""
    device = next(model.parameters()).device
    count = len(newest)
    logits: Tensor = model(
        torch.tensor(newest, device=device),
        torch.arange(seen, seen + count, device=device),
        torch.tensor([0, count], dtype=torch.int32, device=device),
        count,
        label_positions=torch.tensor([count - 1], device=device),
        cache=cache,
    )
    return logits[0].double().cpu()


def _choose(logits: Float[Tensor, " V"], temperature: float, top_p: float, generator: torch.Generator) -> int:
    """The next id, by inverting the distribution function at a random point."""
    if temperature == 0:
        return int(logits.argmax())
    # Shifted first: a tiny temperature would else divide to infinity, and infinity minus itself is not a
    # number.
    probabilities, ids = ((logits - logits.max()) / temperature).softmax(dim=0).sort(descending=True, stable=True)
    cumulative = probabilities.cumsum(dim=0)
    kept = cumulative[: 1 + int((cumulative < top_p).sum())]
    point = torch.rand((), dtype=torch.float64, generator=generator) * kept[-1]
    return int(ids[min(int(torch.searchsorted(kept, point, right=True)), len(kept) - 1)])
