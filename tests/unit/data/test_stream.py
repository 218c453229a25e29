"""A stream trains each row once a pass, mixes its sources as asked, and goes on as if it had never stopped."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data import DataError, Tokenizer
from data.gates import Rules
from data.json_rows import Row
from data.loader import StepData, StepMaker
from data.prepared import Prepared, prepare, streamed
from data.sources import SourceConfig
from data.stream import Stream, StreamOptions

Write = Callable[..., Path]
Make = Callable[..., Stream]
SOURCES = 2
PACK = 96


def rows_named(name: str, count: int) -> list[dict[str, Any]]:
    """Conversations of different lengths; every tenth row is no conversation."""
    rows: list[dict[str, Any]] = []
    for n in range(1, count + 1):
        said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": f"{name} {n} " + "la" * (n % 23)}]
        rows.append({"messages": said} if n % 10 else {"number": n})
    return rows


@pytest.fixture
def prepared(write_rows: Write, tokenizer: Tokenizer, tmp_path: Path) -> tuple[dict[str, SourceConfig], Prepared]:
    validation = write_rows(rows_named("a", 5)[1:3], "v.jsonl")  # rows 2 and 3 of source a
    sources = {
        "a": SourceConfig(str(write_rows(rows_named("a", 90), "a.jsonl")), validation_path=str(validation)),
        "b": SourceConfig(str(write_rows(rows_named("b", 300), "b.jsonl")), repeat=2.0),
    }
    folder = tmp_path / "prepared"
    return sources, prepare(sources, Rules(PACK), prepared_dir=folder, tokenizer=tokenizer, streaming=True)


@pytest.fixture
def make(prepared: tuple[dict[str, SourceConfig], Prepared], tmp_path: Path) -> Make:
    """A stream over the two sources."""
    sources, found = prepared

    def make(rejects: str = "rejects.jsonl", **more: Any) -> Stream:
        read, left_out, held_out = streamed(found, sources)
        options = {"documents": 40, "packs_per_step": 4, "total_steps": 50, "seed": 3, "max_loss_share": 0.2} | more
        return Stream(
            read, left_out, held_out, Rules(PACK), found.tokenizer, StepMaker(SOURCES, PACK, 8),
            StreamOptions(**options), tmp_path / rejects,
        )  # fmt: skip

    return make


def trained(data: StepData) -> list[tuple[int, int]]:
    return [(source, row) for pack in data.rows for source, row in pack.tolist()]


def alike(a: StepData, b: StepData) -> bool:
    same = (np.array_equal(x.tokens, y.tokens) for x, y in zip(a.micro_batches, b.micro_batches, strict=True))
    return all(same) and trained(a) == trained(b) and a.weight_sum == b.weight_sum


def test_each_row_is_trained_once_a_pass_or_waits(make: Make) -> None:
    stream = make()
    seen: list[tuple[int, int]] = []
    for step in range(8):
        data = stream.step(step, 0, 1)
        assert len(data.rows) == 4
        assert data.fill > 0.85
        seen += trained(data)
        ledger = stream.ledger(step + 1)
        for source, (name, account) in enumerate(ledger.accounts.items()):
            rows = account.rows
            assert rows["packed"] == sum(one == source for one, _ in seen), name
            assert rows["invalid"] == rows["read"] // 10
            assert stream.trained(step + 1)[0][source] == rows["packed"]
        assert ledger.accounts["a"].rows["in_validation"] == 2
        assert sum(account.rows["waiting"] for account in ledger.accounts.values()) < 40 + 2 * 64
    assert len(seen) == len(set(seen))  # the first pass is not over
    assert not {(0, 2), (0, 3)} & set(seen)  # they validate
    assert not any(row % 10 == 0 for _, row in seen)


def test_sources_come_in_the_proportions_of_their_repeats_and_begin_anew(make: Make) -> None:
    stream, epochs, rows = make(total_steps=200), [0], {"a": 0, "b": 0}
    while epochs[-1] < 2:
        epochs.append(stream.step(len(epochs) - 1, 0, 1).epoch)
        rows = {n: account.rows["read"] for n, account in stream.ledger(len(epochs) - 1).accounts.items()}
        assert abs(rows["b"] - 2 * rows["a"]) <= 3 * 64
    assert epochs == sorted(epochs)
    assert rows["b"] >= 600  # both of its passes are over


@pytest.mark.parametrize("world", [2, 4])
def test_all_ranks_together_train_what_one_does(make: Make, world: int) -> None:
    alone, streams = make(), [make(f"{rank}.jsonl") for rank in range(world)]
    for step in range(3):
        whole = alone.step(step, 0, 1)
        parts = [stream.step(step, rank, world) for rank, stream in enumerate(streams)]
        assert all(trained(part) == trained(whole) and part.weight_sum == whole.weight_sum for part in parts)
        ours = [batch.tokens.numpy().tobytes() for batch in whole.micro_batches]
        theirs = [batch.tokens.numpy().tobytes() for part in parts for batch in part.micro_batches]
        assert sorted(ours) == sorted(theirs)


@pytest.mark.parametrize("stop", [1, 7, 19])
def test_a_restored_stream_is_the_one_that_never_stopped(make: Make, tmp_path: Path, stop: int) -> None:
    whole, first = make("whole.jsonl"), make("part.jsonl")
    for step in range(stop):
        whole.step(step, 0, 1)
        first.step(step, 0, 1)
    first.step(stop, 0, 1)  # made ahead, and lost with the process
    saved = first.save(stop)
    second = make("part.jsonl")
    second.restore(saved)
    for step in range(stop, stop + 6):
        assert alike(whole.step(step, 0, 1), second.step(step, 0, 1))
        assert whole.ledger(step + 1).to_json() == second.ledger(step + 1).to_json()
    assert (tmp_path / "part.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    np.testing.assert_array_equal(whole.trained(2), second.trained(2))


def of_rows(rows: list[dict[str, Any]], folder: Path, tokenizer: Tokenizer, **more: Any) -> Stream:
    """A stream of one source, `only`."""
    path, options = folder / "only.jsonl", {"documents": 1, "packs_per_step": 2, "total_steps": 500, "seed": 1}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    validation, rules = more.pop("validation_path", None), more.pop("rules", Rules(PACK))
    sources = {"only": SourceConfig(str(path), validation_path=validation)}
    found = prepare(sources, rules, prepared_dir=folder / "p", tokenizer=tokenizer, streaming=True)
    read, left_out, held_out = streamed(found, sources)
    return Stream(
        read, left_out, held_out, rules, tokenizer, StepMaker(1, PACK, 8),
        StreamOptions(**{"max_loss_share": 1.0} | options | more), folder / "rejects.jsonl",
    )  # fmt: skip


def test_no_source_stands_in_the_buffer_twice_to_make_up_a_number(
    make: Make, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    stream = make(documents=10_000)
    stream.step(0, 0, 1)
    assert {name: account.rows["read"] for name, account in stream.ledger(1).accounts.items()} == {"a": 90, "b": 192}
    ten = of_rows(rows_named("c", 9), tmp_path, tokenizer, documents=10_000)
    ten.step(0, 0, 1)
    account = ten.ledger(1).accounts["only"]
    of_pass = account.tokens["read"] // (account.rows["read"] // 9)
    need = 2 * 2 * PACK
    assert need <= account.tokens["read"] < need + of_pass  # as many passes as two steps need, and no more


def sized(tokens: int, name: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """A row whose conversation has so many tokens."""
    from data.chatml import EncodeOptions, encode_batch
    from data.conversation import parse

    said = [{"role": "user", "content": name}, {"role": "assistant", "content": ""}]
    while len(encode_batch([parse({"messages": said})], tokenizer, EncodeOptions()).tokens) < tokens:
        said[1]["content"] += "~"
    return {"messages": said}


def test_no_length_waits_for_ever(tokenizer: Tokenizer, tmp_path: Path) -> None:
    # Two of the short ones do not fit one pack, and one alone never fills it; the long ones do.
    kinds = {size: sized(size, "x", tokenizer) for size in (PACK * 55 // 100, PACK * 95 // 100)}
    rows = [kinds[size] for _ in range(600) for size in kinds]
    stream = of_rows(rows, tmp_path, tokenizer, documents=30)
    read_for: dict[int, int] = {}
    waited, longest = [], 0.0
    for step in range(200):
        data = stream.step(step, 0, 1)
        account = stream.ledger(step + 1).accounts["only"]
        read_for |= dict.fromkeys(range(len(read_for) + 1, account.rows["read"] + 1), step)
        waited += [step - read_for.pop(row) if row in read_for else -1 for _, row in trained(data)]
        read_for |= dict.fromkeys([row for _, row in trained(data)], 10**9)
        there = account.rows["waiting"] + data.documents
        longest = max(longest, 3 * (account.tokens["waiting"] + data.tokens) / (2 * PACK) + there / 2 + 1)
    assert -1 not in waited
    assert max(waited) <= longest < 150
    assert 200 - min(read_for.values()) <= longest  # those that wait still


def test_lost_rows_of_the_first_pass_are_told_once(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "rejects.jsonl"
    for _ in range(2):  # a second start without a checkpoint
        stream = of_rows(rows_named("c", 30), tmp_path, tokenizer, documents=20)
        for step in range(20):
            stream.step(step, 0, 1)
        assert [json.loads(line)["row"] for line in file.read_text().splitlines()] == [10, 20, 30]
    assert stream.ledger(20).accounts["only"].rows["invalid"] > 3
    saved = stream.save(20)
    for left in ("", "{}\n"):
        file.write_text(left)
        stream.restore(saved)
        assert file.read_text() == left
    file.unlink()
    stream.restore(saved)
    assert not file.exists()


def test_what_validates_is_known_by_what_is_said_and_its_tokens_are_counted(
    tokenizer: Tokenizer, write_rows: Write, tmp_path: Path
) -> None:
    def row(*said: str) -> dict[str, Any]:
        roles = ("user", "assistant")
        return {"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(said)]}

    short = row("hi", "there")
    rows = [row("yes", "no") for _ in range(9)]
    rows[2] = {"messages": [{"role": "system", "content": "Be kind."}, *short["messages"]]}
    rows[6] = row("hi", "there", "and", "then " * 60)  # what is left of it after the cut
    stream = of_rows(
        rows, tmp_path, tokenizer, rules=Rules(PACK, too_long="cut_turns"), packs_per_step=1,
        validation_path=str(write_rows([short], "v.jsonl")),
    )  # fmt: skip
    numbers = {row for step in range(12) for _, row in trained(stream.step(step, 0, 1))}
    assert numbers == {1, 2, 4, 5, 6, 8, 9}
    account = stream.ledger(12).accounts["only"]
    assert account.rows["in_validation"] * 9 == account.rows["read"] * 2
    assert account.tokens["in_validation"] > 0
    assert account.tokens["cut"] > 0


@pytest.mark.parametrize("damage", ["nothing", "no archive", "half", "a byte", "another file"])
def test_what_is_no_state_is_refused_and_changes_nothing(make: Make, damage: str) -> None:
    stream = make()
    first = stream.step(0, 0, 1)
    saved = stream.save(0)
    middle = len(saved) // 2
    other = io.BytesIO()
    np.savez(other, known=np.array("{}"))
    files = {
        "nothing": b"", "no archive": b"step 1", "half": saved[:middle], "another file": other.getvalue(),
        "a byte": saved[:middle] + bytes([saved[middle] ^ 1]) + saved[middle + 1 :],
    }  # fmt: skip
    again = make()
    with pytest.raises(ValueError, match=r"\w+: .+"):
        again.restore(files[damage])
    assert alike(again.step(0, 0, 1), first)


def test_the_seed_decides_the_packs(make: Make) -> None:
    assert trained(make(seed=1).step(0, 0, 1)) != trained(make(seed=2).step(0, 0, 1))


def test_steps_come_in_order(make: Make) -> None:
    with pytest.raises(ValueError, match="step 1 is asked for; the next one is 0"):
        make().step(1, 0, 1)


def test_a_source_that_loses_too_much_or_has_nothing_stops(
    make: Make, write_rows: Write, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    stream = make(max_loss_share=0.05)
    with pytest.raises(
        DataError, match=r"data.sources.[ab]: [\d.]+ % of the \d+ rows read so far, or .* are lost; expected at most 5"
    ):
        [stream.step(step, 0, 1) for step in range(50)]
    silent = {"messages": [{"role": "user", "content": "hi"}]}
    sources = {"a": SourceConfig(str(write_rows([silent] * 3, "silent.jsonl")))}
    found = prepare(sources, Rules(PACK), prepared_dir=tmp_path / "p", tokenizer=tokenizer, streaming=True)
    read, left_out, held_out = streamed(found, sources)
    stream = Stream(
        read, left_out, held_out, Rules(PACK), tokenizer, StepMaker(1, PACK, 8), StreamOptions(1, 1, 1, 1, 1.0),
        tmp_path / "r.jsonl",
    )  # fmt: skip
    with pytest.raises(DataError, match=r"data.sources.a: none of its 3 rows is left to train"):
        stream.step(0, 0, 1)
    reasons = [json.loads(line)["gate"] for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert reasons == ["unweighted"] * 3


def test_what_needs_the_whole_source_is_refused(write_rows: Write, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = str(write_rows(rows_named("a", 9)))
    for more, message in (({"rows": 3}, "rows is 3"), ({"validation_share": 0.1}, "share is 0.1")):
        sources = {"a": SourceConfig(path, **more)}
        with pytest.raises(DataError, match=f"data.sources.a.*{message}.*with data.streaming"):
            prepare(sources, Rules(PACK), prepared_dir=tmp_path, tokenizer=tokenizer, streaming=True)


def test_a_file_that_grew_is_another_source(write_rows: Write, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write_rows(rows_named("a", 9))
    keys = set()
    for _ in range(2):
        sources = {"a": SourceConfig(str(path))}
        keys.add(prepare(sources, Rules(PACK), prepared_dir=tmp_path, tokenizer=tokenizer, streaming=True).key)
        path.write_text(path.read_text() + json.dumps(rows_named("a", 1)[0]) + "\n")
    assert len(keys) == 2


def test_a_hub_data_set_is_read_over_the_network_from_where_it_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    from data.sources import locate, rows_of

    asked: list[dict[str, Any]] = []
    table = datasets.Dataset.from_list([{"n": n} for n in range(6)])

    def load(**arguments: Any) -> Any:
        asked.append(arguments)
        return table.to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    origin = locate("data.sources.x.path", "owner/name", "train", "a" * 40)
    assert list(rows_of(origin, "a" * 40, (4, 4), streaming=True)) == [Row(5, {"n": 4}, 5), Row(6, {"n": 5}, 6)]
    assert asked == [{"path": "owner/name", "split": "train", "revision": "a" * 40, "streaming": True}]
