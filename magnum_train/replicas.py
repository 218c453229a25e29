"""Silent corruption: are the copies of the model still the same, bit for bit?

Under replicate × shard every copy applies the same update to the same weights, so that all bits stay equal, and a bit
that a broken machine turns stays turned on one copy alone. No loss or norm need show it. Knows parameters and ranks;
what follows from a difference is `train.py`'s.
"""

from collections import Counter
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from magnum_train.distributed import Ranks
from magnum_train.errors import RunError

SLICE = 2**20
"""Elements whose bits are added up at a time. The sum makes a copy of them as int64: 8 MiB, which stay in a CPU's cache
(a tenth of the time that slices of 128 MiB take) and find room on a full GPU."""


def compare(model: nn.Module, ranks: Ranks, step: int) -> None:
    """Make sure that all copies of the model have the same weights. Every rank calls this.

    Each rank adds up the bits of its shard of each parameter. Any single turned bit changes the sum; of errors in
    several places those go unseen that cancel out to the last bit. One collective hands all sums to all ranks, a few
    bytes for each parameter and rank, so that all come to the same end without asking again.

    Args:
        model: Under FSDP over `ranks.mesh`; its parameters are float32 or bfloat16.
        ranks: This process among the others.
        step: The last one done, for the message.

    Raises:
        RunError: Copies differ, on all ranks: names the parameters, and the ranks whose bits are not those of the
            majority; all of them where there is no majority.
    """
    copies, shards = ranks.mesh.shape
    if copies == 1:
        return
    named = [(name, p) for name, p in model.named_parameters() if isinstance(p, DTensor)]
    here = torch.tensor([ranks.launch.host], device=ranks.device)
    own = torch.cat([here, *(_digest(p.to_local())[None] for _, p in named)])
    everyone = own.new_empty(ranks.world_size * len(own))
    dist.all_gather_into_tensor(everyone, own)
    told = everyone.view(ranks.world_size, -1).tolist()
    at = ranks.mesh.mesh.tolist()

    odd: dict[int, list[str]] = {}  # by rank, the parameters whose bits are not those of the majority
    undecided: set[int] = set()
    for shard in range(shards):
        group = [int(at[copy][shard]) for copy in range(copies)]
        for number, (name, _) in enumerate(named, 1):
            others, majority = outliers([told[rank][number] for rank in group])
            undecided |= set() if majority else {group[index] for index in others}
            for index in others:
                odd.setdefault(group[index], []).append(name)
    if odd:
        raise RunError(
            f"weights after step {step}", _found(odd, [row[0] for row in told]),
            "the same bits on every copy of the model",
            ("Nobody can tell which of them is right. " if undecided else "")
            + "A GPU or its memory is likely at fault: test the machine or leave it out, and go on from a checkpoint "
            "of before the fault.",
        )  # fmt: skip


def outliers(values: Sequence[int]) -> tuple[list[int], bool]:
    """Which of several values, that should be one, are wrong.

    Returns:
        Indices of the values that are not the one which more than half have, and whether there is such a one; where
        there is none, all indices.
    """
    value, count = Counter(values).most_common(1)[0]
    majority = 2 * count > len(values)
    return [index for index, other in enumerate(values) if not majority or other != value], majority


def _digest(local: Tensor) -> Tensor:
    """Sum of the bits of values, each one's read as an integer; scalar int64."""
    bits = local.detach().contiguous().view({2: torch.int16, 4: torch.int32}[local.dtype.itemsize]).flatten()
    return torch.stack([part.sum(dtype=torch.int64) for part in torch.split(bits, SLICE)]).sum()


def _found(odd: dict[int, list[str]], hosts: Sequence[int]) -> str:
    """The ranks whose bits are odd and where, as a person reads it."""

    def parameters(names: list[str]) -> str:
        more = f" and {len(names) - 1} more parameters" if len(names) > 1 else ""
        return f"{names[0]}{more}"

    told = [f"{parameters(names)} on rank {rank} (host {hosts[rank]})" for rank, names in sorted(odd.items())]
    rest = f" and on {len(told) - 8} more ranks" if len(told) > 8 else ""
    return f"bits that differ from the copies': {', '.join(told[:8])}{rest}"
