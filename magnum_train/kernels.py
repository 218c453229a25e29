"""Which attention kernel a run takes: of those that are right here, the fastest.

Kernels for packs differ in what they are fast at, in what they get wrong, and from one release to the next; none of it
can be read off a version number. So each that can run is held against a reference, forward and backward, and then timed
at the run's own shapes. Owns what may be taken, the check, the clock and the verdict, which rank 0 gives for all.
"""

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.batch import assemble
from data.chatml import Example
from data.packing import Packs
from data.prepared import Prepared
from magnum_train.batches import Batches
from magnum_train.config import TrainConfig
from magnum_train.distributed import Ranks
from magnum_train.errors import ConfigError
from model import TransformerConfig
from model.attention import FUSED, attention, choose_backend, document_lengths

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, int, tuple[int, ...]], Tensor]
"""`model.attention.attention` with a backend: of q, k, v, cu_seqlens, max_seqlen and the documents' lengths."""

VALUE, GRADIENT = 1e-2, 2e-2
"""Largest error, relative to a tensor's largest magnitude, of output and gradients in bfloat16 and float16. Results are
rounded to 8 bits (2^-9), the probabilities inside as well, and gradients of keys add up those of several heads. What is
wrong (another mask, a document's neighbour, a lost head) is off by a multiple."""

CONTROL = (300, 1, 129, 0, 64, 2, 17, 0)
"""Documents of the pack that is compared in float32: longer than a kernel's tiles and than a head is wide, shorter, of
one token, and empty ones between others and at the end."""

LEAST_ROUNDS = 3


@dataclass(frozen=True, eq=False)
class Task:
    """What attention is called with on one rank.

    Attributes:
        heads: Query heads.
        kv_heads: Key-value heads.
        head_dim: Width of one.
        cu_seqlens: Where the documents of a pack begin, int32 on the CPU, one entry more than slots.
        dtype: Of queries, keys and values.
        device: Where they are.
    """

    heads: int
    kv_heads: int
    head_dim: int
    cu_seqlens: Tensor
    dtype: torch.dtype
    device: torch.device

    @property
    def tokens(self) -> int:
        """Of the pack."""
        return int(self.cu_seqlens[-1])

    @property
    def documents(self) -> int:
        """Slots that are not empty; padding counts."""
        return int((self.cu_seqlens.diff() > 0).sum())


@dataclass(frozen=True)
class Verdict:
    """What became of one kernel.

    Attributes:
        backend: Its name.
        wrong: Why it is not to be used; empty where nothing speaks against it.
        forward_ms: Median time of a forward; 0 where it was not timed.
        backward_ms: Of a backward.
    """

    backend: str
    wrong: str = ""
    forward_ms: float = 0.0
    backward_ms: float = 0.0

    @property
    def ms(self) -> float:
        """Of both."""
        return self.forward_ms + self.backward_ms


def task_of(
    settings: TrainConfig,
    config: TransformerConfig,
    batches: Batches,
    prepared: Prepared,
    dtype: torch.dtype,
    device: torch.device,
) -> Task:
    """What attention is going to be called with on a rank: a middling pack of the first epoch.

    Of a stream nobody knows the lengths: they are taken from what validates, else eight documents fill a pack.
    """
    tokens, sharers = settings.data.pack_tokens, settings.parallel.sequence
    slots = settings.data.pack_documents + 2  # as batches have them
    packs = batches.schedule.packing(0) if batches.schedule is not None else ()
    if isinstance(packs, Packs) and len(packs):
        documents = typical_pack(packs, prepared.train.lengths)
    else:
        documents = prepared.validation.lengths[:slots].tolist() or [max(1, tokens // 8)] * 8
    heads, kv_heads = config.n_heads // sharers, config.n_kv_heads // sharers
    return Task(heads, kv_heads, config.head_dim, bounds(documents, tokens, slots), dtype, device)


def choose(
    settings: TrainConfig, known: str | None, task: Task, ranks: Ranks, say: Callable[[str], None]
) -> tuple[str, dict[str, Any]]:
    """The kernel to use: as set; where that is auto, the one that the run began with, or the fastest of those here.

    On a GPU rank 0 tries them, one that is set too, says all that it found, and decides for all ranks.

    Args:
        settings: The run's.
        known: The kernel that the run began with, if it goes on; it counts where the setting is auto.
        task: What attention is going to be called with.
        ranks: All of them call this.
        say: Told on rank 0 what was tried.

    Returns:
        Its name, and what was found, as a JSON object.

    Raises:
        ConfigError: If the kernel that is asked for does not run here, or is wrong.
    """
    wanted = settings.model.attention
    known = known if wanted == "auto" else None
    first = candidates(wanted, known, task.device.type, task.dtype)

    def tried() -> str:
        (names, absent), deterministic = first, settings.train.deterministic
        verdicts = judge({x: kernel_of(x) for x in names}, task, deterministic=deterministic)
        if known is not None and len(names) == 1 and verdicts[0].wrong:
            say(f"the run began with attention by {known}, which here {verdicts[0].wrong}")
            names, absent = candidates(wanted, None, task.device.type, task.dtype)
            verdicts = judge({x: kernel_of(x) for x in names}, task, deterministic=deterministic)
        if wanted != "auto" and verdicts[0].wrong:
            raise ConfigError(
                "model.attention", f"{wanted!r}, which here {verdicts[0].wrong}", "a kernel that agrees with float32",
                "Set model.attention=auto.",
            )  # fmt: skip
        chosen = "sdpa" if all(verdict.wrong for verdict in verdicts) else fastest(verdicts)
        say(told(verdicts, absent, task, chosen))
        found = {"chosen": chosen} | record_of(verdicts, absent, task)
        if deterministic:
            cost, plain = cost_of_determinism(kernel_of(chosen), task)
            found["deterministic_backward_ms"], found["plain_backward_ms"] = cost, plain
            say(
                f"train.deterministic: a layer's attention takes {cost:.2f} ms backward, {plain:.2f} ms without "
                f"({cost / plain:.2f} x)"
            )
        torch.cuda.empty_cache()  # the model is to find the memory as it was
        return json.dumps(found)

    if first[0] == ["sdpa"] and task.device.type == "cpu":  # nothing to choose, and always the same bits
        return "sdpa", {"chosen": "sdpa"}
    found: dict[str, Any] = json.loads(ranks.once("attention", tried))
    return found["chosen"], found


def candidates(
    wanted: str, known: str | None, device_type: str, dtype: torch.dtype
) -> tuple[list[str], dict[str, str]]:
    """The kernels that may be taken, and why others may not, by name.

    Args:
        wanted: `model.attention`.
        known: The one that the run began with, if it goes on and nothing else is asked for.
        device_type: Of the ranks' devices.
        dtype: Of activations.

    Raises:
        ConfigError: If the kernel that is asked for does not run here.
    """
    if known is not None:
        with contextlib.suppress(ValueError):  # the run has moved to another kind of machine
            return [choose_backend(known, device_type, dtype)], {}
    try:
        chosen = choose_backend(wanted, device_type, dtype)
    except ValueError as error:
        raise ConfigError.of(error) from error
    if wanted != "auto" or chosen == "sdpa":
        return [chosen], {}
    names, absent = list[str](), dict[str, str]()
    for name in FUSED:
        try:
            names.append(choose_backend(name, device_type, dtype))
        except ValueError as error:
            absent[name] = ConfigError.of(error).found.removeprefix(f"{name!r} with ")
    return names, absent


def kernel_of(backend: str) -> Kernel:
    """`model.attention.attention` with one of its backends."""

    def call(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, lengths: tuple[int, ...]) -> Tensor:
        return attention(q, k, v, cu_seqlens, max_seqlen, backend, lengths)

    return call


def typical_pack(packs: Packs, lengths: NDArray[np.int64]) -> list[int]:
    """Lengths of the documents of a pack that costs as much attention as half of all packs at most.

    Args:
        packs: Of an epoch, at least one.
        lengths: Tokens of each document.
    """
    of_members = lengths[packs.members]
    squares = np.add.reduceat(of_members**2, packs.bounds[:-1])
    median = int(np.argsort(squares, kind="stable")[len(squares) // 2])
    chosen: list[int] = of_members[packs.bounds[median] : packs.bounds[median + 1]].tolist()
    return chosen


def bounds(documents: Iterable[int], tokens: int, slots: int) -> Tensor:
    """`cu_seqlens` of a pack as batches have it, its tail filled with padding documents.

    Args:
        documents: Lengths; those that no longer fit are left out.
        tokens: Of the pack.
        slots: N.
    """
    taken: list[int] = []
    for length in documents:
        if sum(taken) + length <= tokens and len(taken) < slots - 1:
            taken.append(length)
    empty = [Example(np.zeros(n, np.int32), np.zeros(n, np.float32)) for n in taken]
    return assemble(empty, tokens, slots).cu_seqlens


def judge(
    kernels: Mapping[str, Kernel],
    task: Task,
    *,
    seconds: float = 1.0,
    deterministic: bool = False,
    clock: Callable[[], float] | None = None,
) -> list[Verdict]:
    """Check each kernel, and time those that are right, in turns.

    A kernel is compared on `CONTROL` with float32 on the CPU, document by document; then at the run's own shapes with
    the kernel that takes documents one by one, since some kernels differ by shape. What it raises counts as wrong; an
    error that breaks the device itself breaks those that come after as well. Nothing is said here.

    Args:
        kernels: By name.
        task: What the run will ask for.
        seconds: For all rounds of timing together; at least `LEAST_ROUNDS` are made.
        deterministic: Whether a second run must give the same bits.
        clock: Seconds, after everything that was asked of the device is done.

    Returns:
        A verdict for each, in their order.
    """
    clock = clock or partial(_seconds, task.device)
    small = _Case(_control(task), seed=0)
    whole = _Case(task, seed=1)
    of_small, of_whole = small.in_float32(), None
    wrong: dict[str, str] = {}
    for name, kernel in kernels.items():
        try:
            wrong[name] = _difference(small, kernel, of_small, deterministic)
            if not wrong[name]:
                of_whole = whole.outcome(kernel_of("sdpa")) if of_whole is None else of_whole
                wrong[name] = _difference(whole, kernel, of_whole, deterministic)
        except Exception as error:  # whatever a kernel of somebody else's raises
            wrong[name] = f"fails: {_first_line(error)}"
    del of_whole
    right = {name: kernel for name, kernel in kernels.items() if not wrong[name]}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in right}
    begin, rounds = clock(), 0
    while right and (rounds < LEAST_ROUNDS or clock() - begin < seconds):
        for name, kernel in right.items():
            times[name].append(whole.timed(kernel, clock))
        rounds += 1
    return [
        Verdict(name, wrong[name], *(1e3 * statistics.median(part) for part in zip(*times.get(name, ()), strict=True)))
        for name in kernels
    ]


def fastest(verdicts: Iterable[Verdict]) -> str:
    """The right kernel that takes the least time.

    Raises:
        ValueError: None is right.
    """
    right = [verdict for verdict in verdicts if not verdict.wrong]
    if not right:
        raise ValueError("no attention kernel is right here")
    return min(right, key=lambda verdict: verdict.ms).backend


def cost_of_determinism(
    kernel: Kernel, task: Task, *, seconds: float = 0.5, clock: Callable[[], float] | None = None
) -> tuple[float, float]:
    """Milliseconds of a backward with deterministic algorithms, and without them; medians of turns.

    Args:
        kernel: The one that the run takes.
        task: What the run will ask for.
        seconds: For all rounds together; at least `LEAST_ROUNDS` are made.
        clock: As for `judge`.
    """
    clock = clock or partial(_seconds, task.device)
    case, before = _Case(task, seed=1), torch.are_deterministic_algorithms_enabled()
    times: dict[bool, list[float]] = {True: [], False: []}
    try:
        begin, rounds = clock(), 0
        while rounds <= LEAST_ROUNDS or clock() - begin < seconds:  # the first one warms up
            for deterministic, measured in times.items():
                torch.use_deterministic_algorithms(deterministic)
                measured.append(case.timed(kernel, clock)[1])
            rounds += 1
    finally:
        torch.use_deterministic_algorithms(before)
    with_it, without = (1e3 * statistics.median(measured[1:]) for measured in times.values())
    return with_it, without


def told(verdicts: Sequence[Verdict], absent: Mapping[str, str], task: Task, chosen: str) -> str:
    """All that was found, in one line.

    Args:
        verdicts: Of the kernels that could be tried.
        absent: Why others could not be, by name.
        task: What they were tried with.
        chosen: The one that the run takes.
    """
    figures = [
        f"{v.backend} {v.wrong}" if v.wrong else f"{v.backend} {v.forward_ms:.2f} + {v.backward_ms:.2f} ms"
        for v in verdicts
    ]
    left_out = [f"{name} not tried ({why})" for name, why in absent.items()]
    return (
        f"attention by {chosen}; forward + backward of a layer, {task.tokens:,} tokens in {task.documents} documents: "
        + ", ".join([*figures, *left_out])
    )


def record_of(verdicts: Sequence[Verdict], absent: Mapping[str, str], task: Task) -> dict[str, Any]:
    """The same as a JSON object."""
    return {
        "tokens": task.tokens,
        "lengths": [n for n in task.cu_seqlens.diff().tolist() if n],
        "heads": [task.heads, task.kv_heads, task.head_dim],
        "kernels": [asdict(verdict) for verdict in verdicts],
        "not_tried": dict(absent),
    }


class _Case:
    """Random inputs for a task, and what kernels make of them."""

    def __init__(self, task: Task, seed: int) -> None:
        self.task = task
        generator = torch.Generator(task.device).manual_seed(seed)
        *inputs, self.upstream = (
            torch.randn(
                task.tokens, n, task.head_dim, generator=generator, dtype=task.dtype, device=task.device
            ) for n in (task.heads, task.kv_heads, task.kv_heads, task.heads)
        )  # fmt: skip
        self.inputs = [x.requires_grad_() for x in inputs]
        self.cu_seqlens = task.cu_seqlens.to(task.device)
        self.lengths = document_lengths(task.cu_seqlens)

    def forward(self, kernel: Kernel) -> Tensor:
        """Attention's output."""
        q, k, v = self.inputs
        return kernel(q, k, v, self.cu_seqlens, self.task.tokens, self.lengths)

    def outcome(self, kernel: Kernel) -> list[Tensor]:
        """Output, and gradients of queries, keys and values."""
        out = self.forward(kernel)
        return [out.detach(), *torch.autograd.grad(out, self.inputs, self.upstream)]

    def in_float32(self) -> list[Tensor]:
        """The outcome by the reference: on the CPU, in float32, document by document; back on the device."""
        inputs = [x.detach().cpu().float().requires_grad_() for x in self.inputs]
        q, k, v = inputs
        out = attention(q, k, v, self.task.cu_seqlens, self.task.tokens, "sdpa", self.lengths)
        grads = torch.autograd.grad(out, inputs, self.upstream.cpu().float())
        return [x.detach().to(self.task.device) for x in (out, *grads)]

    def timed(self, kernel: Kernel, clock: Callable[[], float]) -> tuple[float, float]:
        """Seconds of a forward and of its backward."""
        begin = clock()
        out = self.forward(kernel)
        between = clock()
        torch.autograd.grad(out, self.inputs, self.upstream)
        return between - begin, clock() - between


def _control(task: Task) -> Task:
    """The same heads on the pack of `CONTROL`, in as many slots as the run's, where that is enough."""
    slots = max(len(task.cu_seqlens) - 1, len(CONTROL))
    lengths = torch.tensor([0, *CONTROL, *[0] * (slots - len(CONTROL))])
    return Task(task.heads, task.kv_heads, task.head_dim, lengths.cumsum(0).int(), task.dtype, task.device)


def _difference(case: _Case, kernel: Kernel, expected: list[Tensor], deterministic: bool) -> str:
    """How a kernel's outcome differs from what is expected by more than rounding; empty where it does not."""
    found = case.outcome(kernel)
    names = ("output", "gradient of queries", "gradient of keys", "gradient of values")
    for name, x, y, limit in zip(names, found, expected, (VALUE, GRADIENT, GRADIENT, GRADIENT), strict=True):
        error = float((x.float() - y.float()).abs().max() / y.float().abs().max())
        if not error <= limit:  # NaN too
            where = f"{case.task.tokens:,} tokens in {case.task.documents} documents"
            return f"is wrong: {name} off by {error:.2g} of its largest value ({where}), allowed are {limit:g}"
    if deterministic and not all(map(torch.equal, found, case.outcome(kernel))):
        return "is not deterministic: two runs differ"
    return ""


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _seconds(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
