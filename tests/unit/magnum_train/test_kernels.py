"""The choice of an attention kernel, with stand-ins: a right one, wrong ones, failing ones, a slow one, and a clock."""

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import model.attention
from data.packing import Packs
from magnum_train import config, kernels
from magnum_train.errors import ConfigError
from magnum_train.kernels import Kernel, Task, Verdict, bounds, choose, fastest, judge, typical_pack

right = kernels.kernel_of("sdpa")


def task(dtype: torch.dtype = torch.float32) -> Task:
    """Grouped heads, and a pack of documents of several lengths."""
    return Task(4, 2, 16, bounds([70, 3, 25], 128, 6), dtype, torch.device("cpu"))


class Clock:
    """Time that passes only where a kernel says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Seconds."""
        return self.now

    def taking(self, kernel: Kernel, forward: float, backward: float) -> Kernel:
        """The same kernel, in so many seconds."""

        class Waits(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                self.now += forward
                return x.clone()

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
                self.now += backward
                return grad

        def call(q: Tensor, *rest: Any) -> Tensor:
            return Waits.apply(kernel(q, *rest))  # type: ignore[no-untyped-call, no-any-return]

        return call


def across_documents(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, most: int, lengths: tuple[int, ...]) -> Tensor:
    """One that forgets where documents begin."""
    whole = torch.tensor([0, len(q)], dtype=torch.int32)
    return right(q, k, v, whole, most, (len(q),))


def one_token_early(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, most: int, lengths: tuple[int, ...]) -> Tensor:
    """One whose bounds of a single document are off by one: that after the empty one."""
    shifted = cu.clone()
    shifted[4:5] -= 1
    return right(q, k, v, shifted, most, lengths)


def without_a_head(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    """The value is right; the gradient of a key-value head lacks one of its query heads'."""
    groups = q.shape[1] // k.shape[1]
    wide = [x.repeat_interleave(groups, dim=1) for x in (k, v)]
    wide[0] = torch.cat([wide[0][:, :1].detach(), wide[0][:, 1:]], dim=1)
    return right(q, wide[0], wide[1], *rest)


def not_a_number(q: Tensor, *rest: Any) -> Tensor:
    """NaN in one place."""
    out = right(q, *rest)
    return out.index_fill(0, torch.tensor([5]), torch.nan)


def raises(*_: Any) -> Tensor:
    """What a missing symbol looks like."""
    raise RuntimeError("undefined symbol: flash_fwd\nand a long story")


def breaks_on_the_real_shapes(q: Tensor, *rest: Any) -> Tensor:
    """Right on the control pack."""
    if len(q) == 128:
        raise RuntimeError("no plan for this shape")
    return right(q, *rest)


def wrong_on_the_real_shapes(q: Tensor, *rest: Any) -> Tensor:
    """Right on the control pack."""
    return right(q, *rest) * (2 if len(q) == 128 else 1)


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (across_documents, "is wrong: output off by"),
        (one_token_early, "is wrong: output off by"),
        (without_a_head, "is wrong: gradient of keys off by"),
        (not_a_number, "is wrong: output off by nan"),
        (raises, "fails: undefined symbol: flash_fwd"),
        (breaks_on_the_real_shapes, "fails: no plan for this shape"),
        (wrong_on_the_real_shapes, "is wrong: output off by 1 of its largest value (128 tokens in 4 documents)"),
    ],
)
def test_a_wrong_or_failing_kernel_is_told_and_not_timed(kernel: Kernel, reason: str) -> None:
    clock = Clock()
    good, bad = judge({"good": clock.taking(right, 1, 2), "bad": kernel}, task(), seconds=1, clock=clock)
    assert good == Verdict("good", "", 1000.0, 2000.0)
    assert bad.wrong.startswith(reason)
    assert bad.ms == 0
    assert "and a long story" not in bad.wrong
    assert fastest([good, bad]) == "good"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounding_alone_makes_no_kernel_wrong(dtype: torch.dtype) -> None:
    (verdict,) = judge({"right": right}, task(dtype), seconds=0)
    assert verdict.wrong == ""
    assert verdict.ms > 0


def test_the_fastest_of_the_right_ones_is_taken_by_forward_and_backward_together() -> None:
    clock = Clock()
    times = {"slow": (3, 3), "quick forward": (1, 4), "quick": (2, 2), "wrong": (0, 0)}
    stand_ins = {name: clock.taking(right, *seconds) for name, seconds in times.items()}
    stand_ins["wrong"] = clock.taking(across_documents, 0, 0)
    verdicts = judge(stand_ins, task(), seconds=1, clock=clock)
    assert {v.backend: (v.forward_ms / 1e3, v.backward_ms / 1e3) for v in verdicts} == times
    assert fastest(verdicts) == "quick"


def test_kernels_are_timed_in_turns_until_the_time_is_used_and_at_least_a_few_times() -> None:
    for seconds, rounds in ((0, kernels.LEAST_ROUNDS), (50, 10)):
        clock, order = Clock(), []

        def noted(name: str, clock: Clock = clock, order: list[str] = order) -> Kernel:
            def call(*arguments: Any) -> Tensor:
                order.append(name)
                return timed(*arguments)

            timed = clock.taking(right, 2, 0.5)
            return call

        judge({"a": noted("a"), "b": noted("b")}, task(), seconds=seconds, clock=clock)
        assert order == ["a", "a", "b", "b"] + ["a", "b"] * rounds  # first the two comparisons of each


def test_where_no_kernel_is_right_none_is_taken() -> None:
    with pytest.raises(ValueError, match="no attention kernel is right here"):
        fastest(judge({"bad": raises}, task(), seconds=0))


def test_a_kernel_whose_bits_change_is_refused_only_where_determinism_is_asked_for() -> None:
    count = 0

    def trembling(q: Tensor, *rest: Any) -> Tensor:
        nonlocal count
        count += 1
        return right(q, *rest) * (1 + 1e-6 * count)

    plain, asked = (judge({"x": trembling}, task(), seconds=0, deterministic=d)[0].wrong for d in (False, True))
    assert (plain, asked) == ("", "is not deterministic: two runs differ")


def test_the_cost_of_determinism_is_that_of_the_backward_under_torchs_flag() -> None:
    clock = Clock()

    class Careful(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            clock.now += 7
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            clock.now += 3 if torch.are_deterministic_algorithms_enabled() else 2
            return grad

    def careful(q: Tensor, *rest: Any) -> Tensor:
        return Careful.apply(right(q, *rest))  # type: ignore[no-untyped-call, no-any-return]

    assert kernels.cost_of_determinism(careful, task(), clock=clock) == (3000.0, 2000.0)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_middling_pack_stands_for_the_run() -> None:
    lengths = np.array([100, 10, 10, 50, 50, 20])
    packs = Packs(np.array([0, 1, 2, 3, 4, 5]), np.array([0, 1, 3, 5, 6]))  # squares 10,000, 200, 5,000, 400
    assert typical_pack(packs, lengths) == [50, 50]
    assert typical_pack(packs.part(0, 1), lengths) == [100]


def test_bounds_are_those_of_a_batch_with_its_padding() -> None:
    assert bounds([70, 3, 25], 128, 6).tolist() == [0, 70, 73, 98, 128, 128, 128]
    assert bounds([70, 300, 58], 128, 4).tolist() == [0, 70, 128, 128, 128]  # what does not fit is left out
    found = bounds([1] * 9, 200, 5)
    assert len(found) == 6
    assert found[-1] == 200


# The choice of a run


class OneRank:
    """`Ranks.once` of a run of one; through JSON as with many."""

    @staticmethod
    def once(name: str, work: Callable[[], str]) -> str:
        """What rank 0 says."""
        return work()


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> dict[str, Kernel]:
    """Kernels by the names of backends, as if this were a GPU that has just these."""
    there: dict[str, Kernel] = {}

    def chosen(name: str, device_type: str, dtype: torch.dtype) -> str:
        if name != "auto" and name not in there:
            raise ValueError(f"model.attention: found {name!r} with nothing, expected something; set another")
        return next(iter(there)) if name == "auto" else name

    monkeypatch.setattr(kernels, "choose_backend", chosen)
    monkeypatch.setattr(kernels, "kernel_of", lambda name: there.get(name, right))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(kernels, "judge", lambda *a, **k: judge(*a, **k, seconds=0))
    return there


def run(wanted: str, known: str | None = None, *, deterministic: bool = False) -> tuple[str, dict[str, Any], list[str]]:
    """Choose, and what was said."""
    settings = config.compose([f"model.attention={wanted}", f"train.deterministic={str(deterministic).lower()}"])
    said: list[str] = []
    chosen, found = choose(settings, known, task(), OneRank, said.append)  # type: ignore[arg-type]
    assert json.loads(json.dumps(found)) == found
    return chosen, found, said


def test_auto_takes_the_fastest_and_says_and_records_all_figures(stand_ins: dict[str, Kernel]) -> None:
    stand_ins |= {"varlen": right, "cudnn": across_documents, "varlen_fa3": raises}
    chosen, found, (line,) = run("auto")
    assert chosen == found["chosen"] == "varlen"
    assert line.startswith("attention by varlen; forward + backward of a layer, 128 tokens in 4 documents: varlen ")
    assert "cudnn is wrong: output off by" in line
    assert "varlen_fa3 fails: undefined symbol" in line
    assert "flash_attn not tried (nothing)" in line
    assert [entry["backend"] for entry in found["kernels"]] == ["varlen", "varlen_fa3", "cudnn"]
    assert found["kernels"][0]["forward_ms"] > 0
    assert found["not_tried"] == {"varlen_fa4": "nothing", "flash_attn": "nothing"}
    assert found["lengths"] == [70, 3, 25, 30]


def test_a_run_that_goes_on_takes_what_it_began_with(stand_ins: dict[str, Kernel]) -> None:
    stand_ins |= {"varlen": right, "cudnn": right}
    chosen, found, _ = run("auto", "cudnn")
    assert chosen == "cudnn"
    assert [entry["backend"] for entry in found["kernels"]] == ["cudnn"]  # the others are not even tried
    assert run("varlen", "cudnn")[0] == "varlen"  # what is set counts


def test_what_a_run_began_with_is_left_only_with_a_word(stand_ins: dict[str, Kernel]) -> None:
    stand_ins |= {"varlen": right, "cudnn": across_documents}
    chosen, _, said = run("auto", "cudnn")
    assert chosen == "varlen"
    assert said[0].startswith("the run began with attention by cudnn, which here is wrong: output off by")
    assert run("auto", "varlen_fa3")[0] == "varlen"  # moved to a machine that has it not


def test_a_kernel_that_is_asked_for_and_wrong_ends_the_start(stand_ins: dict[str, Kernel]) -> None:
    stand_ins |= {"varlen": right, "cudnn": without_a_head}
    with pytest.raises(
        ConfigError, match=r"model\.attention: found 'cudnn', which here is wrong: gradient of keys off"
    ):
        run("cudnn")
    with pytest.raises(ConfigError, match="found 'flash_attn' with nothing"):
        run("flash_attn")


def test_where_nothing_is_right_torchs_kernel_by_document_is_taken_and_said(stand_ins: dict[str, Kernel]) -> None:
    stand_ins |= {"varlen": raises, "cudnn": raises}
    chosen, _, (line,) = run("auto")
    assert chosen == "sdpa"
    assert line.startswith("attention by sdpa")
    assert "varlen fails" in line


def test_determinism_is_priced(stand_ins: dict[str, Kernel]) -> None:
    stand_ins["varlen"] = right
    _, found, said = run("auto", deterministic=True)
    assert len(said) == 2
    assert said[1].startswith("train.deterministic: a layer's attention takes ")
    assert found["deterministic_backward_ms"] > 0
    assert found["plain_backward_ms"] > 0


def test_on_a_cpu_nothing_is_tried() -> None:
    said: list[str] = []
    settings = config.compose([])
    assert choose(settings, None, task(), OneRank, said.append) == ("sdpa", {"chosen": "sdpa"})  # type: ignore[arg-type]
    assert said == []


def test_candidates_are_named_with_what_the_others_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.attention, "_capability", lambda: (8, 0))
    monkeypatch.setattr(model.attention, "_cudnn_version", lambda: 91900)
    monkeypatch.setattr(model.attention, "_HAS_FLASH_ATTN", False)
    names, absent = kernels.candidates("auto", None, "cuda", torch.bfloat16)
    assert names == ["varlen"]
    assert absent == {
        "varlen_fa3": "a GPU of compute capability 8.0",
        "varlen_fa4": "a GPU of compute capability 8.0",
        "cudnn": "a GPU of compute capability 8.0",
        "flash_attn": "no such package",
    }
    assert kernels.candidates("auto", None, "cuda", torch.float32) == (["sdpa"], {})
    assert kernels.candidates("auto", "cudnn", "cuda", torch.bfloat16)[0] == ["varlen"]


@pytest.mark.parametrize("sharers", [1, 2])
def test_the_task_is_the_runs_own(sharers: int) -> None:
    settings = config.compose(["data.pack_tokens=256", "data.pack_documents=6", f"parallel.sequence={sharers}"])
    network = SimpleNamespace(n_heads=8, n_kv_heads=2, head_dim=40)
    packs = Packs(np.array([0, 1, 2]), np.array([0, 2, 3]))
    none = np.array([], np.int64)
    prepared = SimpleNamespace(
        train=SimpleNamespace(lengths=np.array([100, 30, 200])), validation=SimpleNamespace(lengths=none)
    )
    of_schedule = SimpleNamespace(schedule=SimpleNamespace(packing=lambda epoch: packs))
    arguments: list[Any] = [settings, network, of_schedule, prepared, torch.bfloat16, torch.device("cpu")]
    found = kernels.task_of(*arguments)
    assert (found.heads, found.kv_heads, found.head_dim) == (8 // sharers, 2 // sharers, 40)
    assert found.cu_seqlens.tolist() == [0, 200, 256, 256, 256, 256, 256, 256, 256]
    arguments[2] = SimpleNamespace(schedule=None)  # a stream, of which nothing is known
    assert kernels.task_of(*arguments).cu_seqlens.tolist() == [0, 32, 64, 96, 128, 160, 192, 224, 256]
    prepared.validation.lengths = np.array([17, 40])
    assert kernels.task_of(*arguments).cu_seqlens.tolist()[:3] == [0, 17, 57]
