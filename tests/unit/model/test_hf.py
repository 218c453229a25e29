"""Weights and configuration to and from Hugging Face's layout, with transformers as the other side."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from model import Transformer
from model.config import parameter_shapes
from model.hf import (
    HFFolder,
    config_from_hf,
    config_to_hf,
    hf_name,
    load_hf,
    save_hf,
    write_weights,
    written_aside,
)
from models import TINY, assert_close, tiny_model, tiny_pack, without_labels

HOME = Path(__file__).parents[3]
SMALL_SHARD = 100_000  # bytes: the tiny network's 330,000 parameters need over a dozen files
NEMO_FIELDS = {
    "architectures": ["MistralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 128000,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 40,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 131072,
}


def transformers_model(seed=0):
    torch.manual_seed(seed)
    return MistralForCausalLM(MistralConfig(**config_to_hf(TINY, torch.float32))).eval()


def edit(folder, change):
    """Rewrite a single file of weights."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_every_parameter_has_a_name_of_its_own_on_the_other_side():
    assert sorted(hf_name(name) for name in parameter_shapes(TINY)) == sorted(transformers_model().state_dict())


@pytest.mark.parametrize("form", ["older", "transformers 5"])
def test_nemos_configuration_is_read_in_both_forms(form):
    fields = dict(NEMO_FIELDS)
    if form == "transformers 5":
        fields["rope_parameters"] = {"rope_theta": fields.pop("rope_theta"), "rope_type": "default"}
        fields["dtype"] = fields.pop("torch_dtype")
    config = config_from_hf(fields)
    assert (config.dim, config.head_dim, config.n_heads, config.n_kv_heads) == (5120, 128, 32, 8)
    assert (config.n_layers, config.hidden_dim, config.vocab_size) == (40, 14336, 131072)
    assert (config.norm_eps, config.rope_theta) == (1e-5, 1e6)


def test_configuration_written_is_the_one_read():
    assert config_from_hf(json.loads(json.dumps(config_to_hf(TINY, torch.bfloat16)))) == TINY


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type: found 'llama', expected 'mistral'"),
        ({"architectures": ["MixtralForCausalLM"]}, r"architectures: found \['MixtralForCausalLM'\]"),
        ({"hidden_act": "gelu"}, "hidden_act: found 'gelu'"),
        ({"sliding_window": 4096}, "sliding_window: found 4096, expected None"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings: found True"),
        ({"attention_dropout": 0.1}, "attention_dropout: found 0.1"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type: found 'linear'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope type: found 'yarn'"),
        ({"head_dim": None}, "found no value for head_dim"),
        ({"rope_theta": None}, "found no value for rope_theta"),
        ({"num_attention_heads": "32"}, "num_attention_heads: found '32', expected a whole number"),
        ({"hidden_size": 5120.0}, r"hidden_size: found 5120\.0, expected a whole number"),
        ({"vocab_size": True}, "vocab_size: found True, expected a whole number"),
        ({"vocab_size": -1}, "vocab_size: found -1, expected at least 1"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps: found 'tiny', expected a number"),
        ({"rope_scaling": [1]}, r"rope_scaling: found \[1\], expected an object"),
        ({"architectures": "MistralForCausalLM"}, "architectures: found 'MistralForCausalLM', expected"),
    ],
)
def test_what_the_network_does_not_compute_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf(NEMO_FIELDS | change)


@pytest.mark.parametrize("shard", [SMALL_SHARD, 10**9], ids=["sharded", "single file"])
def test_weights_saved_by_transformers_give_equal_logits(tmp_path, shard):
    theirs = transformers_model()
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == SMALL_SHARD)
    ours = Transformer(TINY)
    load_hf(ours, tmp_path)
    pack = without_labels(tiny_pack([21]))
    assert_close(ours(**pack), theirs(pack["tokens"][None]).logits[0], 1e-5)


@pytest.mark.parametrize("shard", [SMALL_SHARD, 10**9], ids=["sharded", "single file"])
def test_weights_saved_by_us_load_in_transformers_without_a_word(tmp_path, shard):
    ours = tiny_model()
    save_hf(ours, tmp_path / "export", max_shard_bytes=shard, fields={"bos_token_id": 1})
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not any(info.values()), info
    assert theirs.config.bos_token_id == 1
    pack = without_labels(tiny_pack([21]))
    assert_close(ours(**pack), theirs(pack["tokens"][None]).logits[0], 1e-5)


def test_weights_may_be_read_by_whoever_may_read_the_configuration(tmp_path):
    save_hf(tiny_model(), tmp_path / "export")
    modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "export").iterdir()}
    assert len(modes) == 1


def test_shards_keep_to_their_size_and_say_their_format(tmp_path):
    save_hf(tiny_model(), tmp_path / "export", max_shard_bytes=SMALL_SHARD)
    index = json.loads((tmp_path / "export" / "model.safetensors.index.json").read_text())
    sizes = []
    for path in sorted((tmp_path / "export").glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            names = list(file.keys())
        assert {index["weight_map"][name] for name in names} == {path.name}
        tensors = load_file(path)
        sizes.append(sum(tensor.nbytes for tensor in tensors.values()))
        assert sizes[-1] <= SMALL_SHARD or len(names) == 1
    assert index["metadata"]["total_size"] == sum(sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_round_trip_keeps_every_bit(tmp_path, dtype):
    first = tiny_model(dtype)
    save_hf(first, tmp_path / "export", max_shard_bytes=SMALL_SHARD)
    second = Transformer(TINY).to(dtype)
    load_hf(second, tmp_path / "export")
    for (name, ours), (_, theirs) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_float32_parameters_take_bfloat16_weights_and_save_as_asked(tmp_path):
    save_hf(tiny_model(), tmp_path / "narrow", dtype=torch.bfloat16)
    wide = Transformer(TINY)
    load_hf(wide, tmp_path / "narrow")
    assert wide.output.weight.dtype == torch.float32
    assert torch.equal(wide.output.weight, tiny_model().output.weight.bfloat16().float())


def test_a_sharded_parameter_receives_its_slice_alone(tmp_path):
    """A pretended group of two ranks, seen from the second; 515 rows divide unevenly."""
    save_hf(tiny_model(), tmp_path / "export")
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        model = Transformer(TINY)
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                sharded = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
                setattr(module, name, torch.nn.Parameter(sharded))
        load_hf(model, tmp_path / "export")
        for (name, whole), (_, part) in zip(tiny_model().named_parameters(), model.named_parameters(), strict=True):
            assert isinstance(part, DTensor)
            assert torch.equal(part.to_local(), whole.chunk(2)[1]), name
    finally:
        dist.destroy_process_group()


def test_saving_after_a_forward_alone_writes_the_masters(tmp_path):
    """A forward without a backward leaves bfloat16 copies where the sharded float32 parameters were."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=False)
        model = fully_shard(tiny_model(), mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
        with torch.no_grad():
            model(**tiny_pack([4]))
        save_hf(model, tmp_path / "export")
    finally:
        dist.destroy_process_group()
    second = Transformer(TINY)
    load_hf(second, tmp_path / "export")
    assert torch.equal(second.tok_embeddings.weight, tiny_model().tok_embeddings.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("lm_head.weight"), r"found no lm_head\.weight, expected 30 parameters"),
        (
            lambda t: t.update({"extra": torch.zeros(1)}),
            r"found extra \(in model\.safetensors\), expected no tensor that the network does not have",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(79)}),
            r"found model\.norm\.weight of shape \[79\] in model\.safetensors, expected \[80\]",
        ),
    ],
    ids=["missing", "surplus", "misshapen"],
)
def test_weights_that_do_not_fit_are_refused_before_any_is_copied(tmp_path, change, message):
    save_hf(tiny_model(), tmp_path / "export")
    edit(tmp_path / "export", change)
    model = tiny_model(seed=1)
    with pytest.raises(ValueError, match=message):
        load_hf(model, tmp_path / "export")
    assert torch.equal(model.tok_embeddings.weight, tiny_model(seed=1).tok_embeddings.weight)


def test_another_configuration_is_refused_with_the_fields_that_differ(tmp_path):
    save_hf(tiny_model(), tmp_path / "export")
    with pytest.raises(ValueError, match="found norm_eps 1e-05 in the weights, 1e-06 in the model"):
        load_hf(Transformer(replace(TINY, norm_eps=1e-6)), tmp_path / "export")


@pytest.mark.parametrize(
    ("absent", "message"),
    [
        ("config.json", "found no config.json"),
        ("model.safetensors.index.json", "found neither model.safetensors.index.json nor model.safetensors"),
        ("model-00002-of-*.safetensors", "found no model-00002-of-.*, expected it"),
    ],
)
def test_an_absent_file_is_named(tmp_path, absent, message):
    save_hf(tiny_model(), tmp_path / "export", max_shard_bytes=SMALL_SHARD)
    next((tmp_path / "export").glob(absent)).unlink()
    with pytest.raises(ValueError, match=message):
        load_hf(Transformer(TINY), tmp_path / "export")


def sharded(folder):
    """A folder of several files, and the second of them."""
    save_hf(tiny_model(), folder, max_shard_bytes=SMALL_SHARD)
    return sorted(folder.glob("model-*.safetensors"))[1]


def retyped(file, dtype):
    """Rewrite one tensor of a file in another dtype; its name."""
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name].to(dtype)}, file, metadata={"format": "pt"})
    return name


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-100]), "file not fully covered"),
        (lambda file: file.write_bytes(file.read_bytes()[:5]), "header too small"),
        (lambda file: file.write_bytes(b"\x10" + bytes(7) + b"{not json}......" + bytes(64)), "invalid JSON in header"),
        (lambda file: file.write_bytes(b"PK\x03\x04" + bytes(200)), "invalid header length"),
    ],
    ids=["truncated", "header cut", "header corrupt", "another format"],
)
def test_a_damaged_file_is_named_before_anything_is_copied(tmp_path, damage, message):
    file = sharded(tmp_path / "export")
    damage(file)
    model = tiny_model(seed=1)
    with pytest.raises(ValueError, match=rf"{file.name}: found a file that cannot be read \(.*{message}"):
        load_hf(model, tmp_path / "export")
    assert torch.equal(model.tok_embeddings.weight, tiny_model(seed=1).tok_embeddings.weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn, torch.bfloat16], ids=str)
def test_a_tensor_of_another_dtype_is_named_with_its_file(tmp_path, dtype):
    file = sharded(tmp_path / "export")
    name = retyped(file, dtype)
    with pytest.raises(ValueError, match=rf"found {name} of dtype .* in {file.name}, expected float32 in every"):
        load_hf(Transformer(TINY), tmp_path / "export")


def test_a_dtype_that_the_configuration_does_not_declare_is_refused(tmp_path):
    save_hf(tiny_model(), tmp_path / "export", fields={"torch_dtype": "bfloat16"})
    with pytest.raises(ValueError, match=r"and 27 more, expected bfloat16 in every tensor as config\.json says"):
        load_hf(Transformer(TINY), tmp_path / "export")
    save_hf(tiny_model(), tmp_path / "silent", fields={"torch_dtype": None})
    assert HFFolder(tmp_path / "silent").dtype == torch.float32


def reindexed(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m.pop("model.norm.weight"),
            r"model-\d+-of-\d+\.safetensors: found model\.norm\.weight in it and not in",
        ),
        (
            lambda m: m.update({"model.norm.weight": m["model.embed_tokens.weight"]}),
            r"model-00001-of-\d+\.safetensors: found model\.norm\.weight not in it",
        ),
        (lambda m: m.update({"x": "../../secret.safetensors"}), r"found '\.\./\.\./secret\.safetensors' for x"),
        (lambda m: m.clear(), "found no weight_map"),
    ],
    ids=["unlisted", "elsewhere", "outside", "empty"],
)
def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path, change, message):
    sharded(tmp_path / "export")
    reindexed(tmp_path / "export", change)
    with pytest.raises(ValueError, match=message):
        HFFolder(tmp_path / "export")


def test_pickled_weights_are_not_opened(tmp_path):
    save_hf(tiny_model(), tmp_path / "export")
    (tmp_path / "export" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "export" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"beside pytorch_model\.bin, expected one of them; convert pickled weights"):
        HFFolder(tmp_path / "export")


def test_a_larger_vocabulary_is_filled_with_zeros_only_where_it_is_asked_for(tmp_path):
    save_hf(tiny_model(), tmp_path / "export")
    model = Transformer(replace(TINY, vocab_size=TINY.vocab_size + 2))
    with pytest.raises(ValueError, match="found vocab_size 515 in the weights, 517 in the model"):
        load_hf(model, tmp_path / "export")
    load_hf(model, tmp_path / "export", new_rows=True)
    for matrix in ("tok_embeddings", "output"):
        weight = getattr(model, matrix).weight
        assert torch.equal(weight[:-2], getattr(tiny_model(), matrix).weight)
        assert not weight[-2:].any()
    with pytest.raises(ValueError, match="found vocab_size 515 in the weights, 500 in the model"):
        load_hf(Transformer(replace(TINY, vocab_size=500)), tmp_path / "export", new_rows=True)


def test_a_parameter_is_the_same_however_small_the_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("model.hf.PIECE_BYTES", 1000)  # three rows
    save_hf(tiny_model(), tmp_path / "export")
    model = Transformer(TINY)
    load_hf(model, tmp_path / "export")
    for (name, loaded), expected in zip(model.named_parameters(), tiny_model().parameters(), strict=True):
        assert torch.equal(loaded, expected), name


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_configuration_that_is_no_object_is_named(tmp_path, text):
    save_hf(tiny_model(), tmp_path / "export")
    (tmp_path / "export" / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json: found .*expected an object"):
        load_hf(Transformer(TINY), tmp_path / "export")


MEASURE = """
import resource, sys
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from model import Transformer
from model.hf import HFFolder, load_hf
dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=8)
folder = HFFolder(sys.argv[1])
with torch.device("meta"):
    model = Transformer(folder.config)
fully_shard(model, mesh=init_device_mesh("cpu", (8,)))
model.to_empty(device="cpu")
for parameter in model.parameters():
    parameter.detach().to_local().zero_()  # its pages belong to the model
share = sum(p.detach().to_local().numel() * 4 for p in model.parameters())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
load_hf(model, folder)
print(share, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)
"""


def test_one_of_eight_ranks_reads_its_eighth_and_holds_a_piece(tmp_path):
    """400 MB of float32 on disk. The peak counts the file's mapped pages; 40 MB are left for the allocator."""
    config = replace(TINY, dim=512, hidden_dim=2048, vocab_size=80_000, n_layers=4)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Transformer(config).named_parameters()}
    with written_aside(tmp_path / "export") as aside:
        write_weights(aside, config, torch.float32, lambda name: torch.ones(shapes[name]), 10**8)
        (aside / "config.json").write_text(json.dumps(config_to_hf(config, torch.float32)))
    assert sum(file.stat().st_size for file in (tmp_path / "export").iterdir()) > 380e6
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "export")],
        capture_output=True, text=True, timeout=100, check=True, env=os.environ | {"PYTHONPATH": str(HOME)},
    )  # fmt: skip
    share, peak = map(int, done.stdout.split())
    assert 45e6 < share < 55e6
    assert peak < 60e6  # of the largest tensor's eighth 20 MB are mapped at once; whole tensors would be 164 MB


def test_mistrals_own_file_beside_the_weights_is_left_alone(tmp_path):
    save_hf(tiny_model(), tmp_path / "export")
    save_file({"norm.weight": torch.zeros(1)}, tmp_path / "export" / "consolidated.safetensors")
    load_hf(Transformer(TINY), tmp_path / "export")


def test_an_existing_folder_is_not_overwritten(tmp_path):
    with pytest.raises(ValueError, match="found it there already, expected none"):
        save_hf(tiny_model(), tmp_path)


def test_an_interrupted_save_leaves_no_folder_under_its_name(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("model.hf.save_file", fail)
    with pytest.raises(ValueError, match="export: found disk full, expected to write"):
        save_hf(tiny_model(), tmp_path / "export")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    save_hf(tiny_model(), tmp_path / "export")
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_full_disk_is_named_and_nothing_is_left(tmp_path):
    """No file of the process may pass the limit, which the system reports like a disk without room."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16));"
        "from model.hf import save_hf; from models import tiny_model;"
        "save_hf(tiny_model(), sys.argv[1], max_shard_bytes=60_000)"
    )  # the first matrix is larger than a shard may be
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "export")],
        capture_output=True, text=True, timeout=100, check=False,
        env=os.environ | {"PYTHONPATH": f"{HOME}:{HOME / 'tests'}"},
    )  # fmt: skip
    assert re.search(r"ValueError: .*model-00001-of-\d+\.safetensors: found .*too large.*, expected room", done.stderr)
    assert not list(tmp_path.iterdir())


def test_a_place_that_refuses_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"found Not a directory, expected to write .*file/export there"):
        save_hf(tiny_model(), tmp_path / "file" / "export")


def test_a_caller_that_does_not_write_leaves_nothing(tmp_path):
    save_hf(tiny_model(), tmp_path / "export", write=False)
    assert not list(tmp_path.iterdir())
