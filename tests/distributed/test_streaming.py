"""A streamed run that was killed or failed and goes on equals the one that never stopped, and ranks read the same."""

import contextlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data import stream
from data.errors import DataError
from data.gates import Reader
from data.tokenizer import train_tokenizer
from magnum_train import checkpoint, train
from magnum_train.batches import STREAM
from magnum_train.config import compose
from ranks import run_ranks
from tiny_runs import WORDS, overrides, run_until, series, uneven_rows, write_rows


def streamed_line(folder: Path, *more: str) -> list[str]:
    """Overrides for a streamed run of 8 steps."""
    rows = [row if n % 20 else {"nothing": n} for n, row in enumerate(uneven_rows(400), 1)]
    write_rows(folder / "more.jsonl", rows)
    train_tokenizer([" ".join(WORDS)] * 3 + ["user assistant Say and then?"], 300).save(folder / "tokenizer.json")
    return overrides(
        folder, "data.streaming=true", "data.stream_documents=50", f"tokenizer.path={folder}/tokenizer.json",
        f"+data.sources.more.path={folder}/more.jsonl", "++data.sources.more.repeat=3", "train.max_steps=8",
        "checkpoint.every_steps=3", "validation.every_steps=8", *more,
    )  # fmt: skip


def test_a_streamed_run_goes_on_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    line = streamed_line(tmp_path)
    run_ranks(run_until, 2, [*line, f"run_dir={tmp_path}/whole"], None)
    whole = series(tmp_path / "whole")
    assert [step for step, *_ in whole] == list(range(1, 9))
    ledger = json.loads((tmp_path / "whole" / "ledger.json").read_text())
    assert ledger["more"]["rows"]["invalid"] == ledger["more"]["rows"]["read"] // 20 > 0
    assert ledger["more"]["rows"]["waiting"] > 0
    assert ledger["numbers"]["rows"]["validation"] == 7
    assert ledger["numbers"]["rows"]["in_validation"] >= 7  # the file's first rows are the validation's
    for account in ledger.values():
        assert account["trained"]["documents"] == account["rows"]["packed"]

    for world in (2, 1):
        run_dir = tmp_path / f"to{world}"
        run_ranks(run_until, 2, [*line, f"run_dir={run_dir}"], 5)
        assert checkpoint.steps(run_dir) == [3]
        run_ranks(run_until, world, [*line, f"run_dir={run_dir}"], None)
        if world == 2:
            assert series(run_dir) == whole
        for (_, loss, norm), (_, loss2, norm2) in zip(whole, series(run_dir), strict=True):
            assert (loss2, norm2) == pytest.approx((loss, norm), rel=1e-5)
        for name in ("ledger.json", "rejects.jsonl"):
            assert (run_dir / name).read_text() == (tmp_path / "whole" / name).read_text()


def said_by(line: list[str]) -> tuple[str, str]:
    """Train; how this rank ended, and what it printed."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            train.train(compose(line))
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__} {error}", printed.getvalue()
    return "", printed.getvalue()


def hub_goes_away(line: list[str], failing: list[str], last: int) -> tuple[str, str]:
    """Train, where some ranks cannot read beyond a row."""
    real = stream.rows_of

    def rows_of(*args: Any, **more: Any) -> Iterator[Any]:
        for row in real(*args, **more):
            if os.environ["RANK"] in failing and row.number > last:
                raise DataError(f"{args[0].key}: the hub went away")
            yield row

    stream.rows_of = rows_of
    return said_by(line)


@pytest.mark.parametrize(("failing", "kinds"), [("1", "ElsewhereError HostError"), ("01", "DataError ElsewhereError")])
def test_what_one_rank_cannot_read_ends_all_with_its_reason_and_no_step_is_lost(
    failing: str, kinds: str, tmp_path: Path
) -> None:
    line = streamed_line(tmp_path)
    run_dir, whole = tmp_path / "run", [*line, f"run_dir={tmp_path}/whole"]
    ends = [end for end, _ in run_ranks(hub_goes_away, 2, line, list(failing), 100)]
    assert [end.split()[0] for end in ends] == kinds.split()
    [speaks] = [end for end in ends if not end.startswith("Elsewhere")]
    assert "data.sources.more.path: the hub went away" in speaks
    assert ("rank 1 on host 0" in speaks) == (failing == "1")
    done = len(series(run_dir))
    assert 0 < done < 8
    assert done % 3  # where no checkpoint was due
    assert max(checkpoint.steps(run_dir)) == done
    run_ranks(run_until, 2, line, None)
    run_ranks(run_until, 2, whole, None)
    assert series(run_dir) == series(tmp_path / "whole")
    for name in ("ledger.json", "rejects.jsonl"):
        assert (run_dir / name).read_text() == (tmp_path / "whole" / name).read_text()


def another_answer(line: list[str]) -> tuple[str, str]:
    """Train, where rank 1's filter answers otherwise after a while."""
    real, asked = Reader.refusal, iter(range(10**6))

    def refusal(self: Reader, conversation: Any) -> str | None:
        odd = os.environ["RANK"] == "1" and next(asked) == 300
        return "refused by chance" if odd else real(self, conversation)

    Reader.refusal = refusal  # type: ignore[method-assign]
    return said_by(line)


def test_ranks_that_read_different_rows_end_at_that_step(tmp_path: Path) -> None:
    (first, _), (second, _) = run_ranks(another_answer, 2, streamed_line(tmp_path, "train.max_steps=40"))
    assert first == second
    done = len(series(tmp_path / "run"))
    assert first.startswith(f"RunError step {done + 1}: found other rows on rank 1 than on rank 0; expected the same")
    assert "predicate" in first
    assert 0 < done < 40


def rewritten(file: Path, content: bytes) -> None:
    """Put another content in a checkpoint's file, and in its manifest."""
    file.write_bytes(content)
    entries = json.loads((file.parent / checkpoint.MANIFEST).read_text())
    entries["files"][file.name] = checkpoint.digest(file)
    (file.parent / checkpoint.MANIFEST).write_text(json.dumps(entries))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("absent", "step-00000002: stream.npz: No such file"),
        ("cut short", "step-00000002: stream.npz has "),
        ("of another step", "what was read until step 1"),
        ("no archive", "ValueError"),
    ],
)
def test_a_checkpoint_without_the_stream_s_state_says_so(damage: str, said: str, tmp_path: Path) -> None:
    line = streamed_line(tmp_path, "train.max_steps=2", "checkpoint.every_steps=1")
    [(ended, printed)] = run_ranks(said_by, 1, line)
    assert not ended
    assert "rows from numbers 25.0%, more 75.0%" in " ".join(printed.split())
    file = checkpoint.path_of(tmp_path / "run", 2) / STREAM
    earlier = checkpoint.path_of(tmp_path / "run", 1)
    if damage == "absent":
        file.unlink()
    elif damage == "cut short":
        file.write_bytes(file.read_bytes()[:-9])
    elif damage == "of another step":
        rewritten(file, (earlier / STREAM).read_bytes())
    else:
        rewritten(file, b"PK but no archive")
    shutil.rmtree(earlier)
    ends = [end for end, _ in run_ranks(said_by, 2, [*line, "train.max_steps=4"])]
    assert ends[0].startswith("CheckpointError")
    assert said in ends[0]
    assert "Remove" in ends[0]
    assert ends[1].startswith(("ElsewhereError", "CheckpointError"))  # the same on all ranks, or one that speaks
    shutil.rmtree(file.parent)
    assert run_ranks(said_by, 2, [*line, "train.max_steps=4"])[0][0] == ""
