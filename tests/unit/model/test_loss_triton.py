"""The Triton kernel of the loss head in Triton's interpreter, against the same numbers in float64."""

import importlib.util
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton is not there")

# In a process of its own: the interpreter is chosen when a kernel is defined, for all kernels of a process.
SCRIPT = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import torch
from model.loss import _losses
from model.loss_triton import losses

def drawn(rows, columns, spread):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, columns, generator=generator) * spread
    labels = torch.randint(columns, (rows,), generator=generator)
    labels[0], labels[-1] = 0, columns - 1
    weights = torch.rand(rows, generator=generator).sub(1 / 3).clamp_min(0)
    weights[1] = 0
    return logits, labels, weights

def close(found, expected, tolerance, what):
    assert torch.isfinite(found).all(), what
    error = (found.double() - expected).abs().max() / expected.abs().max().clamp_min(1)
    assert error <= tolerance, (what, error)

def check(columns, spread):
    logits, labels, weights = drawn(5, columns, spread)
    wide = logits.double()
    expected = torch.logsumexp(wide, 1) - wide.gather(1, labels[:, None])[:, 0]
    gradient = wide.softmax(1)
    gradient[torch.arange(5), labels] -= 1
    gradient *= weights[:, None].double()
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2**-8)):
        wider = torch.full((5, columns + 3), 7.0, dtype=dtype)  # rows that do not lie one after another
        before = logits.clone()
        close(losses(logits, labels, weights, wider[:, :columns]), expected, 1e-6, "losses")
        close(wider[:, :columns], gradient, tolerance, f"gradient in {dtype}")
        assert wider[:, columns:].eq(7).all(), "written beyond a row's end"
        assert wider[1, :columns].eq(0).all(), "a gradient where the weight is 0"
        assert torch.equal(logits, before), "logits are changed"
        again = torch.empty_like(wider)
        losses(logits, labels, weights, again[:, :columns])
        assert torch.equal(again[:, :columns], wider[:, :columns]), "another time, other bits"
    assert torch.equal(losses(logits, labels, weights, None), losses(logits, labels, weights, wider[:, :columns]))
    in_torch = torch.empty(5, columns)
    expected = _losses(logits.clone(), labels, weights, in_torch).double()
    close(losses(logits, labels, weights, None), expected, 1e-6, "torch")
    assert losses(logits[:0], labels[:0], weights[:0], None).shape == (0,)

# 1e4 is far beyond where exp overflows; 3e37 close to the largest number there is.
for case in ((1, 1.0), (2, 1e4), (515, 1.0), (515, 1e4), (515, 3e37), (8007, 3.0), (8192, 1.0), (131072, 2.0)):
    check(*case)
"""


def test_kernel_equals_float64_at_any_vocabulary_and_any_logits():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
