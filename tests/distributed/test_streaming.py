"""A streamed run that was killed and goes on equals the one that never stopped, ledger and lost rows included."""

import json
from pathlib import Path

import pytest

from data.tokenizer import train_tokenizer
from magnum_train import checkpoint
from ranks import run_ranks
from tiny_runs import WORDS, overrides, run_until, series, uneven_rows, write_rows


def test_a_streamed_run_goes_on_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    rows = [row if n % 20 else {"nothing": n} for n, row in enumerate(uneven_rows(400), 1)]
    write_rows(tmp_path / "more.jsonl", rows)
    train_tokenizer([" ".join(WORDS)] * 3 + ["user assistant Say and then?"], 300).save(tmp_path / "tokenizer.json")
    line = overrides(
        tmp_path, "data.streaming=true", "data.stream_documents=50", f"tokenizer.path={tmp_path}/tokenizer.json",
        f"+data.sources.more.path={tmp_path}/more.jsonl", "++data.sources.more.repeat=3", "train.max_steps=8",
        "checkpoint.every_steps=3", "validation.every_steps=8",
    )  # fmt: skip
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
