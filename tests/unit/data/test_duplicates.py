"""Equal and nearly equal conversations, against brute force over dictionaries and sets."""

import hashlib
import json
import os
import subprocess
import sys
import unicodedata
from itertools import combinations
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import Conversation, Message
from data.conversation import parse
from data.duplicates import Sketcher, _ngrams, digest, exact, near

Turns = list[tuple[str, str]]


def talk(*turns: tuple[str, str], source: str = "", weight: float = 1.0) -> Conversation:
    return Conversation(tuple(Message(role, text, weight) for role, text in turns), source, weight)


def prose(random: Random, words: int) -> str:
    """Sentences of made-up words out of 3,000."""
    text = [f"w{random.randrange(3000)}x" + random.choice(["", "", "", ",", "."]) for _ in range(words)]
    return " ".join(text)


def jaccard(a: set[tuple[str, ...]], b: set[tuple[str, ...]]) -> float:
    return len(a & b) / len(a | b)


def spoken(conversation: Conversation) -> str:
    return "\n".join(message.content for message in conversation.messages if message.role != "system")


def found(*conversations: Conversation, threshold: float = 0.8) -> list[int]:
    return near(Sketcher().sketch(conversations), threshold).tolist()


# ---------------------------------------------------------------- equal

TURNS = st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.text("ab\0\x01", max_size=3)), max_size=3)


@given(TURNS, TURNS)
def test_digests_are_equal_where_roles_and_contents_are(one: Turns, other: Turns) -> None:
    assert (digest(talk(*one)) == digest(talk(*other))) == (one == other)


@given(TURNS)
def test_a_digest_has_16_bytes_and_knows_no_weights_and_no_source(turns: Turns) -> None:
    made = digest(talk(*turns))
    assert len(made) == 16
    assert made == digest(talk(*turns, source="other", weight=0.5))


def test_no_text_imitates_a_boundary_between_messages() -> None:
    inner = (4).to_bytes(8, "little") + b"user" + (1).to_bytes(8, "little") + b"b"
    two = talk(("user", "a"), ("user", "b"))
    assert digest(talk(("user", "a" + inner.decode()))) != digest(two)
    for mark in ("", "\n", "\0", "|", "\x1f"):
        assert digest(talk(("user", f"a{mark}user{mark}b"))) != digest(two)
    assert digest(talk(("user", "ab"), ("user", ""))) != digest(two)


@given(st.lists(st.binary(max_size=2).map(lambda b: b.ljust(16, b"\0")) | st.sampled_from([b"\0" * 16, b"\xff" * 16])))
def test_exact_names_the_first_of_its_kind(digests: list[bytes]) -> None:
    first: dict[bytes, int] = {}
    expected = []
    for row, key in enumerate(digests):
        expected.append(first.get(key, -1))
        first.setdefault(key, row)
    result = exact(np.array(digests, dtype="S16"))
    assert result.dtype == np.int64
    assert result.tolist() == expected


def test_exact_keeps_the_order_in_long_lists() -> None:
    kinds = np.random.default_rng(0).integers(0, 100, 20_000)
    first = {kind: row for row, kind in reversed(list(enumerate(kinds.tolist())))}
    expected = [-1 if first[kind] == row else first[kind] for row, kind in enumerate(kinds.tolist())]
    digests = np.array([digest(talk(("user", str(kind)))) for kind in range(100)], dtype="S16")
    assert exact(digests[kinds]).tolist() == expected


# ---------------------------------------------------------------- n-grams

ALPHABET = "abAB12_ \n,.-?'+=<🤖\u200b\u0301éßЖ你好あカกข\x00"
BLANKLESS = ("CJK", "HIRAGANA", "KATAKANA", "THAI")


def words_of(text: str) -> list[str]:
    """Words by a plain loop over characters: the definition, told once more."""
    words: list[str] = []
    open_word = False
    for character in unicodedata.normalize("NFC", text.casefold()):
        kind = unicodedata.category(character)
        if kind[0] in "LMN" and unicodedata.name(character).startswith(BLANKLESS):
            words.append(character)
            open_word = False
        elif kind[0] in "LMN" or kind == "Pc":
            if open_word:
                words[-1] += character
            else:
                words.append(character)
            open_word = True
        else:
            open_word = False
            if kind[0] == "S":
                words.append(character)
    return words


def ngrams_of(text: str, n: int = 5) -> set[tuple[str, ...]]:
    words = words_of(text)
    return {tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))}


@given(st.lists(st.text(ALPHABET, max_size=30), max_size=4), st.integers(1, 6))
def test_ngrams_are_those_of_a_plain_loop(texts: list[str], n: int) -> None:
    names: dict[int, tuple[str, ...]] = {}
    for text in texts:
        words = words_of(text)
        # Nothing but punctuation and blanks: the text as a whole is the only word. An empty text has none.
        words = words or ([] if not text else [unicodedata.normalize("NFC", text.casefold())])
        width = min(n, len(words))
        expected = [tuple(words[i : i + width]) for i in range(len(words) - width + 1)] if words else []
        hashes = _ngrams(text, n).tolist()
        assert len(hashes) == len(expected)
        for key, ngram in zip(hashes, expected, strict=True):
            assert names.setdefault(key, ngram) == ngram  # one hash, one n-gram …
    assert len(set(names.values())) == len(names)  # … and one n-gram, one hash


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Hello, World! How are you?", "hello world how are you"),
        ("a  b\tc\n\nd", "A b c d"),
        ("# Title\n\n- **one**\n- *two*", "title one two"),
        ("It’s “fine”…", 'It\'s "fine"...'),
        ("re\u0301sume\u0301", "résumé"),
        ("STRASSE", "straße"),
    ],
)
def test_case_punctuation_and_blanks_do_not_count(one: str, other: str) -> None:
    sketches = Sketcher().sketch([talk(("user", one)), talk(("user", other))])
    assert (sketches[0] == sketches[1]).all()


# ---------------------------------------------------------------- sketches


def test_estimates_lie_within_the_binomial_error_of_the_true_similarity() -> None:
    random, size = Random(1), 256
    texts, errors, squares = [], [], []
    for _ in range(150):
        base = prose(random, random.randrange(20, 400)).split()
        other = [w if random.random() > 0.1 * random.random() else f"n{random.random()}" for w in base]
        texts += [" ".join(base), " ".join(other)]
    sketches = Sketcher(size=size).sketch([talk(("user", text)) for text in texts])
    for i in range(0, len(texts), 2):
        true = jaccard(ngrams_of(texts[i]), ngrams_of(texts[i + 1]))
        deviation = max(true * (1 - true) / size, 1e-9) ** 0.5
        error = float((sketches[i] == sketches[i + 1]).mean()) - true
        assert abs(error) <= 4.5 * deviation + 1e-6
        errors.append(error)
        squares.append(deviation**2)
    # No bias: the mean error is within four of its own standard deviations.
    assert abs(sum(errors)) < 4 * sum(squares) ** 0.5
    # And the differences are real ones, not all zero.
    assert np.std(errors) > 0.005


def test_sketches_are_the_same_in_any_company_and_process() -> None:
    code = """
import hashlib, os, sys
from data import Conversation, Message
from data.duplicates import Sketcher
rows = [Conversation((Message("user", f"row {n} " * (n % 9) + "wörter, 你好 + more"),), "") for n in range(600)]
made = hashlib.sha256(Sketcher().sketch(rows).tobytes()).hexdigest()
child = os.fork()  # the library's threads would not live on in it
if not child:
    os._exit(0 if hashlib.sha256(Sketcher().sketch(rows).tobytes()).hexdigest() == made else 1)
print(made, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    rows = [talk(("user", f"row {n} " * (n % 9) + "wörter, 你好 + more")) for n in range(600)]
    together = Sketcher().sketch(rows)
    alone = np.concatenate([Sketcher().sketch(rows[n : n + 1]) for n in range(600)])
    assert (together == alone).all()
    outputs = set()
    for hash_seed, threads in (("1", "1"), ("2", "4")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": hash_seed, "RAYON_NUM_THREADS": threads},
            cwd=Path(__file__).parents[3],
            capture_output=True,
            text=True,
            timeout=100,
            check=True,
        )
        outputs.add(done.stdout.strip())
    assert outputs == {f"{hashlib.sha256(together.tobytes()).hexdigest()} 0"}


def test_seed_size_and_ngram_matter() -> None:
    rows = [talk(("user", "one two three four five six seven")), talk(("user", "one two three four five six eight"))]
    base = Sketcher().sketch(rows)
    assert base.dtype == np.uint32
    assert base.shape == (2, 128)
    assert (Sketcher(seed=2).sketch(rows) != base).any()
    assert Sketcher(size=7).sketch(rows).shape == (2, 7)
    assert Sketcher().sketch([]).shape == (0, 128)
    words = Sketcher(ngram=1, size=1024).sketch(rows)
    assert (words[0] == words[1]).mean() == pytest.approx(6 / 8, abs=4 * (0.75 * 0.25 / 1024) ** 0.5)


@pytest.mark.parametrize("wrong", [{"size": 0}, {"ngram": 0}, {"seed": -1}])
def test_impossible_sketchers_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected at least 1"):
        Sketcher(**wrong)


# ---------------------------------------------------------------- near


def test_small_changes_of_long_conversations_are_found() -> None:
    random = Random(2)
    turns = [("user" if n % 2 == 0 else "assistant", prose(random, 50)) for n in range(4)]
    words = turns[1][1].split()
    changed = " ".join([*words[:20], "changed", *words[21:]])
    longer = turns[3][1] + " And one more sentence of eight words here."
    reordered = [turns[2], turns[3], turns[0], turns[1]]
    assert found(
        talk(*turns),
        talk(turns[0], (turns[1][0], changed), *turns[2:]),
        talk(*turns[:3], (turns[3][0], longer)),
        talk(*reordered),
        talk(*[(role, text.upper().replace(",", " –")) for role, text in turns]),
        talk(*turns, ("user", prose(random, 200))),
    ) == [-1, 0, 0, 0, 0, -1]


def test_what_only_shares_a_system_prompt_or_a_question_stays() -> None:
    random = Random(3)
    system = ("system", prose(random, 500))
    question = ("user", prose(random, 20))
    chats = [talk(system, ("user", prose(random, 20)), ("assistant", prose(random, 60))) for _ in range(20)]
    answers = [talk(system, question, ("assistant", prose(random, 60))) for _ in range(20)]
    assert found(*chats, *answers) == [-1] * 40
    # The other way round: one dialogue under two system prompts.
    assert found(talk(system, question), talk(("system", "Be brief."), question), talk(question)) == [-1, 0, 0]


def test_short_conversations_do_not_collapse() -> None:
    texts = [
        "Hi",
        "Hello",
        "Hi there",
        "yes",
        "1 + 1",
        "1 < 1",
        "1 + 2",
        "🤖",
        "🎉",
        "🎉🎉",
        "?",
        "!",
        "?!",
        "你",
        "你好",
    ]
    assert found(*[talk(("user", text)) for text in texts]) == [-1] * len(texts)
    same = talk(("user", "Hi!"), ("assistant", "Hello.")), talk(("user", "hi"), ("assistant", "hello"))
    assert found(*same) == [-1, 0]


def test_a_conversation_of_nothing_but_a_system_message_is_compared_by_it() -> None:
    one, other = ("system", "Be a pirate, always."), ("system", "Be a parrot, never.")
    assert found(talk(one), talk(other), talk(one, ("user", " "))) == [-1, -1, 0]


@pytest.mark.parametrize(("first", "last"), [(0x4E00, 0x5E00), (0x3041, 0x3094), (0x0E01, 0x0E2F)])
def test_texts_without_blanks_are_compared_letter_by_letter(first: int, last: int) -> None:
    random = Random(4)
    texts = ["".join(chr(random.randrange(first, last)) for _ in range(300)) for _ in range(10)]
    changed = [text[:150] + chr(first) + text[151:] for text in texts]
    assert found(*[talk(("user", text)) for text in texts + changed]) == [-1] * 10 + list(range(10))


def greedy(rows: list[list[int]], threshold: float, order: list[int] | None = None) -> list[int]:
    """Each row against each before it."""
    result, staying = [-1] * len(rows), []
    for i in range(len(rows)) if order is None else order:
        equal = {j: sum(a == b for a, b in zip(rows[i], rows[j], strict=True)) for j in staying}
        result[i] = next((j for j, same in equal.items() if same >= len(rows[i]) * threshold), -1)
        if result[i] < 0:
            staying.append(i)
    return result


# With 8 entries, bands are so short that no pair at one of these thresholds can be missed.
THRESHOLDS = [0.25, 0.5, 0.75, 0.8, 1.0]
ROWS = st.lists(st.lists(st.integers(0, 2), min_size=8, max_size=8), max_size=12)


@given(ROWS, st.sampled_from(THRESHOLDS), st.data())
def test_near_is_greedy_in_the_order_given(rows: list[list[int]], threshold: float, data: st.DataObject) -> None:
    shuffled = st.permutations(range(len(rows)))
    asked = data.draw(st.none() | st.tuples(shuffled, st.integers(0, len(rows))).map(lambda both: both[0][: both[1]]))
    sketches = np.array(rows, dtype=np.uint32).reshape(len(rows), 8)
    order = None if asked is None else np.array(asked, dtype=np.int64)
    before = sketches.copy()
    assert near(sketches, threshold, order).tolist() == greedy(rows, threshold, asked)
    assert (sketches == before).all()


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_near_is_greedy_among_many_that_stay(threshold: float) -> None:
    generator = np.random.default_rng(6)
    for _ in range(30):
        rows = generator.integers(0, 2, (30, 8), dtype=np.uint32)
        assert near(rows, threshold).tolist() == greedy(rows.tolist(), threshold)


def test_near_takes_more_rows_than_it_handles_at_a_time() -> None:
    sketches = np.arange(8 * 150_000, dtype=np.uint32).reshape(-1, 8)
    sketches[[70_000, 149_999]] = sketches[[10, 69_999]]
    found_rows = near(sketches, 1.0)
    assert found_rows[[70_000, 149_999]].tolist() == [10, 69_999]
    assert (found_rows >= 0).sum() == 2


def test_a_row_that_is_gone_makes_no_other_go() -> None:
    one = np.arange(10, dtype=np.uint32)
    two = np.where(np.arange(10) < 2, 100, one).astype(np.uint32)
    three = np.where(np.arange(10) >= 8, 200, two).astype(np.uint32)
    chain = np.stack([one, two, three])
    assert near(chain, 0.8).tolist() == [-1, 0, -1]
    assert near(chain, 0.8, np.array([1, 2])).tolist() == [-1, -1, 1]
    assert near(chain, 0.6).tolist() == [-1, 0, 0]


def planted(equal: int, pairs: int, template: int) -> np.ndarray:
    """Random sketches of 128 entries; row `pairs` + i shares `equal` with row i, and all rows share `template`."""
    generator = np.random.default_rng(5)
    sketches = generator.integers(0, 1 << 32, (2 * pairs, 128), dtype=np.uint32)
    order = generator.permutation(128)
    sketches[:, order[:template]] = sketches[0, order[:template]]
    for row in range(pairs):
        same = generator.permutation(order[template:])[: equal - template]
        sketches[pairs + row, same] = sketches[row, same]
    return sketches


@pytest.mark.parametrize(("threshold", "equal"), [(0.5, 64), (0.8, 103), (0.9, 116)])
def test_pairs_at_the_threshold_are_found_and_those_below_are_not(threshold: float, equal: int) -> None:
    at, below = near(planted(equal, 2000, 0), threshold), near(planted(equal - 1, 2000, 0), threshold)
    assert (at[:2000] == -1).all()
    assert (at[2000:] == np.arange(2000)).sum() >= 1998  # a chance of 99.9 % or better for each
    assert (below == -1).all()


def test_a_template_that_all_rows_share_hides_no_duplicates() -> None:
    found_rows = near(planted(103, 2000, 80), 0.8)
    assert (found_rows[:2000] == -1).all()
    assert (found_rows[2000:] == np.arange(2000)).sum() >= 1990


def test_sketches_may_be_mapped_from_disk(tmp_path: Path) -> None:
    sketches = planted(120, 300, 0)
    np.save(tmp_path / "sketches.npy", sketches)
    mapped = np.load(tmp_path / "sketches.npy", mmap_mode="r")
    assert near(mapped, 0.8).tolist() == [-1] * 300 + list(range(300))


@pytest.mark.parametrize("threshold", [0.0, -0.1, 1.01, float("nan")])
def test_a_threshold_out_of_range_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="expected above 0, to 1"):
        near(np.zeros((1, 8), dtype=np.uint32), threshold)


def test_published_rows_against_all_pairs(real_rows: Path) -> None:
    rows = [parse(row) for row in json.loads((real_rows / "sharegpt_tools.json").read_text(encoding="utf-8"))]
    sets = [ngrams_of(spoken(row)) for row in rows]
    true = {(a, b): jaccard(sets[a], sets[b]) for a, b in combinations(range(len(rows)), 2)}
    result = near(Sketcher().sketch(rows), 0.8)
    for row in np.flatnonzero(result >= 0):
        assert true[result[row], row] > 0.8 - 4 * 0.035
    gone = set(np.flatnonzero(result >= 0).tolist())
    for (a, b), similar in true.items():
        assert similar < 0.95 or a in gone or b in gone
    equal = exact(np.array([digest(row) for row in rows], dtype="S16"))
    assert set(np.flatnonzero(equal >= 0).tolist()) <= gone
    assert 0 < len(gone) < 0.2 * len(rows)
