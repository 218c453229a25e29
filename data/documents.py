"""Encoded conversations on disk: flat arrays that are mapped, not loaded, and the writers that make them grow.

Owns the layout of one set of documents:

    tokens.npy  weights.npy     all documents, one after another, for training and validation alike
    NAME/starts.npy lengths.npy sources.npy …     one entry for each document of the part NAME

Knows no gates, no ledger and no packs.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Float32, Float64, Int32, Int64
from numpy.lib import format as npy
from numpy.typing import NDArray

from data.chatml import Example
from data.errors import DataError

TOKENS: dict[str, type[np.generic]] = {"tokens": np.int32, "weights": np.float32}
"""Columns with an entry for each token."""

_EMPTY_BYTES = 128
"""Size of a file that is all header: an empty array cannot be mapped."""

COLUMNS: dict[str, type[np.generic]] = {
    "starts": np.int64,
    "lengths": np.int64,
    "sources": np.int64,
    "rows": np.int64,
    "scales": np.float64,
    "weight_sums": np.float64,
    "weighted_tokens": np.int64,
}
"""Columns with an entry for each document."""


@dataclass(frozen=True, eq=False)
class Documents:
    """Encoded conversations in arrays that are mapped from disk.

    Args:
        tokens: ids; a document's stand together, and there may be others between two documents.
        weights: loss weight of each token.
        starts: where each document starts in `tokens`.
        lengths: tokens of each document, at least 1.
        sources: number of each document's source.
        rows: number of its row in the source (see `sources.rows_of`).
        scales: its row's weight × its source's.
        weight_sums: Σ of its token weights, above 0.
        weighted_tokens: number of its tokens whose weight is not 0.
    """

    tokens: Int32[np.ndarray, "tokens"]
    weights: Float32[np.ndarray, "tokens"]
    starts: Int64[np.ndarray, "documents"]
    lengths: Int64[np.ndarray, "documents"]
    sources: Int64[np.ndarray, "documents"]
    rows: Int64[np.ndarray, "documents"]
    scales: Float64[np.ndarray, "documents"]
    weight_sums: Float64[np.ndarray, "documents"]
    weighted_tokens: Int64[np.ndarray, "documents"]

    def __len__(self) -> int:
        return len(self.rows)

    def example(self, index: int, weight: float | None = None) -> Example:
        """One document as it was encoded, with its own weight or the one given."""
        start = self.starts[index]
        where = slice(start, start + self.lengths[index])
        scale = float(self.scales[index]) if weight is None else weight
        return Example(self.tokens[where], self.weights[where], scale)


class Column:
    """One .npy file that grows: what is written leaves memory. Its length is written last."""

    def __init__(self, path: Path, dtype: "np.dtype[Any]") -> None:
        self._stream: BinaryIO = path.open("wb")
        self._dtype, self._count = dtype, 0
        self._write_header()
        self._data = self._stream.tell()

    def _write_header(self) -> None:
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._count,)}
        npy.write_array_header_1_0(self._stream, header)  # type: ignore[no-untyped-call]

    def extend(self, values: Any) -> None:
        """Append values."""
        array = np.ascontiguousarray(values, self._dtype)
        self._stream.write(array.data)
        self._count += len(array)

    def close(self) -> None:
        """Write the length, and make sure that all of it is on the disk; once."""
        if self._stream.closed:
            return
        self._stream.seek(0)
        self._write_header()
        assert self._stream.tell() == self._data, "the header outgrew its room"
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()


def write_part(folder: Path, columns: dict[str, NDArray[Any]]) -> None:
    """Write one part's columns, an entry for each of its documents.

    Args:
        folder: made here.
        columns: an array for each name in `COLUMNS`.
    """
    folder.mkdir()
    for name, kind in COLUMNS.items():
        column = Column(folder / f"{name}.npy", np.dtype(kind))
        column.extend(columns[name])
        column.close()


def map_part(folder: Path, name: str, documents: int) -> Documents:
    """Map one part of a set.

    Args:
        folder: the set's.
        name: the part's.
        documents: how many there must be.

    Raises:
        DataError: files are absent, damaged, or hold another number.
    """
    remedy = f"delete {folder} and start again"
    arrays: dict[str, Any] = {}
    files = {n: folder / f"{n}.npy" for n in TOKENS} | {n: folder / name / f"{n}.npy" for n in COLUMNS}
    for column, file in files.items():
        try:
            arrays[column] = np.load(file, mmap_mode="r" if file.stat().st_size > _EMPTY_BYTES else None)
        except (OSError, ValueError) as error:
            raise DataError(f"{file}: damaged or cut short ({error}); {remedy}") from error
    found = Documents(**arrays)
    end = int((found.starts + found.lengths).max()) if len(found) else 0
    if len(found) != documents or len(found.lengths) != documents or len(found.tokens) < end:
        raise DataError(f"{folder / name}: {len(found)} documents, the ledger says {documents}; {remedy}")
    return found
