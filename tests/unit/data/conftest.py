"""What tests of `data` share: small tokenizers, the real vocabulary, rows and documents."""

import importlib.util
import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from data import Tokenizer
from data.documents import Documents
from data.tokenizer import train_tokenizer

# No deadline: the machine may be busy. No database: tests leave nothing in the working tree.
settings.register_profile("data", deadline=None, database=None)
settings.load_profile("data")

TEXTS = [
    "Hello there! How are you today? I am fine, thank you; and yourself?",
    "The quick brown fox jumps over the lazy dog, 1234567890 times.",
    "Grüße aus Köln. Привет, мир! 你好，世界。 こんにちは 🤖🎉",
    "def main():\n    return {'a': [1, 2, 3]}\n\n\nmain()\t# end",
    "user assistant system tool <|im_start|> <|im_end|> <s> </s> <pad>",
] * 5


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Byte-level BPE with a few merges."""
    return train_tokenizer(TEXTS, 300)


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    """No merges: each byte of text is one token, so that weights can be written down by hand."""
    return train_tokenizer([], 261)


@pytest.fixture(scope="session")
def tekken_file() -> Path:
    """Mistral-Nemo's vocabulary as mistral-common ships it."""
    found = importlib.util.find_spec("mistral_common")
    if found is None or found.origin is None:
        pytest.skip("mistral-common, which ships Nemo's vocabulary, is not installed")
    return Path(found.origin).parent / "data" / "tekken_240718.json"


@pytest.fixture(scope="session")
def nemo(tekken_file: Path) -> Tokenizer:
    return Tokenizer.from_file(tekken_file)


@pytest.fixture(scope="session")
def real_rows() -> Path:
    """Folder of published rows, kept beside the project and not in it."""
    folder = Path(__file__).parents[4] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the published rows are not beside this checkout")
    return folder


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Write rows as JSON Lines; returns the file."""

    def write(rows: Sequence[object], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def make_documents() -> Callable[..., Documents]:
    """Make documents of given lengths with random tokens and weights, as if they had been prepared."""

    def make(lengths: Sequence[int], num_sources: int = 1, seed: int = 0) -> Documents:
        rng = np.random.default_rng(seed)
        total, count = int(sum(lengths)), len(lengths)
        offsets = np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64))]).astype(np.int64)
        weights = rng.choice(np.array([0.0, 0.5, 1.0, 2.0], np.float32), total).astype(np.float32)
        weights[offsets[:-1]] = 0.0
        weights[offsets[1:] - 1] = 1.0
        parts = [weights[a:b] for a, b in pairwise(offsets)]
        return Documents(
            tokens=rng.integers(5, 300, total).astype(np.int32),
            weights=weights,
            starts=offsets[:-1].copy(),
            lengths=np.diff(offsets),
            sources=rng.integers(0, num_sources, count),
            rows=np.arange(1, count + 1),
            scales=rng.choice(np.array([0.5, 1.0, 3.0]), count),
            weight_sums=np.array([p.sum(dtype=np.float64) for p in parts], np.float64),
            weighted_tokens=np.array([np.count_nonzero(p) for p in parts], np.int64),
        )

    return make
