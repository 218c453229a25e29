"""Ranks that share a pack compute what one rank computes on the whole of it."""

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_resume import resume_errors
from test_split import assert_same, started
from test_streaming import streamed_line
from torch import Tensor, nn

from data import Example, PackedBatch
from data.batch import assemble
from magnum_train import checkpoint, distributed, flight, sequence
from magnum_train.config import compose
from magnum_train.errors import ConfigError
from magnum_train.loop import launch, read
from magnum_train.parallelize import build
from magnum_train.step import forward, losses_by_row
from magnum_train.train import check_divisible
from model import Transformer, TransformerConfig
from model.attention import attention
from model.rope import rotary_tables
from model.transformer import Block, Documents, init_weights
from models import assert_all_close, assert_close
from ranks import run_ranks
from tiny_runs import metrics, overrides, run_until, series

# Two query heads to a key-value head, four of which can be shared out over four ranks.
CONFIG = TransformerConfig(dim=80, n_layers=2, n_heads=8, n_kv_heads=4, head_dim=32, hidden_dim=96, vocab_size=515)
T, SEED = 128, 7


def packs() -> list[PackedBatch]:
    """Documents over the ends of parts, labels in the first quarter alone, padding at the end, and padding alone."""
    draw = np.random.default_rng(0)

    def document(length: int, weighted: int) -> Example:
        weights = (draw.random(length) * (np.arange(length) < weighted)).astype(np.float32)
        weights[0] = 0
        return Example(draw.integers(1, CONFIG.vocab_size, length).astype(np.int32), weights, 0.5 + draw.random())

    whole = [document(n, n) for n in (50, 37, 41)]
    padded = [document(n, n) for n in (20, 1, 13)]
    return [assemble(pack, T, 8) for pack in (whole, [document(T, 30)], padded, [])]


def scaled(model: nn.Module) -> None:
    """Sharper attention than fresh weights give, so that every head and position matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(2)


def total_weight() -> float:
    return float(sum(pack.weights.double().sum() for pack in packs()))


def on_one_rank() -> tuple[float, dict[str, Tensor], list[Tensor]]:
    """The step's loss, its gradients and the rows of each pack: whole packs through a model that is not sharded."""
    model = Transformer(CONFIG, "sdpa")
    init_weights(model, SEED)
    scaled(model)
    loss, rows = 0.0, []
    for pack in packs():
        found = forward(model, pack)
        (found.total / total_weight()).backward()  # type: ignore[no-untyped-call]
        loss += found.total.item() / total_weight()
        rows.append(losses_by_row(found, pack))
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, rows


def on_ranks(sharers: int, replicate: int, checkpointing: str) -> tuple[float, dict[str, Tensor], list[Tensor]]:
    """The same of this rank's parts, summed as a step does it; the rows of its own packs."""
    with distributed.start(
        timeout_seconds=60, replicate=replicate, sequence=sharers, threads=1, deterministic=False
    ) as ranks:
        model = build(
            CONFIG, attention_backend="sdpa", mesh=ranks.mesh, sequence=ranks.sequence, device=ranks.device,
            compute_dtype=torch.float32, activation_checkpointing=checkpointing, reshard_after_forward=True, seed=SEED,
        )  # fmt: skip
        scaled(model)
        assert ranks.sequence is not None
        group, part = divmod(ranks.rank, sharers)
        loss, rows = torch.zeros((), dtype=torch.float64), []
        for pack in packs()[group :: ranks.world_size // sharers]:
            own = pack.cut(part, sharers)
            found = forward(model, own)
            (found.total / total_weight()).backward()  # type: ignore[no-untyped-call]
            loss += found.total.detach() / total_weight()
            rows.append(losses_by_row(found, own))
            torch.distributed.all_reduce(rows[-1], group=ranks.sequence)
        grads = {
            name.replace("_checkpoint_wrapped_module.", ""): p.grad.full_tensor()  # type: ignore[union-attr]
            for name, p in model.named_parameters()
        }
        return distributed.all_reduce_sum(loss).item(), grads, rows


def norm_of(gradients: dict[str, Tensor]) -> float:
    return float(torch.nn.utils.get_total_norm(list(gradients.values())))


@pytest.mark.parametrize(
    ("world", "sharers", "replicate", "checkpointing"),
    [(2, 2, 1, "none"), (4, 2, 1, "lean"), (4, 4, 1, "none"), (4, 2, 2, "full")],
)
def test_loss_and_gradients_are_those_of_whole_packs(
    world: int, sharers: int, replicate: int, checkpointing: str
) -> None:
    loss, gradients, rows = on_one_rank()
    for rank, (own_loss, own, own_rows) in enumerate(run_ranks(on_ranks, world, sharers, replicate, checkpointing)):
        assert own_loss == pytest.approx(loss, rel=1e-6)
        assert norm_of(own) == pytest.approx(norm_of(gradients), rel=1e-5)
        assert_all_close(own, gradients, 1e-5)
        for found, expected in zip(own_rows, rows[rank // sharers :: world // sharers], strict=True):
            assert_close(found, expected, 1e-6, "losses by row")


def three_steps(line: list[str], sgd: bool) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    """Train three steps as a run does; losses and norms, and the whole weights after them."""
    settings = compose(line)
    parallel = settings.parallel
    with distributed.start(
        timeout_seconds=60, replicate=parallel.replicate, sequence=parallel.sequence, threads=1, deterministic=False
    ) as ranks:
        run = started(settings, ranks)
        if sgd:  # Adam turns the sign of a vanishing gradient into a whole step
            run.optimizer = torch.optim.SGD(run.model.parameters(), lr=1e-3)
        rows: list[dict[str, Any]] = [read(run, launch(run, step), None)[0] for step in (1, 2, 3)]
        weights = {name: p.full_tensor().clone() for name, p in run.model.named_parameters()}  # type: ignore[attr-defined]
        return [(row["loss"], row["grad_norm"]) for row in rows], weights


def test_three_steps_are_those_of_ranks_with_packs_of_their_own(tmp_path: Path) -> None:
    line = overrides(tmp_path, "optim.lr=1", "train.max_grad_norm=null")
    [plain] = run_ranks(three_steps, 1, [*line, f"run_dir={tmp_path}/1"], True)
    shared = ["parallel.sequence=2", f"run_dir={tmp_path}/2"]
    for found in run_ranks(three_steps, 4, [*line, *shared, "parallel.replicate=2"], True):
        assert_same(plain, found)


def test_three_steps_of_adam_with_clipping_are_the_same_too(tmp_path: Path) -> None:
    [plain] = run_ranks(three_steps, 1, overrides(tmp_path, f"run_dir={tmp_path}/1"), False)
    line = overrides(tmp_path, "parallel.sequence=2", f"run_dir={tmp_path}/2")
    for found, _ in run_ranks(three_steps, 2, line, False):
        for (loss, norm), (loss2, norm2) in zip(plain[0], found, strict=True):
            assert (loss2, norm2) == pytest.approx((loss, norm), rel=1e-5)


def named_rows(folder: Path) -> dict[int, list[Any]]:
    """Of each recorded step the packs' documents, in an order that does not depend on who trained them."""
    return {entry["step"]: sorted(sorted(pack) for pack in entry["packs"]) for entry in flight.read(folder)}


def test_a_run_goes_on_with_shared_packs_and_records_the_same(tmp_path: Path) -> None:
    """Losses by step, source and row, validation and samples, where packs are shared from step 6 on."""
    line = overrides(
        tmp_path, "validation.every_steps=4", "samples.every_steps=8", "samples.max_prompts=1",
        "samples.max_new_tokens=8", "train.tokens_per_step=1536", rows=23,
    )  # fmt: skip
    run_ranks(run_until, 2, [*line, f"run_dir={tmp_path}/whole"], 9)
    run_ranks(run_until, 2, line, 7)
    assert checkpoint.steps(tmp_path / "run") == [5]
    said, _ = run_ranks(run_until, 2, [*line, "parallel.sequence=2"], 9)
    said = " ".join(said.split())
    assert "2 ranks, 2 to a pack with 128 tokens each, so 1 pack at a time, x 6 accumulation" in said
    assert "saved with mesh 1 x 2, now 1 x 2, 2 to a pack: what follows agrees to rounding" in said

    whole, shared = series(tmp_path / "whole"), series(tmp_path / "run")
    assert [step for step, *_ in shared] == list(range(1, 10))
    for (_, loss, norm), (_, loss2, norm2) in zip(whole, shared, strict=True):
        assert (loss2, norm2) == pytest.approx((loss, norm), rel=1e-5)
    for one, other in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "run"), strict=True):
        assert other["loss_by_source"] == pytest.approx(one["loss_by_source"], rel=1e-5)
        same = ("tokens", "weighted_tokens", "documents", "fill", "lr")
        assert [other[name] for name in same] == [one[name] for name in same]
    assert beside(tmp_path / "run", "reply") == beside(tmp_path / "whole", "reply")
    assert beside(tmp_path / "run", "validation_loss") == pytest.approx(
        beside(tmp_path / "whole", "validation_loss"), rel=1e-5
    )

    recorded, expected = named_rows(tmp_path / "run" / "flight"), named_rows(tmp_path / "whole" / "flight")
    assert recorded.keys() == {6, 7, 8, 9}
    for step, found in recorded.items():
        for pack, other_pack in zip(found, expected[step], strict=True):
            assert [document[:3] for document in pack] == [document[:3] for document in other_pack]
            assert [loss for *_, loss in pack] == pytest.approx([loss for *_, loss in other_pack], rel=1e-5)


def beside(run_dir: Path, field: str) -> dict[int, Any]:
    """What the rows of a run's record that are not steps say, by step."""
    rows = [json.loads(row) for row in (run_dir / "metrics.jsonl").read_text().splitlines()]
    found = {row["step"]: row[field] for row in rows if field in row}
    assert found
    return found


def test_a_streamed_run_shares_packs_too(tmp_path: Path) -> None:
    line = streamed_line(tmp_path, "train.max_steps=3", "validation.every_steps=null")
    run_ranks(run_until, 1, [*line, f"run_dir={tmp_path}/whole"], None)
    run_ranks(run_until, 2, [*line, "parallel.sequence=2"], None)
    for (_, loss, norm), (_, loss2, norm2) in zip(series(tmp_path / "whole"), series(tmp_path / "run"), strict=True):
        assert (loss2, norm2) == pytest.approx((loss, norm), rel=1e-5)


def several_errors(lines: list[list[str]]) -> list[str]:
    return [resume_errors(line) for line in lines]


def test_what_does_not_divide_is_refused_with_what_would(tmp_path: Path) -> None:
    line = overrides(tmp_path, "train.max_steps=2")
    with pytest.raises(ConfigError, match=r"(?s)data\.pack_tokens: found 256; .* parallel\.sequence = 3\..*=258"):
        compose([*line, "parallel.sequence=3"])
    with pytest.raises(ConfigError, match=r"parallel\.sequence"):
        compose([*line, "parallel.sequence=0"])
    with pytest.raises(ConfigError) as refused:
        check_divisible(3, 4, 256, 2)
    assert "3 packs of 256 on 2 groups of 2 ranks (parallel.sequence=2)" in str(refused.value)
    assert "Try train.tokens_per_step=1024." in str(refused.value)
    with pytest.raises(ConfigError, match=r"(?s)found 3; expected a divisor of the model's 8 key-value heads\..*=2"):
        sequence.check_heads(3, replace(CONFIG, n_kv_heads=8))

    asked = (["parallel.sequence=4"], ["parallel.sequence=8"], ["parallel.sequence=4", "parallel.replicate=2"])
    for said in run_ranks(several_errors, 4, [[*line, *more] for more in asked]):
        heads, ranks, replicas = (" ".join(text.split()) for text in said)
        assert "parallel.sequence: found 4; expected a divisor of the model's 2 key-value heads" in heads
        assert "Try parallel.sequence=2." in heads
        assert "parallel.sequence: found 8; expected a divisor of the 4 ranks. Try parallel.sequence=4" in ranks
        assert "a divisor of the 2 ranks of a replica (parallel.replicate=2). Try parallel.sequence=2" in replicas
    assert not (tmp_path / "run").exists()


def kept_bytes(model: Transformer, pack: PackedBatch) -> int:
    """What a forward keeps for its backward, the weights apart."""
    storages: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor  # kept as without the hook, so that no address is used twice

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        kept = model(pack.tokens, pack.positions, pack.cu_seqlens, pack.max_seqlen)
    assert kept.requires_grad
    return sum(size for address, size in storages.items() if address not in weights)


def kept_alone_and_shared(sharers: int, size: int) -> tuple[int, int]:
    lengths = size // 3, size // 2
    pack = assemble([Example(np.ones(n, np.int32), np.ones(n, np.float32)) for n in lengths], size, 8)
    with distributed.start(timeout_seconds=60, replicate=1, sequence=sharers, threads=1, deterministic=False) as ranks:
        assert ranks.sequence is not None
        whole, shared = Transformer(CONFIG, "sdpa"), Transformer(CONFIG, "sdpa")
        sequence.spread(shared, ranks.sequence)
        return kept_bytes(whole, pack), kept_bytes(shared, pack.cut(ranks.rank, sharers))


@pytest.mark.parametrize("sharers", [2, 4])
def test_what_is_kept_for_the_backward_is_divided(sharers: int) -> None:
    """All of it; and attention's results are kept twice, for their own backward and, once back, for that of `wo`."""
    size = 1024
    twice = CONFIG.n_layers * size * CONFIG.n_heads * CONFIG.head_dim * 4
    for whole, shared in run_ranks(kept_alone_and_shared, sharers, sharers, size):
        assert shared == pytest.approx((whole + twice) / sharers, rel=2e-3)  # a part's ids lie in the pack's memory


def exchanged(sharers: int) -> tuple[list[bool], dict[str, int], list[tuple[Tensor, Tensor]]]:
    """Whether every dtype arrives unchanged; how often blocks were compiled; compiled and plain results."""
    compiled: dict[str, int] = defaultdict(int)

    def count(graph: Any, inputs: Any) -> Any:
        compiled["blocks"] += 1
        return graph.forward

    with distributed.start(timeout_seconds=60, replicate=1, sequence=sharers, threads=1, deterministic=False) as ranks:
        assert ranks.sequence is not None
        [pack, *_] = packs()
        own = pack.cut(ranks.rank, sharers)
        generator = torch.Generator().manual_seed(1)
        heads = [torch.randn(T, n, 16, generator=generator) for n in (4, 2, 2)]
        here = slice(ranks.rank * T // sharers, (ranks.rank + 1) * T // sharers)
        same = []
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            q, k, v = (x.to(dtype) for x in heads)
            name = ranks.sequence.group_name
            expected = attention(q, k, v, pack.cu_seqlens, T, "sdpa")[here]
            bounds = pack.cu_seqlens, T, "sdpa"
            found = sequence.shared_attention(name, sharers, q[here], k[here], v[here], *bounds)
            same.append(torch.equal(found, expected) and found.dtype == dtype)

        model = Transformer(CONFIG, "sdpa")
        init_weights(model, SEED)
        sequence.spread(model, ranks.sequence)
        cos, sin = rotary_tables(own.positions, CONFIG.head_dim, CONFIG.rope_theta, torch.float32)
        x = torch.randn(len(own.tokens), CONFIG.dim, generator=generator, requires_grad=True)
        documents = Documents(own.cu_seqlens, own.max_seqlen, "sdpa", None, None)

        def run() -> tuple[Tensor, Tensor]:
            out = x
            for layer in model.layers:
                out = layer(out, cos, sin, documents)
            return out.detach(), torch.autograd.grad(out.square().sum(), x)[0]

        plain = run()
        for layer in model.layers:
            assert isinstance(layer, Block)
            layer.compile(fullgraph=True, backend=count)
        pairs = list(zip(run(), plain, strict=True))
        return same, dict(compiled), pairs


def test_the_exchange_moves_any_dtype_and_compiles_once_for_all_blocks_without_a_break() -> None:
    for same, compiled, pairs in run_ranks(exchanged, 2, 2):
        assert same == [True] * 3
        assert compiled == {"blocks": 1}
        for found, expected in pairs:
            assert_close(found, expected, 1e-6)
