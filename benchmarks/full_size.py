"""A rehearsal at full size without a GPU: `python benchmarks/full_size.py OUT_FOLDER`.

Writes a synthetic checkpoint of Mistral-Nemo 12B (random bfloat16, five shards, 24.5 GB), loads the eighth of it that
one rank of eight would keep, and exports the folder again. Each part runs in a process of its own, whose peak memory is
measured by the operating system: what is resident, the pages of mapped files among it, and what is anonymous.

It needs 60 GB of disk in OUT_FOLDER and says so where they are not there; the two checkpoints are removed at the end.
The record is OUT_FOLDER/full_size.json, and the table is printed.
"""

import argparse
import filecmp
import hashlib
import json
import multiprocessing
import os
import platform
import resource
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HOME = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HOME))
DISK = 60 * 10**9
RANK, WORLD = 3, 8


def memory(kind: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) * 1024
    return 0


class AnonymousPeak:
    """The most anonymous memory (no mapped files) while a part runs, looked at every 10 ms."""

    def __enter__(self) -> "AnonymousPeak":
        self.before = self.peak = memory("RssAnon")
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.peak = max(self.peak, memory("RssAnon"))

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def measured(part: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Run a part in a fresh process; what it returns, with its seconds and peaks added."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_timed, (part, *arguments))


def _timed(part: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    import model.hf  # noqa: F401  # its import is no part of what is measured

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    begin = time.perf_counter()
    with AnonymousPeak() as anonymous:
        result = part(*arguments)
    return {
        **result,
        "seconds": time.perf_counter() - begin,
        "resident_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before,
        "anonymous_peak_bytes": anonymous.peak - anonymous.before,
    }


def nemo() -> Any:
    """The 12B's shape."""
    from model import TransformerConfig

    return TransformerConfig(
        dim=5120, n_layers=40, n_heads=32, n_kv_heads=8, head_dim=128, hidden_dim=14336, vocab_size=131072
    )


def write(folder: str) -> dict[str, Any]:
    """Write the synthetic checkpoint; every tensor differs, by a seed from its name."""
    import torch

    from model.config import parameter_shapes
    from model.hf import config_to_hf, write_json, write_weights, written_aside

    config = nemo()
    shapes = parameter_shapes(config)
    block = torch.randn(2**24, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()

    def values(name: str) -> torch.Tensor:
        # Drawing 12 billion numbers would take longer than all the rest: one block, begun at a place of its own.
        start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % block.numel()
        size = torch.Size(shapes[name]).numel()
        turned = block.roll(-start)
        return turned.repeat(-(-size // block.numel()))[:size].reshape(shapes[name])

    with written_aside(folder) as aside:
        write_weights(aside, config, torch.bfloat16, values)
        fields = {"max_position_embeddings": 131072}
        write_json(aside / "config.json", config_to_hf(config, torch.bfloat16) | fields)
    files = sorted(Path(folder).glob("*.safetensors"))
    return {"files": len(files), "bytes": sum(file.stat().st_size for file in files)}


def load(folder: str, compare: bool) -> dict[str, Any]:
    """Build on the meta device, shard as FSDP does, and load one rank's part, without the other seven.

    Comparing reads whole tensors, so it is left out where memory is measured.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from magnum_train.parallelize import build
    from model.hf import HFFolder, load_hf

    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=WORLD)
    opened = HFFolder(folder)
    model = build(
        opened.config, attention_backend="sdpa", device=torch.device("cpu"), compute_dtype=torch.float32,
        mesh=init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("replicate", "shard")),
        activation_checkpointing="none", reshard_after_forward=True, seed=None,
    )  # fmt: skip
    load_hf(model, opened)
    locals_ = {name: p.detach().to_local() for name, p in model.named_parameters()}  # type: ignore[attr-defined]
    result = {"share_bytes": sum(p.numel() * p.element_size() for p in locals_.values())}
    if compare:
        wrong = [n for n, p in locals_.items() if not torch.equal(p, opened.read(n).chunk(WORLD)[RANK].float())]
        result |= {"tensors": len(locals_), "wrong_tensors": len(wrong)}
    dist.destroy_process_group()
    return result


def export(folder: str, out: str) -> dict[str, Any]:
    """Export it, with Nemo's own vocabulary, ChatML on slots 14 and 15."""
    import mistral_common
    import torch

    from data import Tokenizer
    from magnum_train.export import export as export_weights
    from magnum_train.weights import find
    from model.hf import MAX_SHARD_BYTES

    tokenizer = Tokenizer.from_file(Path(mistral_common.__file__).parent / "data" / "tekken_240718.json")
    export_weights(find(folder, "weights"), tokenizer, Path(out), torch.bfloat16, MAX_SHARD_BYTES)
    names = sorted(path.name for path in Path(out).glob("*.safetensors"))
    return {"files": len(names), "largest_file_bytes": max((Path(out) / name).stat().st_size for name in names)}


def table(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    rows = ["| part | seconds | resident peak, GB | of it anonymous, GB |", "|---|---|---|---|"]
    for name, part in record["parts"].items():
        peaks = f"{part['resident_peak_bytes'] / 1e9:.2f} | {part['anonymous_peak_bytes'] / 1e9:.2f}"
        rows.append(f"| {name} | {part['seconds']:.0f} | {peaks} |")
    loaded = record["parts"]["load one rank of eight"]
    over = (loaded["resident_peak_bytes"] - loaded["share_bytes"]) / 2**30
    compared, files = record["parts"]["compare"], record["parts"]["write"]["files"]
    rows.append(
        f"\nThe rank's share is {loaded['share_bytes'] / 1e9:.2f} GB in float32; loading held {over:.2f} GiB more. "
        f"{compared['wrong_tensors']} of its {compared['tensors']} tensors differ from the file. "
        f"{record['identical_files']} of {files} exported shards are the bytes that were read."
    )
    return "\n".join(rows)


def main() -> int:
    """Run the parts; 0 if the loaded and the exported weights are those that were written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(out).free) < DISK:
        print(f"not run: {free / 1e9:.0f} GB free in {out}, {DISK / 1e9:.0f} GB are needed")
        return 0
    work = out / "full_size_work"
    base, exported = work / "base", work / "exported"
    shutil.rmtree(work, ignore_errors=True)
    try:
        parts = {"write": measured(write, str(base))}
        parts["load one rank of eight"] = measured(load, str(base), False)
        parts["compare"] = measured(load, str(base), True)
        parts["export"] = measured(export, str(base), str(exported))
        names = sorted(path.name for path in base.glob("*.safetensors"))
        same = sum(filecmp.cmp(base / name, exported / name, shallow=False) for name in names)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    import torch

    record = {
        "date": time.strftime("%Y-%m-%d"), "python": platform.python_version(), "torch": torch.__version__,
        "cores": os.cpu_count(), "identical_files": same, "parts": parts,
    }  # fmt: skip
    (out / "full_size.json").write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))
    return int(parts["compare"]["wrong_tensors"] > 0 or same != len(names))


if __name__ == "__main__":
    raise SystemExit(main())
