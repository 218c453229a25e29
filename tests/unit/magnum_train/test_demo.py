"""How many processes the demo starts."""

import pytest

from magnum_train.config import compose
from magnum_train.demo import processes


@pytest.mark.parametrize(
    ("packs", "gpus", "expected"), [(2, 0, 2), (8, 0, 2), (2, 1, 1), (2, 8, 2), (8, 3, 2), (8, 8, 8), (6, 5, 3)]
)
def test_two_on_a_cpu_else_the_most_gpus_that_divide_a_step(packs: int, gpus: int, expected: int) -> None:
    assert processes(packs, gpus) == expected


def test_the_demos_step_divides_by_its_processes() -> None:
    assert compose(["experiment=demo"]).packs_per_step % 2 == 0
