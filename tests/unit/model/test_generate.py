"""Replies: the cache against no cache, the draw against its distribution, and the number of forwards."""

import pytest
import torch

import model.generate
from model.attention import KeyValueCache
from model.generate import Past, _Choices, _draw, _packs, generate, generate_batch
from models import TINY, assert_close, tiny_model, tiny_pack, without_labels

PROMPT = tiny_pack([7])["tokens"].tolist()


@pytest.fixture(scope="module")
def network():
    return tiny_model()


@pytest.fixture
def given(network):
    """Numbers of tokens that the network is given, forward by forward."""
    counts = []
    handle = network.register_forward_pre_hook(lambda _, inputs: counts.append(len(inputs[0])))
    yield counts
    handle.remove()


@pytest.mark.parametrize(
    "steps",
    [
        [(12,)],
        [(7,), *[(1,)] * 5],
        [(5,), (4,), (3,)],
        [(9, 2, 4), (1, 1, 1), (1, 1, 1)],
        [(3, 6), (5, 1), (1, 1), (0, 2)],
    ],
    ids=["at once", "reply", "in pieces", "batch", "batch in pieces"],
)
def test_cached_logits_equal_the_uncached(steps):
    network = tiny_model(torch.float64)
    totals = [sum(counts) for counts in zip(*steps, strict=True)]
    pack = without_labels(tiny_pack(totals, torch.float64))
    documents = pack["tokens"].split(totals)
    cache, parts = KeyValueCache(TINY.n_layers, len(totals)), [[] for _ in totals]
    with torch.no_grad():
        for counts in steps:
            begins = cache.lengths
            spans = [(begin, begin + n) for begin, n in zip(begins, counts, strict=True)]
            logits = network(
                torch.cat([tokens[slice(*span)] for tokens, span in zip(documents, spans, strict=True)]),
                torch.cat([torch.arange(*span) for span in spans]),
                torch.tensor([0, *counts]).cumsum(0).to(torch.int32),
                max(counts),
                cache=cache,
            )
            for found, part in zip(parts, logits.split(counts), strict=True):
                found.append(part)
    assert_close(torch.cat([part for found in parts for part in found]), network(**pack), 1e-12)


def test_a_pack_has_a_document_for_each_sequence_of_the_cache():
    pack = without_labels(tiny_pack([3, 4]))
    with pytest.raises(ValueError, match="found 2 documents, expected 1, as the cache has"):
        tiny_model()(**pack, cache=KeyValueCache(TINY.n_layers))


def test_a_forward_that_fails_half_way_leaves_the_cache_as_it_was(network, monkeypatch):
    past = Past(network)
    list(generate(network, PROMPT, max_new_tokens=2, past=past))
    read, before = list(past.tokens), past.cache.lengths
    with monkeypatch.context() as patched:
        patched.setattr(network.layers[1], "forward", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            list(generate(network, [*read, 5, 6], max_new_tokens=2, past=past))
    assert (past.tokens, past.cache.lengths) == (read, before)
    longer = [*PROMPT, 1, 2, 3]
    expected = list(generate(network, longer, max_new_tokens=6))
    assert list(generate(network, longer, max_new_tokens=6, past=past)) == expected


def test_greedy_takes_the_likeliest_id_at_every_step(network):
    reply = list(generate(network, PROMPT, max_new_tokens=6))
    tokens = list(PROMPT)
    for token in reply:
        pack = without_labels(tiny_pack([len(tokens)])) | {"tokens": torch.tensor(tokens)}
        assert token == network(**pack)[-1].argmax()
        tokens.append(token)


def test_a_stop_id_is_yielded_and_ends_the_reply(network):
    reply = list(generate(network, PROMPT, max_new_tokens=6))
    stop = reply[2]
    until = reply[: reply.index(stop) + 1]
    assert list(generate(network, PROMPT, max_new_tokens=6, stop_ids=[stop])) == until


def test_the_same_seed_gives_the_same_reply_and_another_another(network):
    def reply(seed):
        return list(generate(network, PROMPT, max_new_tokens=12, temperature=1.0, seed=seed))

    assert reply(1) == reply(1)
    assert reply(1) != reply(2)


def test_each_id_costs_one_forward_of_one_token_and_comes_at_once(network, given):
    stream = generate(network, PROMPT, max_new_tokens=4)
    counts = [len(given) for _ in stream]
    assert counts == [1, 2, 3, 4]
    assert given == [len(PROMPT), 1, 1, 1]


def test_over_a_conversation_each_token_passes_through_the_network_once(network, given):
    past, tokens = Past(network), list(PROMPT)
    for turn in ([11, 12], [13], [14, 15, 16]):
        fresh = list(generate(network, tokens, max_new_tokens=5))
        given.clear()
        read = len(past.tokens)
        reply = list(generate(network, tokens, max_new_tokens=5, past=past))
        assert reply == fresh
        assert given == [len(tokens) - read, 1, 1, 1, 1]
        tokens += [*reply, *turn]
    assert past.tokens == tokens[: len(past.tokens)]
    assert len(past.tokens) == len(tokens) - len(turn) - 1  # the last id was said, not read


def test_what_was_read_is_cut_back_to_what_both_share(network, given):
    past = Past(network)
    first = list(generate(network, PROMPT, max_new_tokens=8, past=past))
    given.clear()
    assert list(generate(network, PROMPT, max_new_tokens=8, past=past)) == first  # again
    assert given[0] == 1
    other = [*PROMPT[:4], 9, 9]
    expected = list(generate(network, other, max_new_tokens=8))
    given.clear()
    assert list(generate(network, other, max_new_tokens=8, past=past)) == expected
    assert given[0] == 2


def test_a_reply_that_is_left_half_way_may_be_followed_by_another(network):
    past = Past(network)
    stream = generate(network, PROMPT, max_new_tokens=8, past=past)
    begun = [next(stream), next(stream)]
    stream.close()
    assert past.cache.lengths == (len(past.tokens),)
    tokens = [*PROMPT, *begun, 3]
    expected = list(generate(network, tokens, max_new_tokens=5))
    assert list(generate(network, tokens, max_new_tokens=5, past=past)) == expected


SETTINGS = [{}, {"temperature": 1.0, "seed": 3}, {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.2}]


@pytest.mark.parametrize("settings", SETTINGS, ids=["greedy", "sampled", "penalised"])
@pytest.mark.parametrize("limit", [16_384, 10], ids=["one pack", "several packs"])
def test_a_batch_gives_what_each_prompt_gives_alone(network, monkeypatch, settings, limit):
    monkeypatch.setattr(model.generate, "PREFILL_TOKENS", limit)
    prompts = [tiny_pack([n], seed=n)["tokens"].tolist() for n in (7, 1, 12, 3, 1, 6)]
    plain = [list(generate(network, prompt, max_new_tokens=10, **settings)) for prompt in prompts]
    stop_ids = [plain[0][2], plain[3][6]]  # two end early, at different times
    alone = [list(generate(network, p, max_new_tokens=10, stop_ids=stop_ids, **settings)) for p in prompts]
    assert len({len(reply) for reply in alone}) >= 3
    assert generate_batch(network, prompts, max_new_tokens=10, stop_ids=stop_ids, **settings) == alone


def test_a_batch_costs_a_token_for_each_unfinished_reply(network, given):
    prompts = [PROMPT, PROMPT[:2]]
    first, second = generate_batch(network, prompts, max_new_tokens=8)
    place, stop = next((i, token) for i, token in enumerate(first) if token not in second)
    given.clear()
    generate_batch(network, prompts, max_new_tokens=8, stop_ids=[stop])
    assert given == [len(PROMPT) + 2, *[2] * place, *[1] * (7 - place)]


def test_no_prompts_give_no_replies(network, given):
    assert generate_batch(network, [], max_new_tokens=8) == []
    assert generate_batch(network, [PROMPT], max_new_tokens=0) == [[]]
    assert given == []


def test_several_prompts_are_split_into_packs_of_bounded_size():
    assert list(_packs([9, 9, 9])) == [(0, 3)]
    assert list(_packs([9000, 9000, 20_000, 1, 16_383, 1])) == [(0, 1), (1, 2), (2, 3), (3, 5), (5, 6)]


def test_repetition_lowers_logits_of_either_sign():
    choices = _Choices([[1, 2], [3]], 1, 0.0, 1.0, 2.0, None, 0)
    # 1 falls from 3 to 1.5 and 2 from -1 to -2; in the second, 3 falls from 5 to 2.5.
    logits = torch.tensor([[2.0, 3.0, -1.0, 0.0], [2.0, 1.0, 0.0, 5.0]])
    assert choices.next(logits) == [0, 3]
    assert choices.next(logits) == [1, 3]  # 0, chosen before, has fallen to 1
    assert choices.next(torch.tensor([[-3.0, -3.0, -3.0, -5.0], [-2.0, -3.0, -4.0, -2.0]])) == [3, 0]


def test_the_callers_gradients_stay_on_between_ids(network):
    stream = generate(network, PROMPT, max_new_tokens=2)
    next(stream)
    assert torch.is_grad_enabled()
    stream.close()


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (1.0, 1.0, [0.5, 0.3, 0.15, 0.05]),
        (1.0, 0.81, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
        (1.0, 0.79, [0.625, 0.375, 0, 0]),
        (1.0, 0.01, [1, 0, 0, 0]),
        (0.5, 1.0, [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
        (1e-300, 1.0, [1, 0, 0, 0]),
    ],
)
def test_draws_follow_the_tempered_and_cut_distribution(temperature, top_p, expected):
    """Of 2,000 draws a share is off by 0.011 in the mean square; 0.045 is four times that."""
    logits = torch.tensor([0.05, 0.5, 0.15, 0.3], dtype=torch.float64).log()
    generator = torch.Generator().manual_seed(0)
    draws = torch.tensor([_draw(logits, temperature, top_p, generator) for _ in range(2000)])
    shares = draws.bincount(minlength=4)[[1, 3, 2, 0]] / 2000
    assert (shares - torch.tensor(expected)).abs().max() < 0.045
    assert shares[torch.tensor(expected) == 0].eq(0).all()


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "top_p": 0.9}, {"repetition_penalty": 1.3}], ids=str)
def test_ids_for_which_the_tokenizer_has_no_text_are_never_chosen(options):
    """The further rows of the matrix would win every time."""
    model = tiny_model()
    with torch.no_grad():
        model.output.weight[500:] *= 100
    assert max(generate(model, PROMPT, max_new_tokens=8, **options)) >= 500
    assert max(generate(model, PROMPT, max_new_tokens=8, vocab_size=500, **options)) < 500
    replies = generate_batch(model, [PROMPT, PROMPT[:3]], max_new_tokens=8, vocab_size=500, **options)
    assert max(max(reply) for reply in replies) < 500


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "tokens: found an empty prompt"),
        ([1], {"max_new_tokens": -1}, "max_new_tokens: found -1"),
        ([1], {"temperature": -0.1}, "temperature: found -0.1"),
        ([1], {"top_p": 0.0}, "top_p: found 0.0"),
        ([1], {"top_p": 1.5}, "top_p: found 1.5"),
        ([1], {"repetition_penalty": 0.0}, "repetition_penalty: found 0.0"),
    ],
)
def test_wrong_arguments_are_refused_at_the_call(network, prompt, options, message):
    with pytest.raises(ValueError, match=message):
        generate(network, prompt, **({"max_new_tokens": 1} | options))
    with pytest.raises(ValueError, match=message):
        generate_batch(network, [[1], prompt], **({"max_new_tokens": 1} | options))
