"""Preparing accounts for every row, is found again by content, and leaves whole sets or nothing."""

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import data.prepared
import data.reading
import data.stage
from data import DataError, Tokenizer
from data.chatml import EncodeOptions, encode
from data.conversation import parse
from data.gates import Rules
from data.json_rows import Row
from data.prepared import Prepared, open_prepared, prepare
from data.sources import SourceConfig

Write = Callable[..., Path]


def talk(n: int, **more: Any) -> dict[str, Any]:
    user, assistant = {"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"it is {n}"}
    return {"messages": [user, assistant], **more}


def messages_in(prepared: Prepared) -> set[str]:
    train = prepared.train
    return {prepared.tokenizer.decode(train.example(n).tokens.tolist()) for n in range(len(train))}


@pytest.fixture
def run(tmp_path: Path, tokenizer: Tokenizer) -> Callable[..., Prepared]:
    """Prepare with settings that tests vary."""

    def run(sources: dict[str, SourceConfig], **more: Any) -> Prepared:
        of_rules = {field.name for field in fields(Rules)} & more.keys()
        rules = Rules(**({"max_tokens": 100} | {name: more.pop(name) for name in of_rules}))
        settings = {"prepared_dir": tmp_path / "prepared", "tokenizer": tokenizer}
        return prepare(sources, rules, **(settings | more))

    return run


Run = Callable[..., Prepared]


def test_prepared_documents_are_the_encoded_rows(write_rows: Write, run: Run, tokenizer: Tokenizer) -> None:
    rows = [talk(n, weight=0.5 * n + 1) for n in range(700)]  # more than one batch
    prepared = run({"a": SourceConfig(str(write_rows(rows)), loss_weight=3.0)})
    assert len(prepared.train) == 700
    for n in (0, 1, 511, 512, 699):
        expected, found = encode(parse(rows[n]), tokenizer), prepared.train.example(n)
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        np.testing.assert_array_equal(found.weights, expected.weights)
        assert found.weight == 3.0 * (0.5 * n + 1)
        assert prepared.train.rows[n] == n + 1
        assert prepared.train.weight_sums[n] == expected.weights.sum()
        assert prepared.train.weighted_tokens[n] == (expected.weights > 0).sum()
        assert prepared.train.lengths[n] == len(expected.tokens)
    assert len(prepared.validation) == 0
    assert isinstance(prepared.train.tokens, np.memmap)


def test_every_row_is_accounted_for_with_its_reason(write_rows: Write, run: Run) -> None:
    long = {"messages": [{"role": "assistant", "content": "x " * 200}]}
    silent = {"messages": [{"role": "user", "content": "hi"}]}
    unknown = {"messages": [{"role": "narrator", "content": "\ud800"}]}
    rows = [talk(1), unknown, long, silent, {"story": "x"}, talk(2, weight=0), ["no"], talk(3)]
    prepared = run({"a": SourceConfig(str(write_rows(rows)))}, max_loss_share=0.95)
    account = prepared.ledger.accounts["a"]
    expected = {"read": 8, "invalid": 3, "too_long": 1, "unweighted": 2, "packed": 2}
    assert {gate: rows for gate, rows in account.rows.items() if rows} == expected
    kinds = {"unknown role": 1, "missing field": 1, "not an object": 1}
    assert account.reasons == {"invalid": kinds, "filtered": {}}
    assert account.tokens["packed"] == len(prepared.train.tokens)
    assert account.tokens["too_long"] > 100
    prepared.ledger.balance()
    rejects = [json.loads(line) for line in prepared.rejects.read_text(encoding="utf-8").splitlines()]
    assert sorted((r["row"], r["gate"]) for r in rejects) == [
        (2, "invalid"), (3, "too_long"), (4, "unweighted"), (5, "invalid"), (6, "unweighted"), (7, "invalid")
    ]  # fmt: skip
    by_row = {r["row"]: r for r in rejects}
    assert by_row[2]["reason"].startswith("message 1 has the unknown role 'narrator'")
    assert by_row[5]["begins"] == '{"story": "x"}'
    assert by_row[3]["reason"].endswith("tokens; the most is 100")
    assert {r["file"] for r in rejects} == {"rows.jsonl"}


def test_a_conversation_of_exactly_the_limit_is_kept(write_rows: Write, run: Run, tokenizer: Tokenizer) -> None:
    size = len(encode(parse(talk(1)), tokenizer).tokens)
    source = {"a": SourceConfig(str(write_rows([talk(1)])))}
    assert len(run(source, max_tokens=size).train) == 1
    with pytest.raises(
        DataError,
        match=r"100.0 % of its rows or of their tokens are lost .0 invalid, 0 with nothing to train, 1 longer than",
    ):
        run(source, max_tokens=size - 1)


def test_too_many_losses_stop_with_the_files_that_explain_them(write_rows: Write, run: Run) -> None:
    good = {"good": SourceConfig(str(write_rows([talk(n) for n in range(50)], "good.jsonl")))}
    bad = {"bad": SourceConfig(str(write_rows([talk(1), {"x": 1}], "bad.jsonl")))}
    with pytest.raises(DataError) as caught:
        run(good | bad)
    message = str(caught.value)
    assert message.startswith(
        "data.sources.bad: 50.0 % of its rows or of their tokens are lost (1 invalid, 0 with nothing to train, 0 longer"
    )
    for name in ("ledger.json", "rejects.jsonl"):
        path = next(word.rstrip(";,") for word in message.split() if name in word)
        assert Path(path).is_file()
    assert run(good | bad, max_loss_share=0.5).reused


def test_a_run_with_nothing_to_train_on_stops(write_rows: Write, run: Run) -> None:
    silent = {"messages": [{"role": "user", "content": "hi"}]}
    with pytest.raises(DataError, match=r"data.sources.a: none of its 1 rows is left to train .*1 unweighted"):
        run({"a": SourceConfig(str(write_rows([silent])))}, max_loss_share=1.0)
    with pytest.raises(DataError, match=r"data.sources is empty"):
        run({})


def test_rows_draws_that_many_the_same_for_the_same_seed(write_rows: Write, run: Run) -> None:
    path = str(write_rows([talk(n) for n in range(60)]))
    ten = messages_in(run({"a": SourceConfig(path, rows=10)}))
    twenty = run({"a": SourceConfig(path, rows=20)})
    assert len(ten) == 10
    assert ten < messages_in(twenty)
    assert twenty.ledger.accounts["a"].rows["unsampled"] == 40
    assert messages_in(run({"a": SourceConfig(path, rows=10)}, seed=2)) != ten
    assert not twenty.notes[1:]
    all_of_them = run({"a": SourceConfig(path, rows=61)})
    assert len(all_of_them.train) == 60
    assert all_of_them.notes[-1] == "data.sources.a.rows is 61; there are not more, and all of them are taken"


def test_the_seed_matters_only_where_rows_are_drawn(write_rows: Write, run: Run) -> None:
    path = str(write_rows([talk(n) for n in range(9)]))
    assert run({"a": SourceConfig(path)}, seed=1).key == run({"a": SourceConfig(path)}, seed=2).key
    drawn = {"a": SourceConfig(path, rows=3)}
    assert run(drawn, seed=1).key != run(drawn, seed=2).key


def test_a_row_stays_on_its_side_of_validation_whatever_is_added(write_rows: Write, run: Run) -> None:
    rows = [talk(n) for n in range(200)]
    first = run({"a": SourceConfig(str(write_rows(rows, "a.jsonl")), validation_share=0.2)})
    held_out = set(first.validation.rows.tolist())
    assert 20 < len(held_out) < 60
    assert len(first.train) + len(held_out) == 200
    more = [talk(1000), *rows[::-1], talk(1001)]
    second = run({"a": SourceConfig(str(write_rows(more, "b.jsonl")), validation_share=0.2)})
    assert messages_in(first) <= messages_in(second)


def test_a_validation_file_is_for_validation_alone(write_rows: Write, run: Run) -> None:
    train, validation = write_rows([talk(n) for n in range(9)], "t.jsonl"), write_rows([talk(99)], "v.jsonl")
    prepared = run({"a": SourceConfig(str(train), validation_path=str(validation), rows=4)})
    assert (len(prepared.train), len(prepared.validation)) == (4, 1)
    account = prepared.ledger.accounts["a"].rows
    assert (account["read"], account["unsampled"], account["validation"]) == (10, 5, 1)


def test_validating_on_the_training_file_is_refused(write_rows: Write, run: Run) -> None:
    path = str(write_rows([talk(1)]))
    with pytest.raises(DataError, match=r"data.sources.a.validation_path has the same contents as its path"):
        run({"a": SourceConfig(path, validation_path=path)})


def test_a_hub_set_serves_offline_once_prepared(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    commits = {"owner/name": "c" * 40}
    monkeypatch.setattr(data.reading, "fingerprint", lambda origin, ask: commits.get(origin.path))
    monkeypatch.setattr(data.stage, "size", lambda *_: 2)
    monkeypatch.setattr(data.reading, "rows_of", lambda *_: [Row(1, talk(1), 1), Row(2, talk(2), 2)])
    source = SourceConfig("owner/name", revision="v1")
    made = run({"a": source})
    commits.clear()
    assert run({"a": source}).key == made.key
    with pytest.raises(DataError, match=r"has no such data set.* data.sources.a.files\[0\].revision was v1, is v2"):
        run({"a": replace(source, revision="v2")})


def test_a_set_that_was_prepared_without_a_source_serves_offline(
    write_rows: Write, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prepared where the hub said that there is no such set; trained where the hub cannot be reached."""
    sources = {"a": SourceConfig(str(write_rows([talk(1)]))), "hub": SourceConfig("owner/name", missing="skip")}
    known = data.reading.fingerprint
    monkeypatch.setattr(data.reading, "fingerprint", lambda o, ask: known(o) if o.file is not None else None)
    made = run(sources)

    def offline(origin: Any, ask: bool) -> str | None:
        if origin.file is None:
            raise ConnectionError("offline")
        return known(origin)

    monkeypatch.setattr(data.reading, "fingerprint", offline)
    used = run(sources)
    assert (used.key, used.reused) == (made.key, True)
    assert "skipped" not in used.notes[0]
    with pytest.raises(DataError, match="the hub cannot be reached"):  # but not where it must be there
        run({**sources, "hub": replace(sources["hub"], missing="error")})


def test_a_run_goes_on_with_the_set_that_it_began_with(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub data set without a fixed revision moves on; a run that has begun does not move with it."""
    commit = ["a" * 40]
    monkeypatch.setattr(data.reading, "fingerprint", lambda origin, ask: commit[0])
    monkeypatch.setattr(data.stage, "size", lambda *_: 2)
    monkeypatch.setattr(data.reading, "rows_of", lambda *_: [Row(1, talk(1), 1), Row(2, talk(2), 2)])
    made = run({"a": SourceConfig("owner/name")})
    assert run({"a": SourceConfig("owner/name", revision="a" * 40)}).key == made.key  # the same commit, now fixed
    commit[0] = "b" * 40
    used = run({"a": SourceConfig("owner/name")}, known=made.key)
    assert (used.key, used.reused) == (made.key, True)
    assert used.notes[0].startswith(f"using {made.key}, with which the run began")
    newer = run({"a": SourceConfig("owner/name")})
    assert newer.key != made.key
    assert run({"a": SourceConfig("owner/name")}, known=made.key).key == made.key  # also where both are there
    assert run({"a": SourceConfig("owner/name", revision="b" * 40)}, known=made.key).key == newer.key


def test_a_file_may_be_renamed(write_rows: Write, run: Run) -> None:
    one = write_rows([talk(1)], "one.jsonl")
    made = run({"a": SourceConfig(str(one))})
    assert run({"a": SourceConfig(str(one.rename(one.with_name("two.jsonl"))))}).key == made.key


def test_a_full_disk_is_said(write_rows: Write, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(data.prepared, "fill", full)
    with pytest.raises(DataError, match=r"data.prepared_dir is .*No space left on device; expected room"):
        run({"a": SourceConfig(str(write_rows([talk(1)])))})
    assert list((tmp_path / "prepared").iterdir()) == []


def test_the_order_in_which_sources_are_named_does_not_matter(write_rows: Write, run: Run) -> None:
    a = {"a": SourceConfig(str(write_rows([talk(1)], "a.jsonl")))}
    b = {"b": SourceConfig(str(write_rows([talk(2), talk(3)], "b.jsonl")))}
    first = run(a | b)
    assert run(b | a).reused
    assert first.sources == ("a", "b")
    assert first.train.sources.tolist() == [0, 1, 1]


def test_the_same_contents_elsewhere_are_found_again(write_rows: Write, run: Run, tmp_path: Path) -> None:
    first = run({"a": SourceConfig(str(write_rows([talk(1)], "here/rows.jsonl")))})
    again = run({"a": SourceConfig(str(write_rows([talk(1)], "there/rows.jsonl")))})
    assert (first.reused, again.reused, again.notes) == (False, True, ())
    assert again.key == first.key
    np.testing.assert_array_equal(again.train.tokens, first.train.tokens)
    assert len(list((tmp_path / "prepared").iterdir())) == 1


def test_what_changed_is_said(write_rows: Write, run: Run, byte_tokenizer: Tokenizer) -> None:
    path = write_rows([talk(n) for n in range(5)])
    source = SourceConfig(str(path))
    run({"a": source})
    changes: list[tuple[dict[str, SourceConfig], dict[str, Any], str]] = [
        ({"a": replace(source, rows=3)}, {}, "sources.a.rows was absent, is 3"),
        ({"a": replace(source, loss_weight=2.0)}, {}, "sources.a.loss_weight was 1.0, is 2.0"),
        ({"a": source}, {"max_tokens": 90}, "max_tokens was 100, is 90"),
        ({"a": source}, {"tokenizer": byte_tokenizer}, "tokenizer.digest was"),
        ({"a": source}, {"options": EncodeOptions({"user": 1.0})}, "role_weights.user was absent, is 1.0"),
    ]
    for sources, settings, reason in changes:
        prepared = run(sources, **settings)
        assert not prepared.reused
        assert reason in prepared.notes[0]
        shutil.rmtree(prepared.folder)
    path.write_text(json.dumps(talk(77)) + "\n")
    assert "sources.a.files[0].contents was" in run({"a": source}).notes[0]


def test_a_copied_set_serves_where_the_files_are_absent(write_rows: Write, run: Run, tmp_path: Path) -> None:
    path = write_rows([talk(1)], "rows.jsonl")
    made = run({"a": SourceConfig(str(path))})
    path.unlink()
    elsewhere = tmp_path / "other machine"
    shutil.copytree(tmp_path / "prepared", elsewhere)
    source = SourceConfig("nowhere/rows.jsonl")
    used = run({"a": source}, prepared_dir=elsewhere)
    assert used.key == made.key
    assert used.notes == (f"not here: rows.jsonl; using {made.key}, prepared from files of the same names",)
    with pytest.raises(DataError) as caught:
        run({"a": replace(source, rows=1)}, prepared_dir=elsewhere)
    message = str(caught.value)
    assert message.startswith("data.sources.a.path is 'nowhere/rows.jsonl': no such file")
    assert "sources.a.rows was absent, is 1" in message
    with pytest.raises(DataError, match=r"holds no set prepared from it"):
        run({"a": SourceConfig("nowhere/other.jsonl")}, prepared_dir=elsewhere)


def test_a_tokenizer_is_trained_from_the_training_rows_the_same_every_time(write_rows: Write, run: Run) -> None:
    rows = [{"messages": [{"role": "assistant", "content": f"word{n} and word{n + 1}"}]} for n in range(40)]
    source = {"a": SourceConfig(str(write_rows(rows)), validation_share=0.1)}
    first = run(source, tokenizer=None, vocab_size=266)
    assert first.tokenizer.vocab_size == 266
    assert run(source, tokenizer=None, vocab_size=266).reused
    shutil.rmtree(first.folder)
    assert run(source, tokenizer=None, vocab_size=266).tokenizer == first.tokenizer
    with pytest.raises(ValueError, match=r"and not both"):
        run(source, vocab_size=266)


def test_a_failure_leaves_nothing_behind(write_rows: Write, run: Run, tmp_path: Path) -> None:
    path = write_rows([talk(n) for n in range(600)])
    with path.open("a") as stream:
        stream.write("{")
    with pytest.raises(DataError, match=r"rows.jsonl, line 601, column 2: malformed JSON"):
        run({"a": SourceConfig(str(path))})
    assert list((tmp_path / "prepared").iterdir()) == []


def test_a_killed_process_leaves_nothing_that_looks_like_a_set(write_rows: Write, tmp_path: Path) -> None:
    path = write_rows([talk(n) for n in range(600)])
    code = """if True:
        import os, signal, sys
        import data.prepared
        from data.sources import SourceConfig
        real = data.prepared.Ledger.balance
        def die(self): os.kill(os.getpid(), signal.SIGKILL)
        data.prepared.Ledger.balance = die
        data.prepared.prepare({"a": SourceConfig(sys.argv[1])}, data.prepared.Rules(max_tokens=200),
                              prepared_dir=sys.argv[2], tokenizer=None, vocab_size=261)
    """
    folder = tmp_path / "prepared"
    command = [sys.executable, "-c", code, str(path), str(folder)]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    [left] = folder.iterdir()
    assert left.name.startswith(".tmp-")
    sources = {"a": SourceConfig(str(path))}
    again = prepare(sources, Rules(max_tokens=200), prepared_dir=folder, tokenizer=None, vocab_size=261)
    assert (again.reused, len(again.train)) == (False, 600)
    assert [entry.name for entry in folder.iterdir()] == [again.key]  # what the dead process left is gone


def test_two_that_prepare_at_once_both_succeed(
    write_rows: Write, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = {"a": SourceConfig(str(write_rows([talk(1), talk(2)])))}
    fill = data.prepared.fill

    def slower(*arguments: Any) -> Any:
        monkeypatch.setattr(data.prepared, "fill", fill)
        assert not run(source).reused  # the other one, from beginning to end
        return fill(*arguments)

    monkeypatch.setattr(data.prepared, "fill", slower)
    assert len(run(source).train) == 2
    assert len(list((tmp_path / "prepared").iterdir())) == 1


DAMAGED = ["tokens.npy", "train/starts.npy", "validation/rows.npy", "manifest.json", "ledger.json", "tokenizer.json"]


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_set_is_named_and_not_used(write_rows: Write, run: Run, name: str) -> None:
    source = {"a": SourceConfig(str(write_rows([talk(1), talk(2)])))}
    file = run(source).folder / name
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(DataError, match=rf"{name.split('/')[0]}"):
        run(source)


def test_a_tokenizer_changed_in_a_prepared_set_is_noticed(
    write_rows: Write, run: Run, byte_tokenizer: Tokenizer
) -> None:
    source = {"a": SourceConfig(str(write_rows([talk(1), talk(2)])))}
    byte_tokenizer.save(run(source).folder / "tokenizer.json")
    with pytest.raises(DataError, match=r"tokenizer.json was changed; delete"):
        run(source)


def test_a_set_is_opened_by_its_folder(write_rows: Write, run: Run, tokenizer: Tokenizer) -> None:
    made = run({"a": SourceConfig(str(write_rows([talk(1), talk(2)])))})
    opened = open_prepared(str(made.folder))
    assert (opened.key, opened.sources, opened.tokenizer) == (made.key, ("a",), tokenizer)
    np.testing.assert_array_equal(opened.train.tokens, made.train.tokens)
    with pytest.raises(DataError, match=r"manifest.json: cannot be read"):
        open_prepared("nowhere")


def test_published_rows_balance_with_the_real_vocabulary(real_rows: Path, nemo: Tokenizer, tmp_path: Path) -> None:
    sources = {
        "tools": SourceConfig(str(real_rows / "sharegpt_tools.json"), validation_share=0.05),
        "alpaca": SourceConfig(str(real_rows / "alpaca.json"), rows=500),
    }
    prepared = prepare(sources, Rules(1024, seed=3), prepared_dir=tmp_path, tokenizer=nemo, max_loss_share=0.3)
    prepared.ledger.balance()
    accounts = prepared.ledger.accounts
    assert (accounts["tools"].rows["read"], accounts["alpaca"].rows["read"]) == (300, 999)
    assert accounts["alpaca"].rows["unsampled"] == 499
    assert accounts["tools"].rows["invalid"] == accounts["alpaca"].rows["invalid"] == 0
    lost = sum(account.rows["too_long"] + account.rows["unweighted"] for account in accounts.values())
    assert len(prepared.rejects.read_text().splitlines()) == lost
    assert len(prepared.train) + len(prepared.validation) + lost == 800
    calls = [r for r in json.loads((real_rows / "sharegpt_tools.json").read_text()) if r["tools"] != "[]"]
    text = prepared.tokenizer.decode(prepared.train.tokens[:20_000].tolist())
    assert calls
    assert "<|im_start|>assistant\n" in text
