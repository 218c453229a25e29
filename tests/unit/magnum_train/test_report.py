"""The report's numbers are those of a count by hand; its page shows every token as it is, and runs nothing."""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import Conversation, Message, Tokenizer
from data.chatml import encode
from data.conversation import ROLES
from data.documents import Documents
from data.ledger import Ledger
from data.loader import Repeats, Schedule
from data.prepared import Prepared
from data.tokenizer import train_tokenizer
from magnum_train import report
from magnum_train.config import compose
from magnum_train.errors import ConfigError
from magnum_train.report import choose, main, measure, page, summary
from tiny_runs import overrides

TEXTS = ["the boat sails at noon and the harbour is quiet", "Grüße 🤖 你好", "What is it? It is a boat."] * 5
WORDS = ["the", "boat", "sails", "at", "noon", "Grüße", "🤖", "你好", "\n", "  ", "<|im_end|>", "<b>", "&amp;"]
NASTY = "</p></style><script>alert(1)</script><img src=x onerror=alert(2)>\u202e\x00\x1b[31m\r\u200b\tx &lt; \"'"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 300)


@pytest.fixture(scope="module")
def byte_tokenizer() -> Tokenizer:
    """Each byte a token of its own: every character beyond ASCII is made of several."""
    return train_tokenizer([], 261)


def said(*contents: str, first: str = "user") -> Conversation:
    """A conversation of user and assistant in turn."""
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return Conversation(tuple(Message(roles[n % 2], content) for n, content in enumerate(contents)), "")


def prose(content: str) -> Conversation:
    return Conversation((Message("text", content),), "")


def random_conversations(count: int, seed: int) -> list[Conversation]:
    """Any order of roles, some turns without weight, some prose; some phrases come again."""
    rng = np.random.default_rng(seed)

    def text() -> str:
        return " ".join(rng.choice(WORDS, rng.integers(0, 30)).tolist())

    found = []
    for _ in range(count):
        if rng.random() < 0.2:
            found.append(prose(text() + " end"))
            continue
        roles = rng.choice(ROLES, rng.integers(1, 7)).tolist()
        messages = [Message(role, text(), float(rng.choice([0.0, 0.5, 1.0]))) for role in roles]
        again = messages[0].content * int(rng.integers(0, 3))
        found.append(Conversation((*messages, Message("assistant", again + "done")), ""))
    return found


@pytest.fixture
def make(tmp_path: Path, tokenizer: Tokenizer) -> Callable[..., Prepared]:
    """A prepared set of given conversations, its documents in another order than their tokens, with gaps between."""

    def make(
        train: Mapping[str, Sequence[Conversation]],
        validation: Mapping[str, Sequence[Conversation]] | None = None,
        *,
        rejects: Sequence[Mapping[str, Any]] = (),
        using: Tokenizer = tokenizer,
        names: Sequence[str] | None = None,
    ) -> Prepared:
        names = list(train) if names is None else list(names)
        ledger = Ledger(names)
        tokens, weights, end = [np.array([7, 7], np.int32)], [np.ones(2, np.float32)], 2
        parts: list[dict[str, list[Any]]] = []
        for gate, part in (("packed", train), ("validation", validation or {})):
            columns: dict[str, list[Any]] = {name: [] for name in ("starts", "lengths", "sources", "rows", "scales")}
            columns |= {"weight_sums": [], "weighted_tokens": []}
            for name, conversations in part.items():
                for row, conversation in enumerate(conversations, start=1):
                    example = encode(conversation, using)
                    tokens += [example.tokens, np.array([9], np.int32)]
                    weights += [example.weights, np.ones(1, np.float32)]
                    ledger.read(name, 1, len(example.tokens))
                    ledger.ended(name, gate, 1, len(example.tokens))
                    values = (end, len(example.tokens), names.index(name), row, example.weight)
                    sums = (float(example.weights.sum()), int(np.count_nonzero(example.weights)))
                    for column, value in zip(columns.values(), values + sums, strict=True):
                        column.append(value)
                    end += len(example.tokens) + 1
            parts.append(columns)
        order = np.random.default_rng(5).permutation(len(parts[0]["rows"]))
        kinds = (np.int64, np.int64, np.int64, np.int64, np.float64, np.float64, np.int64)
        documents = []
        for columns, chosen in zip(parts, (order, slice(None)), strict=True):
            arrays = {n: np.array(v, kind)[chosen] for (n, v), kind in zip(columns.items(), kinds, strict=True)}
            documents.append(Documents(tokens=np.concatenate(tokens), weights=np.concatenate(weights), **arrays))
        file = tmp_path / "rejects.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rejects), encoding="utf-8")
        return Prepared(tmp_path, "0123456789abcdef", True, (), using, *documents, tuple(names), ledger, file)

    return make


def schedule(prepared: Prepared, **more: Any) -> Schedule:
    longest = int(prepared.train.lengths.max())
    settings = {"pack_tokens": 2 * longest, "pack_documents": 8, "packs_per_step": 2, "seed": 1}
    return Schedule(prepared.train.lengths, **(settings | {"epochs": None, "max_steps": 1} | more))


def whole_page(prepared: Prepared, **more: Any) -> str:
    return page(prepared, measure(prepared), schedule(prepared), **more)


@dataclass
class Shown:
    """One conversation on the page: for each token its id, its weight and whether it is a badge; text; the heading."""

    heading: str = ""
    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    badges: list[bool] = field(default_factory=list)
    text: str = ""


class Page(HTMLParser):
    """What is on a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.shown: list[Shown] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.titles: list[str] = []
        self._inside: list[str] = []
        self._rows: list[list[str]] = []
        self._weight = 0.0
        self.feed(text)
        self.close()
        assert not self._inside, f"not closed: {self._inside}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attrs
        given = dict(attrs)
        if tag in ("meta", "input", "br"):
            return
        self._inside.append(tag)
        if tag == "details":
            self.shown.append(Shown())
        elif tag == "table":
            self._rows = []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("th", "td"):
            self._rows[-1].append("")
        elif tag == "title":
            self.titles.append("")
        elif tag == "span" and "p" in self._inside:
            found = re.search("--w:'(.*?)'", given.get("style") or "")
            self._weight = float(found[1]) if found else 0.0
        elif "data-i" in given:
            ids = [int(number) for number in str(given["data-i"]).split("+")]
            self.shown[-1].ids += ids
            self.shown[-1].weights += [self._weight] * len(ids)
            self.shown[-1].badges += [tag == "b"] * len(ids)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._inside.pop() == tag
        if tag == "table":
            self.tables[self._rows[0][0]] = self._rows

    def handle_data(self, data: str) -> None:
        if "style" in self._inside:
            return
        self.text += data
        if "title" in self._inside:
            self.titles[-1] += data
        elif self._inside and self._inside[-1] in ("th", "td"):
            self._rows[-1][-1] += data
        if "summary" in self._inside:
            self.shown[-1].heading += data
        elif "details" in self._inside and "u" not in self._inside and self._inside[-1] in ("i", "b"):
            self.shown[-1].text += data


def tokens_by_role(conversation: Conversation, tokenizer: Tokenizer) -> dict[str, tuple[int, int]]:
    """For each role its tokens and how many of them are supervised, from the texts alone."""
    counts: dict[str, tuple[int, int]] = {}
    for number, message in enumerate(conversation.messages):
        content = len(tokenizer.encode(message.content)) + 1
        around = 0 if message.role == "text" else len(tokenizer.encode(f"{message.role}\n")) + 2
        trained = message.role in ("assistant", "text") and message.weight > 0
        all_, supervised = counts.get(message.role, (0, 0))
        first = number == 0  # BOS
        counts[message.role] = all_ + content + around + first, supervised + trained * content
    return counts


def test_numbers_are_those_of_a_count_by_hand(make: Callable[..., Prepared], tokenizer: Tokenizer) -> None:
    train = {"plays": random_conversations(40, 1), "logs": random_conversations(25, 2), "one": [said("a", "b")]}
    validation = {"logs": random_conversations(6, 3)}
    prepared = make(train, validation)
    shown = Page(whole_page(prepared)).tables

    expected: dict[str, Counter[tuple[str, int]]] = {name: Counter() for name in (*train, "all")}
    for name, conversations in train.items():
        for conversation in conversations:
            for role, (all_, supervised) in tokens_by_role(conversation, tokenizer).items():
                for place in (name, "all"):
                    expected[place][role, 0] += all_
                    expected[place][role, 1] += supervised
    head, *rows = shown["tokens by role"]
    assert [row[0] for row in rows] == ["plays", "logs", "one", "all"]
    for name, *cells in rows:
        for column, cell in zip(head[1:], cells, strict=True):
            role, _, supervised = column.partition(", ")
            assert int(cell.replace(",", "")) == expected[name][role, bool(supervised)], (name, column)
    assert {column for column in head[1:] if "supervised" not in column} == {*ROLES, "text"}

    for name, conversations in (*train.items(), ("all", [c for part in train.values() for c in part])):
        lengths = sorted(len(encode(c, tokenizer).tokens) for c in conversations)
        supervised = sum(n for (_, on), n in expected[name].items() if on)
        turns = sum(len(c.messages) for c in conversations) / len(conversations)
        median, most = lengths[(len(lengths) - 1) // 2], lengths[int(0.9 * (len(lengths) - 1))]
        held_out = len(validation.get(name, ())) if name != "all" else 6
        row = [f"{len(lengths):,}", f"{sum(lengths):,}", f"{supervised:,}", f"{supervised / sum(lengths):.1%}"]
        row += [f"{median:,}", f"{most:,}", f"{lengths[-1]:,}", f"{turns:.1f}", str(held_out)]
        assert [name, *row] in shown["training"]


def test_the_ledger_and_the_mix_of_the_first_epoch_are_on_the_page(make: Callable[..., Prepared]) -> None:
    prepared = make({"a": random_conversations(12, 1), "b": random_conversations(5, 2)})
    plan = schedule(prepared, repeats=Repeats(prepared.train.sources, [1.0, 3.0], 1))
    shown = Page(page(prepared, measure(prepared), plan)).tables
    of_b = int(prepared.train.lengths[prepared.train.sources == 1].sum())
    assert shown["first epoch"][2][:3] == ["b", "15", f"{3 * of_b:,}"]
    assert shown["rows"][0] == ["rows", *(column.replace("_", " ") for column in prepared.ledger.columns())]
    assert shown["rows"][-1][:2] == ["all", "17"]
    assert shown["tokens"][2][1] == f"{of_b:,}"
    packs = plan.packing(0)
    assert f"{len(packs):,} of {plan.pack_tokens:,} tokens" in Page(page(prepared, measure(prepared), plan)).text
    assert f"{plan.fill(0):.2%}" in summary(prepared, measure(prepared), plan)


@pytest.mark.parametrize("bos", [True, False])
def test_measures_are_those_of_a_count_by_hand(
    bos: bool, make: Callable[..., Prepared], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    if not bos:  # then nothing stands between a conversation's last newline and the prose that follows it
        tokenizer.save(tmp_path / "tokenizer.json")
        (tmp_path / "tokenizer_config.json").write_text('{"bos_token": null}')
        tokenizer = Tokenizer.from_file(tmp_path)
    prepared = make({"a": random_conversations(30, 4), "b": random_conversations(9, 5)}, using=tokenizer)
    corpus, documents = measure(prepared), prepared.train
    steps: list[set[tuple[str, str]]] = []
    by_source = {"a": random_conversations(30, 4), "b": random_conversations(9, 5)}
    for index in range(len(documents)):
        tokens = documents.example(index).tokens.tolist()
        plain = [t for t in tokens if t not in tokenizer.control_ids]
        assert corpus.characters[index] == pytest.approx(len(tokenizer.decode(plain)) / len(plain))
        grams = [tuple(tokens[n : n + report._GRAM]) for n in range(len(tokens) - report._GRAM + 1)]
        grams = [gram for gram in grams if not tokenizer.control_ids.intersection(gram)]
        assert corpus.repeats[index] == pytest.approx(1 - len(set(grams)) / len(grams) if grams else 0)
        conversation = by_source["ab"[documents.sources[index]]][documents.rows[index] - 1]
        assert corpus.turns[index] == len(conversation.messages)
        roles = ["the beginning", *(m.role for m in conversation.messages), "the end"]
        steps.append(set(pairwise(roles)))
    for index, own in enumerate(steps):
        others = [s for s, source in zip(steps, documents.sources, strict=True) if source == documents.sources[index]]
        shares = {step: sum(step in other for other in others) / len(others) for step in own}
        assert corpus.rarity[index] == pytest.approx(min(shares.values()))
        named = tuple(report._step_name(int(corpus.rarest[index])).split(" to "))
        assert shares[named] == min(shares.values())  # type: ignore[index]


def test_chunks_change_nothing(make: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = make({"a": random_conversations(30, 4), "b": random_conversations(9, 5)})
    whole = measure(prepared)
    monkeypatch.setattr(report, "_CHUNK", 100)
    for name, values in vars(measure(prepared)).items():
        np.testing.assert_array_equal(values, getattr(whole, name), err_msg=name)


def test_every_token_is_shown_in_order_with_id_and_weight(
    make: Callable[..., Prepared], tokenizer: Tokenizer, byte_tokenizer: Tokenizer
) -> None:
    for using in (tokenizer, byte_tokenizer):
        conversations = [c for c in random_conversations(12, 6) if c.messages[0].role != "text"]
        prepared = make({"a": [*conversations, said("Grüße 🤖 你好", "<|im_end|> é"), prose("🤖")]}, using=using)
        shown = Page(whole_page(prepared, samples=20)).shown
        assert len(shown) == len(prepared.train)
        for one in shown:
            row = int(re.search(r"row (\d+)", one.heading)[1])  # type: ignore[index]
            example = prepared.train.example(int(np.flatnonzero(prepared.train.rows == row)[0]))
            assert one.ids == example.tokens.tolist()
            assert one.weights == pytest.approx(example.weights.tolist())
            assert one.badges == [token in using.control_ids for token in one.ids]
            assert one.text == using.decode(one.ids)


def test_the_middle_of_a_long_conversation_is_left_out(make: Callable[..., Prepared]) -> None:
    prepared = make({"a": [said("x" * 300, "y" * 40, "z", "w " * 50, "🤖" * 50, "end")]})
    tokens = prepared.train.example(0).tokens.tolist()
    for limit in (1, 2, 7, 100, 101, len(tokens) - 1):
        found = Page(whole_page(prepared, samples=1, tokens=limit))
        kept = tokens[: limit - limit // 2] + tokens[len(tokens) - limit // 2 :]
        assert found.shown[0].ids == kept
        assert f"{len(tokens) - limit:,} tokens are not shown" in found.text
    found = Page(whole_page(prepared, samples=1, tokens=len(tokens)))
    assert found.shown[0].ids == tokens
    assert "are not shown" not in found.text


def test_bytes_that_are_no_character_are_shown_in_hexadecimal(
    make: Callable[..., Prepared], byte_tokenizer: Tokenizer
) -> None:
    prepared = make({"a": [said("hi", "🤖" * 20)]}, using=byte_tokenizer)
    text = whole_page(prepared, samples=1, tokens=50)  # in the middle of a character, twice
    assert re.search(r"<i data-i=\d+\+\d+\+\d+><u>F0</u><u>9F</u><u>A4</u></i></span><em", text)
    last = r"<i data-i=\d+><u>9F</u></i><i data-i=\d+><u>A4</u></i><i data-i=\d+><u>96</u></i><i data-i=[\d+]+>🤖</i>"
    assert re.search(r"</em><span [^>]*>" + last, text)


def test_what_rows_hold_is_text_and_nothing_else(make: Callable[..., Prepared]) -> None:
    begins = json.dumps({"messages": NASTY}) + "\ud800"
    reject = {"source": "a<i>", "file": "<u>.jsonl", "row": 3, "gate": "invalid", "reason": NASTY, "begins": begins}
    harmless = make({"a": [said("hello there", "well")]}, rejects=[reject | {"reason": "x", "begins": "y"}])
    prepared = make({"a<i>": [said(NASTY, NASTY)]}, rejects=[reject])
    text = whole_page(prepared)
    found, plain = Page(text), Page(whole_page(harmless))
    kinds = {"u", "i", "b", "p", "span", "br", "div"}  # as many as there are tokens, signs and turns
    assert set(found.tags) - kinds == set(plain.tags) - kinds
    assert "<script>alert(1)</script><img src=x onerror=alert(2)>" in found.shown[0].text.replace("\ufffd", "")
    assert "a<i>" in found.text
    assert re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202e\ud800-\udfff]", text) is None
    for sign in ("U+202E", "U+0000", "U+001B", "U+000D", "U+200B", "U+D800"):
        assert f"<u>{sign}</u>" in text
    assert {name for name, _ in found.attributes} == {name for name, _ in plain.attributes}


def test_the_page_asks_for_nothing_and_runs_nothing(make: Callable[..., Prepared]) -> None:
    text = whole_page(make({"a": random_conversations(10, 1)}))
    found = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "form"} & set(found.tags)
    names = {name for name, _ in found.attributes}
    assert not {"src", "srcset", "action"} & names
    assert not any(name.startswith("on") for name in names)
    assert all(str(value).startswith("#") for name, value in found.attributes if name in ("href", "xlink:href"))
    style = re.search("<style>(.*?)</style>", text, re.DOTALL)
    assert style is not None
    assert "url(" not in style[1]
    assert "@import" not in style[1]
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in found.attributes


def test_bars_count_every_conversation_once(make: Callable[..., Prepared]) -> None:
    prepared = make({"a": random_conversations(30, 4), "b": random_conversations(9, 5), "none": []})
    titles = Page(whole_page(prepared)).titles
    for unit, values in (("tokens", prepared.train.lengths), ("turns", measure(prepared).turns)):
        bars = [re.fullmatch(rf"([\d,]+)(?: to ([\d,]+))? {unit}: ([\d,]+)", title) for title in titles]
        counted = [(int(b[1]), int(b[2] or b[1]), int(b[3])) for b in bars if b]
        assert sum(count for *_, count in counted) == 2 * len(values)  # in its source and in all
        for low, high, count in counted[: len({(low, high) for low, high, _ in counted})]:
            assert count == np.count_nonzero((values >= low) & (values <= high))


@given(st.lists(st.integers(1, 200_000), min_size=1, max_size=50))
def test_bins_hold_all_values_and_rise(values: list[int]) -> None:
    edges = report._edges(np.array(values))
    assert edges[0] <= min(values)
    assert edges[-1] > max(values)
    assert all(a < b for a, b in pairwise(edges))
    assert len(edges) <= 45
    assert edges[1] > min(values)  # no empty bin at either end
    assert edges[-2] <= max(values)


USUAL = [said(f"What is number {n}, and why is it so?", f"It is {n}, since I say so today.") for n in range(60)]


def test_the_kinds_of_samples(make: Callable[..., Prepared]) -> None:
    lengths_vary = [said("Why?" + " Why so?" * n, "So." + " So it is." * (n % 7)) for n in range(40)]
    prepared = make({"a": [said("x", "y")] * 3, "b": lengths_vary})
    corpus, train = measure(prepared), prepared.train
    chosen = choose(prepared, corpus, 1, 6, seed=3)
    assert {int(train.sources[index]) for index in chosen} == {1}
    lengths = sorted(train.lengths[train.sources == 1].tolist())
    for kind, expected in (("longest", lengths[-6:]), ("shortest", lengths[:6])):
        assert sorted(int(train.lengths[index]) for index, kinds in chosen.items() if kind in kinds) == expected
    assert sum("random" in kinds for kinds in chosen.values()) == 6
    assert sum(any(kind.startswith("oddest") for kind in kinds) for kinds in chosen.values()) == 6
    assert choose(prepared, corpus, 1, 6, seed=3) == chosen
    drawn = [{i for i, kinds in choose(prepared, corpus, 1, 6, seed=s).items() if "random" in kinds} for s in range(4)]
    assert len({frozenset(d) for d in drawn}) > 1
    alike = {kind for kinds in choose(prepared, corpus, 0, 6, seed=3).values() for kind in kinds}
    assert alike == {"random", "longest", "shortest"}  # three that are the same: none is odd


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        (said("What is number 3, and why is it so?", "It is 3, since I say so today. " * 9), "repeat an earlier one"),
        (said("What is number 3, and why is it so?", "."), "are supervised"),
        (said("What is number 3, and why is it so?", "你好🤖🤖, since I say so today."), "characters a token"),
        (said(*[m.content for m in USUAL[0].messages], "And?"), "step from user to the end"),
        (said("It is 3, and I say so.", "Why is it?", first="assistant"), "step from the beginning to assistant"),
    ],
)
def test_the_oddest_and_why(make: Callable[..., Prepared], odd: Conversation, reason: str) -> None:
    prepared = make({"a": [*USUAL, odd]})
    found = choose(prepared, measure(prepared), 0, 4, seed=1)
    said_of = {int(prepared.train.rows[i]): kind for i, kinds in found.items() for kind in kinds if ":" in kind}
    assert len(said_of) == 4
    assert reason in said_of[61], said_of
    assert reason in max(said_of.values(), key=lambda text: float(re.findall(r"[\d.]+(?= standard)", text)[0]))


def test_a_conversation_that_is_there_twice_is_shown_once(make: Callable[..., Prepared]) -> None:
    prepared = make({"a": [said("hello", "well"), said("and", "so")]})
    twice = {
        name: values if name in ("tokens", "weights") else np.concatenate([values, values])
        for name, values in vars(prepared.train).items()
    }
    prepared = replace(prepared, train=Documents(**twice))
    assert len(choose(prepared, measure(prepared), 0, 5, seed=1)) == 2


def test_sources_without_conversations_and_sets_without_validation(make: Callable[..., Prepared]) -> None:
    prepared = make({"a": [said("hello", "well")], "none": []})
    found = Page(whole_page(prepared))
    assert ["none", "0", "0", "0", "–", "–", "–", "–", "–", "0"] in found.tables["training"]
    assert "No conversation to show." in found.text
    assert len(found.shown) == 1
    assert "none" in summary(prepared, measure(prepared), schedule(prepared))
    assert not Page(whole_page(prepared, samples=0)).shown


def test_rejects_are_counted_by_reason_and_shown(make: Callable[..., Prepared]) -> None:
    rejects = [
        {"source": "a", "file": "f.jsonl", "row": n, "gate": "too_long", "reason": f"1,{n:03} tokens; the most is 8"}
        for n in range(50)
    ]
    rejects += [
        {"source": "a", "file": "f.jsonl", "row": 99, "gate": "invalid", "reason": "no role", "begins": "{" * 900},
        {"source": "b2", "file": "g.jsonl", "row": 7, "gate": "duplicate", "reason": "equal to b2, row 3"},
    ]
    rejects += [
        {"source": "b2", "file": "g.jsonl", "row": 7, "gate": "invalid", "reason": f"reason {'x' * n}"}
        for n in range(20)
    ]
    prepared = make({"a": [said("x", "y")], "b2": [said("x", "y")]}, rejects=rejects)
    text = whole_page(prepared)
    found = Page(text)
    table = found.tables["source"]
    assert ["a", "too long", "# tokens; the most is #", "50"] in table
    assert ["a", "invalid", "no role", "1"] in table
    assert ["b2", "duplicate", "equal to b2, row #", "1"] in table
    assert sum(int(row[3]) for row in table[1:]) == len(rejects)
    assert ["b2", "", "other reasons", "9"] in table
    assert len(re.findall("f.jsonl, row", found.text)) == 4  # three that are too long, one that is invalid
    assert len(re.findall("{+…", found.text)) == 1
    assert text == whole_page(prepared)
    prepared.rejects.unlink()
    assert "rejects.jsonl is not there" in Page(whole_page(prepared)).text


def test_the_page_stays_small(make: Callable[..., Prepared], byte_tokenizer: Tokenizer) -> None:
    rng = np.random.default_rng(1)
    words = ["<b>&", "né", "ab", "🤖", "\n", "\u200b"]
    sources = {
        name: [said("".join(rng.choice(words, 4000)), "".join(rng.choice(words, 4000))) for _ in range(8)]
        for name in "abcde"
    }
    rejects = [
        {"source": s, "file": "f", "row": n, "gate": "invalid", "reason": f"{n}x" * 20, "begins": "<" * 1000}
        for n in range(300)
        for s in "abcde"
    ]
    text = whole_page(make(sources, using=byte_tokenizer, rejects=rejects))
    assert len(Page(text).shown) >= 25
    assert len(text.encode()) < 5_000_000


def test_the_summary_is_the_page_in_short(make: Callable[..., Prepared]) -> None:
    prepared = make({"a": random_conversations(30, 4), "b": random_conversations(9, 5)})
    found, lines = Page(whole_page(prepared)).tables, summary(prepared, measure(prepared), schedule(prepared))
    for name in ("training", "tokens by role", "first epoch", "rows", "tokens"):
        for row in found[name]:
            assert "  ".join(row) in re.sub(" {2,}", "  ", lines), row
    assert all(line == line.rstrip() and len(line) < 140 for line in lines.splitlines())


def test_from_the_command_line_to_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "page.html"
    main(compose(overrides(tmp_path, f"report.out={out}", "report.samples=1")))
    printed = capsys.readouterr().out
    assert f"the page: {out}" in printed
    assert "packs in the first epoch" in printed
    found = Page(out.read_text(encoding="utf-8"))
    assert found.tables["training"][1][1] == "53"  # of 60 rows, 7 validate
    assert 1 <= len(found.shown) <= 4
    with pytest.raises(ConfigError, match=r"report\.out"):
        main(compose(overrides(tmp_path, f"report.out={tmp_path}")))
    with pytest.raises(ConfigError, match=r"data\.streaming"):
        main(compose(overrides(tmp_path, f"report.out={out}", "data.streaming=true")))
