"""The export program as a person starts it: what it leaves for other programs, and how it refuses."""

import dataclasses
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_command_line import HOME, assert_refused, program
from transformers import AutoModelForCausalLM, AutoTokenizer

from base_models import SLOTS, write_base
from data import DataError
from magnum_train.config import ExportConfig, TokenizerFileConfig
from magnum_train.errors import UserError
from magnum_train.export import main
from magnum_train.weights import find, load_model
from models import assert_close

FILES = {
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "chat_template.jinja"),
}


def export(cwd: Path, *words: str, limit: str = "") -> "subprocess.CompletedProcess[str]":
    """Run the verb; `limit` is a shell's ulimit, under which a file that grows too large fails like a full disk."""
    if not limit:
        return program(cwd, "-m", "magnum_train.export", *words)
    script = f"ulimit -f {limit}; exec {sys.executable} -m magnum_train.export {' '.join(words)}"
    return subprocess.run(
        ["bash", "-c", script], cwd=cwd, env=os.environ | {"PYTHONPATH": str(HOME)}, capture_output=True, text=True,
        timeout=110, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def test_a_folder_goes_in_and_comes_out_with_chatml_and_the_same_bits(tmp_path: Path) -> None:
    write_base(tmp_path / "base", dtype=torch.bfloat16, shard=10**9)
    done = export(tmp_path, "weights=base", "out=out", *SLOTS)
    assert done.returncode == 0, done.stderr
    assert "in bfloat16" in done.stdout
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"model.safetensors", *FILES}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["base", "out"]
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (0, 4, 2)
    assert generation == {"bos_token_id": 0, "eos_token_id": [4, 1], "pad_token_id": 2}
    assert (config["max_position_embeddings"], config["torch_dtype"], config["head_dim"]) == (4096, "bfloat16", 16)
    for file in (tmp_path / "out").glob("*[!s]"):  # every file but the weights
        assert "SPECIAL_3" not in file.read_text(errors="ignore"), file

    again = export(tmp_path, "weights=out", "out=wide", "dtype=float32", "max_shard_gb=0.0001")
    assert again.returncode == 0, again.stderr
    assert len(list((tmp_path / "wide").glob("model-*.safetensors"))) > 2
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "wide", output_loading_info=True)
    assert not any(info.values()), info
    ours, tokenizer = load_model(find(str(tmp_path / "wide"), "weights"), TokenizerFileConfig(), dtype="float32")
    words = AutoTokenizer.from_pretrained(tmp_path / "wide")
    asked = words.apply_chat_template([{"role": "user", "content": "green door"}], add_generation_prompt=True)
    ids = torch.tensor(asked["input_ids"])
    assert ids[1] == tokenizer.im_start_id == words.convert_tokens_to_ids("<|im_start|>")
    with torch.no_grad():
        logits = ours(ids, torch.arange(len(ids)), torch.tensor([0, len(ids)], dtype=torch.int32), len(ids))
        assert_close(logits, theirs(ids[None]).logits[0], 1e-5)


MISTAKES = {
    "out is there": ({"out": "base"}, ["base: found it there already", "Name another"]),
    "no slots": (
        {"tokenizer": TokenizerFileConfig()},
        ["tokenizer.json", "no control token <|im_start|>", "<SPECIAL_3>=3"],
    ),
    "no weights": ({"weights": "nothing"}, ["weights: found no folder", "nothing"]),
    "a file in the way": ({"out": "base/config.json/out"}, ["Not a directory"]),
    "no permission": ({"out": "/sys/magnum"}, ["/sys", "expected to write"]),
    "no room": ({"out": "out"}, ["out: found 0.0 kB free for", "expected 50.1 MB"]),
    "half a slot": ({"tokenizer": TokenizerFileConfig(im_start_slot=3)}, ["no control token <|im_end|>"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_and_nothing_is_written(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_base(tmp_path / "base")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    change, said = MISTAKES[mistake]
    if mistake == "no room":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 0))
    slots = TokenizerFileConfig(im_start_slot=3, im_end_slot=4)
    settings = ExportConfig(weights="base", out="out", tokenizer=slots)
    settings = dataclasses.replace(settings, **change)
    monkeypatch.chdir(tmp_path)
    with pytest.raises((UserError, DataError)) as caught:
        main(settings)
    for words in said:
        assert words in str(caught.value)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_a_typo_is_answered_with_the_setting_that_was_meant(tmp_path: Path) -> None:
    assert_refused(export(tmp_path, "weights=base", "out=out", "dtpye=float32"), "dtpye: found an unknown", "dtype")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_answered_and_nothing_is_left(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    done = export(tmp_path, "weights=base", "out=out", "dtype=float32", *SLOTS, limit="64")
    assert_refused(done, "model.safetensors: found File too large", "expected room to write it", "Free some space")
    assert [entry.name for entry in tmp_path.iterdir()] == ["base"]


def stuck(settings: ExportConfig, writing: Any) -> None:
    """Export, and get no further than half of the first file."""
    from model import hf

    def half(_: Any, file: Path, metadata: Any) -> None:
        file.write_bytes(b"half")
        writing.set()
        time.sleep(60)

    hf.save_file = half
    main(settings)


def test_what_a_killed_export_left_is_gone_after_the_next_and_a_living_one_is_left_alone(tmp_path: Path) -> None:
    write_base(tmp_path / "base", dtype=torch.bfloat16, shard=10**9)
    slots = TokenizerFileConfig(im_start_slot=3, im_end_slot=4)
    settings = ExportConfig(weights=str(tmp_path / "base"), out=str(tmp_path / "out"), tokenizer=slots)
    context = multiprocessing.get_context("forkserver")
    writing = context.Event()
    process = context.Process(target=stuck, args=(settings, writing), daemon=True)
    process.start()
    try:
        assert writing.wait(60)
        with pytest.raises(UserError, match=r"\.out\.partial: found another process that writes there"):
            main(settings)
        assert (tmp_path / ".out.partial" / "model.safetensors").read_bytes() == b"half"
    finally:
        process.kill()
        process.join()
    main(settings)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["base", "out"]
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"model.safetensors", *FILES}


def test_an_export_is_there_though_nobody_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As behind `| head`: the pipe is closed before the last line comes."""
    write_base(tmp_path / "base", dtype=torch.bfloat16)
    read, write = os.pipe()
    os.close(read)
    slots = TokenizerFileConfig(im_start_slot=3, im_end_slot=4)
    with os.fdopen(write, "w") as closed, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", closed)
        main(ExportConfig(weights=str(tmp_path / "base"), out=str(tmp_path / "out"), tokenizer=slots))
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    file = sorted((tmp_path / "base").glob("model-*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-1])
    assert_refused(export(tmp_path, "weights=base", "out=out", *SLOTS), file.name, "Fetch it again")
    assert [entry.name for entry in tmp_path.iterdir()] == ["base"]


def test_a_hub_name_is_read_from_the_cache_and_its_commit_is_kept(tmp_path: Path) -> None:
    """Without a network: a cache as a download leaves it, and the answer where there is none."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    home = tmp_path / "hub" / "models--someone--small-base"
    write_base(home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    environment = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    words = ["weights=someone/small-base", "out=out", *SLOTS]
    done = program(tmp_path, "-m", "magnum_train.export", *words, environment=environment)
    assert done.returncode == 0, done.stderr
    assert f"someone/small-base@{commit}: " in done.stdout
    other = program(tmp_path, "-m", "magnum_train.export", "weights=someone/else", "out=o", environment=environment)
    assert_refused(other, "no folder someone/else here, and from the hub", "a machine without a network needs a folder")
