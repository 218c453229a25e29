"""The Mistral-Nemo network in plain PyTorch: flat packs in, a summed loss or logits out.

Knows no ranks, no settings and no files but weights. `transformer.py` is the place to start reading.
"""

from model.config import TransformerConfig
from model.loss import Loss
from model.transformer import Transformer

__all__ = ["Loss", "Transformer", "TransformerConfig"]
