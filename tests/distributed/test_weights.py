"""Training from weights that somebody else made: sharded loading, untrained rows, and what a run keeps of it."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor

from base_models import BASE, CHATML_IDS, LARGE, SLOTS, base_model, write_base
from data import Tokenizer
from data.tokenizer import train_tokenizer
from magnum_train import checkpoint, distributed, embeddings, export, saver, train
from magnum_train.checkpoint import TrainState
from magnum_train.config import (
    CheckpointConfig,
    ExportConfig,
    TokenizerConfig,
    TokenizerFileConfig,
    compose,
    to_yaml,
)
from magnum_train.errors import CheckpointError
from magnum_train.optim import build_optimizer
from magnum_train.parallelize import build
from magnum_train.saver import Saver
from magnum_train.weights import find, load_model, open_tokenizer, read_origin
from model import Transformer, TransformerConfig
from model.config import parameter_shapes
from model.hf import HFFolder, load_hf, local_region, save_hf
from ranks import run_ranks
from tiny_runs import TINY_MODEL, metrics, overrides

HOME = Path(__file__).parents[2]


def line_from(folder: Path, base: Path, *more: str) -> list[str]:
    """Overrides of a tiny run that takes its architecture and its vocabulary from a folder."""
    line = [word for word in overrides(folder) if word not in TINY_MODEL]
    return [*line, "model=from_weights", f"model.weights={base}", *more]


def empty(mesh: Any, checkpointing: str = "none", config: TransformerConfig = BASE) -> Transformer:
    return build(
        config, attention_backend="sdpa", mesh=mesh, device=torch.device("cpu"), compute_dtype=torch.float32,
        activation_checkpointing=checkpointing, reshard_after_forward=True, seed=None,
    )  # fmt: skip


def in_and_out(base: str, out: str, replicate: int) -> None:
    """Load sharded, save as a folder and as a run's checkpoint."""
    with distributed.start(timeout_seconds=60, replicate=replicate, threads=1, deterministic=False) as ranks:
        model = empty(ranks.mesh, "full")  # whose names bear a wrapper's
        load_hf(model, base)
        save_hf(model, out, dtype=torch.bfloat16, max_shard_bytes=30_000, write=ranks.is_main)
        ranks.barrier()
        save = Saver(Path(f"{out}-run"), CheckpointConfig(asynchronous=False), ranks)
        save.begin(model, build_optimizer(model, compose([]).optim), TrainState(step=1, refused=[], data_key=""))


@pytest.mark.parametrize(("world", "replicate"), [(1, 1), (2, 1), (4, 1), (4, 2)])
def test_in_and_out_without_a_step_is_bit_identical(world: int, replicate: int, tmp_path: Path) -> None:
    write_base(tmp_path / "base", dtype=torch.bfloat16, shard=30_000)
    run_ranks(in_and_out, world, str(tmp_path / "base"), str(tmp_path / "out"), replicate)
    files = sorted((tmp_path / "base").glob("model*.safetensors"))
    assert len(files) > 2
    for file in files:
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()
    saved = tmp_path / "out-run" / "checkpoints" / "step-00000001"
    folder = HFFolder(tmp_path / "base")
    for name, parameter in Transformer(BASE).named_parameters():
        read = checkpoint.read_weight(saved, name, tuple(parameter.shape), torch.bfloat16)
        assert torch.equal(read, folder.read(name)), name


def test_a_rank_reads_its_own_rows_alone(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    counts = run_ranks(elements_read, 4, str(tmp_path / "base"))
    assert all(read == held for read, held in counts)
    assert sum(read for read, _ in counts) == sum(p.numel() for p in Transformer(BASE).parameters())


def elements_read(base: str) -> tuple[int, int]:
    with distributed.start(timeout_seconds=60, replicate=1, threads=1, deterministic=False) as ranks:
        model, folder, read = empty(ranks.mesh), HFFolder(base), 0
        real = folder.read

        def counted(*arguments: Any) -> Tensor:
            nonlocal read
            tensor = real(*arguments)
            read += tensor.numel()
            return tensor

        folder.read = counted  # type: ignore[method-assign]
        load_hf(model, folder)
        return read, sum(p.to_local().numel() for p in model.parameters())  # type: ignore[operator]


def mended(base: str, new: bool = True) -> tuple[dict[str, Any], dict[str, Any], Tensor, Tensor]:
    """Mend, then once more as a second stage would; both accounts, and the first eight rows of both matrices."""
    with distributed.start(timeout_seconds=60, replicate=1, threads=1, deterministic=False) as ranks:
        model = empty(ranks.mesh)
        load_hf(model, base)
        tokenizer = open_tokenizer(TokenizerConfig(im_start_slot=3, im_end_slot=4), Path(base))
        first, again = (
            {m: f.record(tokenizer) for m, f in embeddings.mend(model, tokenizer, 1, new_chatml=fresh).items()}
            for fresh in (new, False)
        )
        rows = [getattr(model, m).weight.full_tensor()[:8].clone() for m in embeddings.MATRICES]
        return first, again, rows[0], rows[1]


def test_untrained_rows_begin_at_the_mean_once_and_alike_on_any_number_of_ranks(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", zero=(2, 3, 4))
    results = {world: run_ranks(mended, world, str(tmp_path / "base")) for world in (1, 2, 3)}
    first, again, embed, output = results[1][0]
    for world in (2, 3):
        for _, _, other_embed, other_output in results[world]:
            assert torch.equal(embed, other_embed)
            assert torch.equal(output, other_output)
    for matrix, rows in (("tok_embeddings", embed), ("output", output)):
        whole = getattr(base, matrix).weight.detach()
        ordinary = whole[5:]
        rms = ordinary.square().mean().sqrt()
        for id_ in (2, 3, 4):
            off = rows[id_] - ordinary.mean(dim=0)
            assert 0 < off.square().mean().sqrt() < 2 * embeddings.NOISE * rms
        assert len({tuple(row.tolist()) for row in rows[2:5]}) == 3  # each distinct
        assert torch.equal(rows[[0, 1, 5, 6, 7]], whole[[0, 1, 5, 6, 7]])
        assert first[matrix]["mended"] == {"<|im_start|>": 3, "<|im_end|>": 4}
        assert first[matrix]["others_mended"] == [[2, 2]]
        assert first[matrix]["norm_found"]["<|im_end|>"] == 0
        assert first[matrix]["ordinary_rows"] == 315
        assert again[matrix]["mended"] == {}
        assert again[matrix]["others_mended"] == []


def rescaled(folder: Path, ids: list[int], factor: float) -> Tensor:
    """Scale rows of both matrices of a folder; the first eight of the embedding as they then are."""
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name][ids] *= factor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors["model.embed_tokens.weight"][:8]


@pytest.mark.parametrize(
    ("factor", "new", "set_anew"),
    [
        (1e-4, True, {"<s>": 0, "<|im_end|>": 4}),
        (1e-4, False, {"<s>": 0, "<|im_end|>": 4}),
        (0.005, True, {"<|im_end|>": 4}),
        (0.3, True, {"<|im_end|>": 4}),
        (0.3, False, {}),
        (1.0, True, {}),
        (30.0, True, {"<|im_end|>": 4}),
        (30.0, False, {}),
    ],
)
def test_a_norm_far_off_counts_as_untrained_for_new_chatml_tokens_alone(
    factor: float, new: bool, set_anew: dict[str, int], tmp_path: Path
) -> None:
    """`<s>`, whose row may be unlike all others and is trained, keeps it, unless it is next to nothing."""
    write_base(tmp_path / "base", zero=(), shard=10**9)
    kept = rescaled(tmp_path / "base", [0, 4], factor)
    [(first, _, embed, _)] = run_ranks(mended, 1, str(tmp_path / "base"), new)
    for matrix in embeddings.MATRICES:
        assert first[matrix]["mended"] == set_anew
    assert [torch.equal(embed[i], kept[i]) for i in (0, 4)] == ["<s>" not in set_anew, "<|im_end|>" not in set_anew]


def test_rows_beyond_the_vocabulary_are_set_and_recorded_and_what_is_not_finite_is_refused(tmp_path: Path) -> None:
    write_base(tmp_path / "padded", vocab_size=330, zero=(3, 4, *range(322, 330)))
    line = line_from(tmp_path, tmp_path / "padded", *SLOTS, "train.max_steps=1", "samples.every_steps=1")
    run_ranks(go, 2, line)
    assert read_origin(tmp_path / "run")["control_rows"]["output"]["others_mended"] == [[322, 329]]
    write_base(tmp_path / "base", shard=10**9)
    rescaled(tmp_path / "base", [300], float("nan"))
    [said] = run_ranks(refused, 1, line_from(tmp_path, tmp_path / "base", *SLOTS, f"run_dir={tmp_path / 'other'}"))
    assert "tok_embeddings of the weights, row 300: found norm nan" in said


def go(line: list[str]) -> None:
    train.train(compose(line))


def refused(line: list[str]) -> str:
    try:
        train.train(compose(line))
    except ValueError as error:
        return str(error)
    return ""


def go_unmended(line: list[str]) -> None:
    """Train as if nobody had looked at the rows: they are zero again when the first step begins."""
    real = train.mend

    def undone(model: Transformer, *arguments: Any, **options: Any) -> Any:
        found = real(model, *arguments, **options)
        for matrix in embeddings.MATRICES:
            local, _ = local_region(getattr(model, matrix).weight)
            local[list(CHATML_IDS)] = 0
        return found

    train.mend = undone
    train.train(compose(line))


def test_a_run_from_a_base_model_with_zeroed_rows_begins_sanely_and_records_it(tmp_path: Path) -> None:
    """Its first gradient is of the size of that of the same model with healthy rows; without mending it is not."""
    write_base(tmp_path / "base")
    write_base(tmp_path / "healthy", zero=())
    first = {}
    runs = {"one": ("base", 1, go), "two": ("base", 2, go), "healthy": ("healthy", 1, go)}
    runs["raw"] = ("base", 1, go_unmended)
    for name, (base, world, function) in runs.items():
        line = line_from(tmp_path, tmp_path / base, *SLOTS, "train.max_steps=2", f"run_dir={tmp_path / 'runs' / name}")
        run_ranks(function, world, line)
        first[name] = metrics(tmp_path / "runs" / name)[0]
    assert first["one"]["loss"] == pytest.approx(first["two"]["loss"], rel=1e-6)
    assert first["one"]["grad_norm"] == pytest.approx(first["two"]["grad_norm"], rel=1e-5)
    healthy = first["healthy"]["grad_norm"]
    assert first["raw"]["grad_norm"] > 1.5 * healthy  # of so small a network two rows of 320 are little
    assert first["one"]["grad_norm"] == pytest.approx(healthy, rel=0.1)
    for key in ("one", "two"):
        origin = read_origin(tmp_path / "runs" / key)
        assert origin["weights"] == str(tmp_path / "base")
        assert origin["max_positions"] == 4096
        assert origin["control_rows"]["output"]["mended"] == {"<|im_start|>": 3, "<|im_end|>": 4}
    assert read_origin(tmp_path / "runs" / "healthy")["control_rows"]["output"]["mended"] == {}
    settings = compose(line_from(tmp_path, tmp_path / "base", *SLOTS))
    assert settings.model.dim is None
    recorded = find(str(tmp_path / "runs" / "one"), "weights").config
    assert recorded == BASE


def test_the_first_loss_is_that_of_transformers_on_the_same_rows(tmp_path: Path) -> None:
    """From folder to first loss through every part: Σ weight × cross-entropy ÷ Σ weight, document by document."""
    from transformers import AutoModelForCausalLM

    from data.prepared import open_prepared

    write_base(tmp_path / "base", zero=())
    line = line_from(tmp_path, tmp_path / "base", *SLOTS, "train.max_steps=1", "train.tokens_per_step=4096")
    run_ranks(go, 2, line)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    [folder] = [entry for entry in (tmp_path / "prepared").iterdir() if not entry.name.startswith(".")]
    documents = open_prepared(folder).train
    total = weight = 0.0
    for start, end in zip(documents.starts, documents.starts + documents.lengths, strict=True):
        tokens = torch.tensor(documents.tokens[start:end]).long()
        weights = torch.tensor(documents.weights[start + 1 : end]).double()
        with torch.no_grad():
            logits = theirs(tokens[None]).logits[0, :-1].double()
        total += float((torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none") * weights).sum())
        weight += float(weights.sum())
    row = metrics(tmp_path / "run")[0]
    assert row["documents"] == len(documents)  # the one step holds them all
    assert row["loss"] == pytest.approx(total / weight, rel=1e-5)


def test_a_run_goes_on_where_its_base_model_is_no_longer(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    line = line_from(tmp_path, tmp_path / "base", *SLOTS, "train.max_steps=4", "checkpoint.every_steps=2")
    run_ranks(go, 1, [*line, f"run_dir={tmp_path / 'whole'}"])
    run_ranks(go, 1, [*line, "train.max_steps=2"])
    shutil.rmtree(tmp_path / "base")
    before = read_origin(tmp_path / "run")
    [said] = run_ranks(refused, 1, [*line, f"model.weights={tmp_path / 'other'}"])
    assert "model.weights was" in said
    [said] = run_ranks(refused, 1, [word for word in line if not word.startswith("model.weights")])
    assert "model.weights was" in said
    run_ranks(go, 1, line)
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2, 3, 4]
    assert read_origin(tmp_path / "run") == before
    state = checkpoint.read_state(checkpoint.path_of(tmp_path / "run", 4))
    assert state.step == 4


def test_a_second_stage_begins_from_a_run_or_its_export_and_leaves_its_rows_alone(tmp_path: Path) -> None:
    """The first stage's rows are short, being near the mean, and would look untrained to one that had to guess."""
    write_base(tmp_path / "base")
    first = line_from(tmp_path, tmp_path / "base", *SLOTS, "train.max_steps=3", "train.export_at_end=true")
    run_ranks(go, 2, first)
    origins = {"run": f"{tmp_path / 'run'}@3", "folder": str(tmp_path / "run" / "exports" / "step-00000003")}
    for name, origin in origins.items():
        second = line_from(
            tmp_path, Path(origin), "train.max_steps=1", f"run_dir={tmp_path / 'second' / name}", "optim.lr=1e-9",
        )  # fmt: skip
        run_ranks(go, 2, second)
        record = read_origin(tmp_path / "second" / name)
        assert record["weights"] == origin
        assert record["max_positions"] == 4096
        rows = record["control_rows"]["tok_embeddings"]
        assert rows["norm_found"]["<|im_end|>"] < rows["trained_between"][0]
        assert all(not rows["mended"] and not rows["others_mended"] for rows in record["control_rows"].values())
        before, after = (find(place, "weights") for place in (origin, str(tmp_path / "second" / name)))
        for parameter in parameter_shapes(BASE):
            a, b = before.read(parameter, torch.float32), after.read(parameter, torch.float32)
            assert torch.allclose(a, b, atol=1e-7), parameter
        assert Tokenizer.from_file(tmp_path / "second" / name / "tokenizer.json").im_end_id == 4


def test_appended_control_tokens_get_rows_of_their_own(tmp_path: Path) -> None:
    """A checkpoint without reserved ids: 320 ids, all taken; two more are added, and their rows begin at the mean."""
    write_base(tmp_path / "base", zero=(), reserved=False)
    line = line_from(tmp_path, tmp_path / "base", "tokenizer.append=true", "train.max_steps=1")
    [said] = run_ranks(refused, 1, [word for word in line if word != "tokenizer.append=true"])
    assert "no control token <|im_start|>" in said
    run_ranks(go, 2, line)
    found = find(str(tmp_path / "run"), "weights")
    assert found.config.vocab_size == 322
    tokenizer = open_tokenizer(TokenizerConfig(), found.vocabulary)
    assert (tokenizer.im_start_id, tokenizer.im_end_id) == (320, 321)
    rows = read_origin(tmp_path / "run")["control_rows"]["tok_embeddings"]
    assert rows["mended"] == {"<|im_start|>": 320, "<|im_end|>": 321}
    embed = found.read("tok_embeddings.weight", torch.float32)
    base = base_model(zero=()).tok_embeddings.weight.detach()
    assert (embed[:320] - base).abs().max() < 0.01  # one step
    assert (embed[320:] - base[5:].mean(dim=0)).abs().max() < 0.05
    run_ranks(go, 1, [*line, "train.max_steps=2"])  # goes on
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2]


def test_a_new_start_leaves_no_record_of_an_earlier_beginning(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    run_ranks(go, 1, line_from(tmp_path, tmp_path / "base", *SLOTS, "train.max_steps=1"))
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    run_ranks(go, 1, overrides(tmp_path, "train.max_steps=1"))
    assert read_origin(tmp_path / "run") == {}
    assert find(str(tmp_path / "run"), "weights").max_positions == 256


def test_the_vocabulary_of_a_run_does_not_grow(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    run_ranks(go, 1, line_from(tmp_path, tmp_path / "base", *SLOTS, "train.max_steps=1"))
    more = ["model.vocab_size=384", "tokenizer.append=true", f"run_dir={tmp_path / 'second'}"]
    for said in run_ranks(refused, 2, line_from(tmp_path, tmp_path / "run", *more))[:1]:
        assert "model.vocab_size: found 384; expected 320, as in" in said
        assert "export it and begin from the folder" in said
    assert not (tmp_path / "second").exists()


def test_a_folder_of_weights_may_hold_a_config_of_somebody_elses(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    (tmp_path / "base" / "config.yaml").write_text("lora: 8\n")
    assert find(str(tmp_path / "base"), "weights").config == BASE


def test_weights_and_tokenizer_of_a_hub_model_are_of_one_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub moves on between the two; each host asks it once."""
    write_base(tmp_path / "base")
    asked = []

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        return str(tmp_path / "base")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    line = line_from(tmp_path, Path("someone/small"), *SLOTS, "train.max_steps=1")
    with monkeypatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            patch.delenv(name, raising=False)
        train.train(compose(line))
    assert asked == [("someone/small", None)]
    assert read_origin(tmp_path / "run")["weights"] == "someone/small@base"


MISTAKES = {
    "architecture": (["model=tiny"], ["dim 40 in the weights, 128 in the model", "model=from_weights"]),
    "no such folder": (["model.weights=/nowhere/at/all"], ["model.weights: found no folder /nowhere/at/all"]),
    "slots": ([], ["no control token <|im_start|>", "<SPECIAL_3>=3"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_before_anything_is_prepared(mistake: str, tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    words, expected = MISTAKES[mistake]
    line = line_from(tmp_path, tmp_path / "base", *([] if mistake == "slots" else SLOTS), *words)
    if mistake == "architecture":
        line.remove("model=from_weights")
    [message] = run_ranks(refused, 1, line)
    for said in expected:
        assert said in message
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "prepared").exists()


def unreadable(line: list[str]) -> str:
    """Train, where rank 1's disk fails in the middle of its reading; what this rank says, by kind."""
    from model import hf

    real = hf.HFFolder.copy_to

    def failing(self: HFFolder, name: str, *rest: Any) -> None:
        if os.environ["RANK"] == "1" and name == "norm.weight":
            raise ValueError(f"{self.path}: found a disk that fails, expected one that does not")
        real(self, name, *rest)

    hf.HFFolder.copy_to = failing  # type: ignore[method-assign]
    try:
        train.train(compose(line))
    except ValueError as error:
        return f"{type(error).__name__} {error}"
    return ""


def test_what_fails_on_one_rank_alone_ends_all_and_is_told_from_there(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    said = run_ranks(unreadable, 3, line_from(tmp_path, tmp_path / "base", *SLOTS, "train.tokens_per_step=1536"))
    assert [words.split()[0] for words in said] == ["ElsewhereError", "HostError", "ElsewhereError"]
    assert "rank 1 on host 0" in said[1]
    assert "a disk that fails" in said[1]


def metadata_fails(line: list[str], kind: str) -> str:
    """Train, where rank 1 alone cannot read the description of the run's checkpoint; what this rank says."""
    real = checkpoint._MetadataUnpickler.load

    def failing(self: Any) -> Any:
        if os.environ["RANK"] == "1":
            raise OSError(5, "a disk that fails")
        return real(self)

    checkpoint._MetadataUnpickler.load = failing  # type: ignore[method-assign]
    return refused(line)


@pytest.mark.parametrize("kind", ["second stage", "resume"])
def test_a_checkpoint_that_one_rank_cannot_read_ends_all_with_its_reason(kind: str, tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    line = line_from(tmp_path, tmp_path / "base", *SLOTS, "train.max_steps=1")
    run_ranks(go, 2, line)
    again = [*line, "train.max_steps=2"]
    if kind == "second stage":
        again = line_from(tmp_path, tmp_path / "run", f"run_dir={tmp_path / 'second'}")
    for said in run_ranks(metadata_fails, 2, again, kind):
        assert "a disk that fails" in said
        assert "step-00000001" in said


def surprised(line: list[str]) -> str:
    """Train, where rank 1 meets what nobody foresaw while it loads."""
    from model import hf

    def failing(*_: Any) -> None:
        raise RuntimeError("no memory for it")

    if os.environ["RANK"] == "1":
        hf.HFFolder.copy_to = failing  # type: ignore[assignment, method-assign]
    try:
        train.train(compose(line))
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__} {error}"
    return ""


def test_nobody_waits_for_a_rank_that_met_what_nobody_foresaw(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    said = run_ranks(surprised, 2, line_from(tmp_path, tmp_path / "base", *SLOTS), timeout=60)
    assert said[0].startswith("ElsewhereError")
    assert said[1] == "RuntimeError no memory for it"


@pytest.mark.parametrize("place", ["beside", "elsewhere", "nowhere"])
def test_trained_chatml_rows_are_known_by_the_vocabulary_wherever_it_lies(place: str, tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    line = line_from(tmp_path, tmp_path / "base", *SLOTS, "train.max_steps=2", "train.export_at_end=true")
    run_ranks(go, 1, line)
    out = tmp_path / "run" / "exports" / "step-00000002"
    more = [] if place == "beside" else [f"tokenizer.path={tmp_path / 'kept' / 'tokenizer.json'}"]
    if more:
        (tmp_path / "kept").mkdir()
        source = out if place == "elsewhere" else tmp_path / "base"
        shutil.copy(source / "tokenizer.json", tmp_path / "kept")
        (out / "tokenizer.json").unlink()
    if place == "nowhere":  # the vocabulary in use does not name them, so they are given now
        more += SLOTS
    run_ranks(go, 1, line_from(tmp_path, out, *more, "train.max_steps=1", f"run_dir={tmp_path / 'second'}"))
    mended_rows = read_origin(tmp_path / "second")["control_rows"]["tok_embeddings"]["mended"]
    assert bool(mended_rows) == (place == "nowhere")


def damaged(folder: Path, kind: str) -> None:
    """Harm a run's checkpoint in one of the ways in which disks, people and strangers do."""
    weights, state = folder / "weights", folder / "state.json"
    shard = weights / "__0_0.distcp"
    content = shard.read_bytes()
    if kind == "cut short":
        shard.write_bytes(content[: len(content) // 20])
    elif kind == "a flipped bit":
        shard.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    elif kind == "absent":
        shard.unlink()
    elif kind == "no metadata":
        (weights / ".metadata").unlink()
    elif kind == "no manifest":
        (folder / "manifest.json").unlink()
    elif kind == "torn manifest":
        (folder / "manifest.json").write_text('{"files": {"a')
    elif kind == "another version":
        state.write_text(state.read_text().replace('"format": 2', '"format": 9'))
        sealed(folder)
    elif kind == "an older version":  # which had no manifest
        state.write_text(state.read_text().replace('"format": 2', '"format": 1'))
        (folder / "manifest.json").unlink()
    elif kind == "torn settings":
        (folder.parents[1] / "config.yaml").write_text("foo: [1")
    elif kind == "torn origin":
        (folder.parents[1] / "weights.json").write_text("{")
    elif kind == "evil metadata":
        (weights / ".metadata").write_bytes(pickle.dumps(Evil()))
        sealed(folder)
    else:  # an object where a tensor should be
        found = checkpoint.read_weight(folder, "output.weight", (320, 40), torch.float32)
        parts = {name: torch.zeros(shape) for name, shape in parameter_shapes(BASE).items()}
        parts |= {"output.weight": found, "norm.weight": Evil()}
        shutil.rmtree(weights)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save({"model": parts}, checkpoint_id=str(weights), no_dist=True)
        sealed(folder)


def sealed(folder: Path) -> None:
    """Write a manifest that fits what is there."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    entries = {name: checkpoint.digest(path) for name, path in files.items() if name != "manifest.json"}
    (folder / "manifest.json").write_text(json.dumps({"format": 2, "files": entries}))


class Evil:
    """Unpickled, it says so on the terminal."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("echo executed",)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("cut short", " bytes, not "),
        ("a flipped bit", "weights/__0_0.distcp has another content"),
        ("absent", "weights/__0_0.distcp: No such file"),
        ("no metadata", "weights/.metadata: No such file"),
        ("no manifest", "No such file"),
        ("torn manifest", "manifest.json cannot be read"),
        ("an older version", "format 1; expected format 2"),
        ("another version", "format 9"),
        ("evil metadata", "posix.system, which is no part of a checkpoint"),
        ("torn settings", "config.yaml"),
        ("torn origin", "weights.json"),
        ("evil entry", "no tensor norm.weight"),
    ],
)
def test_a_damaged_or_hostile_run_is_refused_and_runs_nothing(
    kind: str, said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_base(tmp_path / "base")
    line = line_from(tmp_path, tmp_path / "base", *SLOTS, "train.max_steps=1")
    run_ranks(go, 2, line)
    damaged(checkpoint.path_of(tmp_path / "run", 1), kind)
    settings = ExportConfig(weights=str(tmp_path / "run"), out=str(tmp_path / "out"))
    with pytest.raises(CheckpointError) as caught:
        export.main(settings)
    assert str(tmp_path / "run") in str(caught.value)
    assert said in str(caught.value)
    assert not (tmp_path / "out").exists()
    if kind != "torn origin":  # which a run that goes on does not read
        for message in run_ranks(refused, 2, [*line, "train.max_steps=2"]):
            assert message
    assert "executed" not in capfd.readouterr().out


def save_several(line: list[str], saves: list[tuple[int, dict[str, Any]]]) -> None:
    """Save checkpoints of a run of random weights, each of its own, as training would."""
    settings = compose(line)
    with distributed.start(timeout_seconds=60, replicate=1, threads=1, deterministic=False) as ranks:
        for step, how in saves:
            model = build(
                settings.model.transformer(), attention_backend="sdpa", mesh=ranks.mesh, device=ranks.device,
                compute_dtype=torch.float32, activation_checkpointing="none", reshard_after_forward=True, seed=step,
            )  # fmt: skip
            save = Saver(Path(str(settings.run_dir)), settings.checkpoint, ranks)
            state = TrainState(step=step, refused=[], data_key="")
            save.begin(model, build_optimizer(model, settings.optim), state, **how)
            save.wait()


EPOCH = {"names": ("epoch-1",), "alone": True}


def run_with(tmp_path: Path, saves: list[tuple[int, dict[str, Any]]]) -> Path:
    """A run's folder with checkpoints in it, and its tokenizer."""
    line = overrides(tmp_path, "checkpoint.keep_last=null", "checkpoint.asynchronous=false")
    run_ranks(save_several, 2, line, saves)
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(compose(line)))
    train_tokenizer(["a"], 261).save(tmp_path / "run" / "tokenizer.json")
    return tmp_path / "run"


def test_a_checkpoint_is_named_by_step_name_or_loss_and_both_kinds_are_found(tmp_path: Path) -> None:
    """Of step 4 there are a complete one and weights alone; step 6 has weights alone."""
    run = run_with(tmp_path, [(2, {}), (4, EPOCH), (4, {}), (6, {"names": ("late",), "alone": True})])
    losses = {2: 3.0, 4: 2.0, 6: 1.0}
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": step, "validation_loss": loss}) + "\n" for step, loss in losses.items())
    )
    expected = {
        "": ("weights-00000006", "@6"), "@6": ("weights-00000006", "@6"),
        "@late": ("weights-00000006", "@late (step 6)"),
        "@best": ("weights-00000006", "@6"), "@4": ("step-00000004", "@4"),
        "@epoch-1": ("weights-00000004", "@epoch-1 (step 4)"), "@00000002": ("step-00000002", "@2"),
    }  # fmt: skip
    for asked, (folder, name) in expected.items():
        found = find(f"{run}{asked}", "weights")
        assert (found.folder.name, found.name) == (folder, f"{run}{name}")
        assert find(found.place, "weights", verify=False).folder == found.folder
    with find(f"{run}@epoch-1", "weights") as rounded, find(f"{run}@4", "weights") as masters:
        assert (rounded.dtype, masters.dtype) == (torch.bfloat16, torch.float32)
        models = [load_model(found, TokenizerFileConfig(), dtype="float32")[0] for found in (rounded, masters)]
        for parameter in parameter_shapes(masters.config):
            value = masters.read(parameter, torch.float32)
            assert torch.equal(rounded.read(parameter, torch.float32), value.bfloat16().float())
            assert torch.equal(models[0].get_parameter(parameter), value.bfloat16().float())
            assert torch.equal(models[1].get_parameter(parameter), value)
    with pytest.raises(CheckpointError) as caught:
        find(f"{run}@early", "weights")
    assert "one of the run's steps: 2, 4, 6; or a name: epoch-1, late" in str(caught.value)


def test_an_export_of_rounded_weights_into_a_wider_dtype_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_with(tmp_path, [(4, EPOCH)])
    said = {}
    for dtype in ("float32", "bfloat16", "float16"):
        export.main(ExportConfig(weights=str(run), out=str(tmp_path / dtype), dtype=dtype))
        said[dtype] = capsys.readouterr().err
    assert "weights are bfloat16 where they lie: float32 holds the same values in more bytes" in said["float32"]
    assert said["bfloat16"] == ""
    assert said["float16"] == "weights are rounded from bfloat16 to float16; dtype=bfloat16 keeps them\n"
    found = find(str(run), "weights")
    assert torch.equal(HFFolder(tmp_path / "float32").read("output.weight"), found.read("output.weight", torch.float32))


def test_what_is_in_use_is_not_pruned_and_is_when_it_is_closed_or_forgotten(tmp_path: Path) -> None:
    run = run_with(tmp_path, [(1, {}), (2, {}), (3, {})])
    config = CheckpointConfig(keep_last=1, keep_best=0)
    forgotten = find(f"{run}@2", "weights")
    with find(f"{run}@1", "weights"):
        assert saver.prune(run, config) == []
        assert checkpoint.steps(run) == [1, 2, 3]
    assert forgotten.folder.exists()
    del forgotten
    assert saver.prune(run, config) == []
    assert checkpoint.steps(run) == [3]


def test_a_checkpoint_that_is_pruned_while_it_is_looked_for_is_looked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it happens to who asks for the newest: by the time that it is locked it is an old one, and gone."""
    run = run_with(tmp_path, [(1, {}), (2, {}), (3, {})])
    real = checkpoint.reading

    def too_late(folder: Path) -> Any:
        if folder.name != "step-00000001":
            shutil.rmtree(folder)
        return real(folder)

    monkeypatch.setattr(checkpoint, "reading", too_late)
    assert find(str(run), "weights").name == f"{run}@1"
    with pytest.raises(CheckpointError, match=r"found no checkpoint .*@3; expected one of the run's steps: 1"):
        find(f"{run}@3", "weights")


def test_a_damaged_checkpoint_is_named_with_its_file_and_another_one_that_is_whole(tmp_path: Path) -> None:
    run = run_with(tmp_path, [(1, {}), (2, {}), (3, {}), (3, EPOCH)])
    file = checkpoint.path_of(run, 3) / "weights" / "__1_0.distcp"
    content = file.read_bytes()
    file.write_bytes(content[:-7])
    damaged(checkpoint.path_of(run, 2), "a flipped bit")
    (checkpoint.path_of(run, 1) / "optimizer" / "__0_0.distcp").write_bytes(b"")  # nobody reads that here
    expected = (
        f"{file.parents[1]}: found a damaged checkpoint (weights/__1_0.distcp has {len(content) - 7:,} bytes, not "
        f"{len(content):,}); expected what its manifest says.\n  {run}@1 is whole."
    )
    for weights in (str(run), f"{run}@3"):
        with pytest.raises(CheckpointError) as caught:
            find(weights, "weights")
        assert str(caught.value) == expected
    assert find(f"{run}@epoch-1", "weights").dtype == torch.bfloat16
    assert find(f"{run}@3", "weights", verify=False).place == f"{run}@3"
    damaged(checkpoint.path_of(run, 1), "absent")
    with pytest.raises(CheckpointError, match="The run has no other that is whole"):
        find(str(run), "weights")


def test_a_run_on_a_disk_that_cannot_be_written_is_read(tmp_path: Path) -> None:
    """In a mount of its own, which ends with the process; the lock needs no more than a file that can be opened."""
    run = run_with(tmp_path, [(1, {})])
    code = (
        "import errno, pathlib, sys, torch; from magnum_train.weights import find\n"
        "try: pathlib.Path(sys.argv[1], 'x').touch(); raise SystemExit('it can be written')\n"
        "except OSError as error: assert error.errno == errno.EROFS\n"
        "with find(sys.argv[1], 'weights') as found: print(found.read('norm.weight', torch.float32).sum().item())"
    )
    mounted = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && exec "$2" -c "$3" "$1"'
    try:
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", mounted, "sh", str(run), sys.executable, code], cwd=HOME,
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        pytest.skip("no unshare here to mount with")
    if "mount" in done.stderr or "unshare" in done.stderr:
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
    assert (done.returncode, done.stdout) == (0, "40.0\n"), done.stderr


def test_the_best_checkpoint_is_that_of_the_lowest_validation_loss(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    line = line_from(
        tmp_path, tmp_path / "base", *SLOTS, "train.max_steps=3", "checkpoint.every_steps=1",
        "validation.every_steps=1",
    )  # fmt: skip
    run_ranks(go, 1, line)
    file = tmp_path / "run" / "metrics.jsonl"
    rows = [json.loads(row) for row in file.read_text().splitlines()]
    for row in rows:
        if "validation_loss" in row:
            row["validation_loss"] = {1: 3.0, 2: 1.0, 3: 2.0}[row["step"]]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "validation_lo')  # torn by a kill
    assert find(f"{tmp_path / 'run'}@best", "weights").name == f"{tmp_path / 'run'}@2"
    assert find(f"{tmp_path / 'run'}/", "weights").name.endswith("@3")
    file.write_text("")
    with pytest.raises(CheckpointError, match="no validation loss for a checkpoint"):
        find(f"{tmp_path / 'run'}@best", "weights")
    for weights, said in (
        (f"{tmp_path / 'run'}@", "no checkpoint"),
        (f"{tmp_path / 'run'}@7", "one of the run's steps: 1, 2, 3"),
        (str(checkpoint.path_of(tmp_path / "run", 2)), f"Name it {tmp_path / 'run'}@2."),
        (str(file), "metrics.jsonl, a file"),
    ):
        with pytest.raises(CheckpointError) as caught:
            find(weights, "weights")
        assert said in str(caught.value)


def test_export_at_end_leaves_a_folder_once(tmp_path: Path) -> None:
    write_base(tmp_path / "base", dtype=torch.bfloat16)
    line = line_from(tmp_path, tmp_path / "base", *SLOTS, "train.max_steps=2", "train.export_at_end=true")
    run_ranks(go, 2, line)
    out = tmp_path / "run" / "exports" / "step-00000002"
    assert json.loads((out / "config.json").read_text())["max_position_embeddings"] == 4096
    stamp = (out / "config.json").stat().st_mtime_ns
    run_ranks(go, 2, line)
    assert (out / "config.json").stat().st_mtime_ns == stamp
    shutil.rmtree(out)
    run_ranks(go, 1, line)  # a complete run makes up for it
    folder, run = HFFolder(out), find(str(tmp_path / "run"), "weights")
    for name, _ in Transformer(BASE).named_parameters():
        assert torch.equal(folder.read(name), run.read(name, torch.bfloat16)), name


def save_large(run_dir: str) -> None:
    """A run's checkpoint of 150 MB of weights, by four ranks."""
    with distributed.start(timeout_seconds=60, replicate=1, threads=1, deterministic=False) as ranks:
        model = empty(ranks.mesh, config=LARGE)
        for parameter in model.parameters():
            torch.nn.init.ones_(parameter)
        save = Saver(Path(run_dir), CheckpointConfig(asynchronous=False), ranks)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        save.begin(model, optimizer, TrainState(step=1, refused=[], data_key=""))


MEASURE = """
import resource, sys
from pathlib import Path
import torch
from data import Tokenizer
from magnum_train.export import export
from magnum_train.weights import Weights
from base_models import LARGE
tokenizer = Tokenizer.from_file(sys.argv[2] + "/tokenizer.json", im_start_slot=3, im_end_slot=4)
found = Weights("a run", "", Path(sys.argv[1]), LARGE, 4096, Path(sys.argv[2]), torch.float32, None)
found.read("norm.weight", torch.bfloat16)  # the library's own start
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
export(found, tokenizer, Path(sys.argv[3]), torch.bfloat16, 10 * 10**6)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)
"""


def test_an_export_holds_one_shard_whatever_the_run_weighs(tmp_path: Path) -> None:
    """Shards of 10 MB of 75 MB in bfloat16; a rank's part of the largest tensor, 5 MB, is read on top of it."""
    write_base(tmp_path / "base")
    run_ranks(save_large, 4, str(tmp_path / "run"))
    folder = checkpoint.path_of(tmp_path / "run", 1)
    paths = f"{HOME}:{HOME / 'tests'}"
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), str(tmp_path / "base"), str(tmp_path / "out")],
        capture_output=True, text=True, timeout=100, check=True, env=os.environ | {"PYTHONPATH": paths},
    )  # fmt: skip
    assert sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")) > 70e6
    assert int(done.stdout) < 35e6
