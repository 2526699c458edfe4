"""Embeddings as files for other programs: `.npy` with a CSV file of names, or Parquet."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from shards.errors import UserError
from shards.files import atomic_write
from toolkit.indexing.store import Index

ENDINGS = (".npy", ".parquet")
_ROWS = 4096  # copied at once


def check_output(out: Path) -> None:
    """Check that embeddings can be written to a file, before they are computed.

    Raises:
        UserError: The ending is unknown, there is no such folder, or pyarrow is missing.
    """
    if out.suffix not in ENDINGS:
        raise UserError(f"--out {out}: the name has to end in .npy or .parquet")
    if not out.parent.is_dir() or out.is_dir():
        raise UserError(f"--out {out}: not a file in an existing folder")
    if out.suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise UserError(f"--out {out}: Parquet needs pyarrow: pip install pyarrow, or write .npy") from None


def write_embeddings(index: Index, out: Path, names: Sequence[str] | None = None) -> list[Path]:
    """Write the embeddings of an index.

    Args:
        index: The index.
        out: The file. Beside `x.npy`, float32 [N, D], `x.csv` has the column `name`.
        names: Order of the rows, from which names that are not in the index are left out; None: the index's order.

    Returns:
        The files.
    """
    row_of = {index.item(row).name: row for row in range(len(index))}
    order = [name for name in dict.fromkeys(names if names is not None else row_of) if name in row_of]
    rows = np.array([row_of[name] for name in order], dtype=np.int64)
    if out.suffix == ".parquet":
        _write_parquet(out, order, index.embeddings[rows])
        return [out]
    column = io.StringIO(newline="")
    csv.writer(column, lineterminator="\n").writerows([["name"], *([name] for name in order)])
    beside = out.with_suffix(".csv")
    with atomic_write(beside) as file:
        file.write(column.getvalue().encode("utf-8", "surrogateescape"))
    with atomic_write(out) as file:
        form = {"descr": "<f4", "fortran_order": False, "shape": (len(order), index.head.dim)}
        np.lib.format.write_array_header_1_0(file, form)
        for start in range(0, len(order), _ROWS):
            file.write(np.asarray(index.embeddings[rows[start : start + _ROWS]], "<f4").tobytes())
    return [out, beside]


def _write_parquet(out: Path, names: Sequence[str], embeddings: np.ndarray) -> None:
    import pyarrow
    import pyarrow.parquet

    texts = [name.encode("utf-8", "backslashreplace").decode() for name in names]
    values = pyarrow.array(np.ascontiguousarray(embeddings, np.float32).reshape(-1))
    column = pyarrow.FixedSizeListArray.from_arrays(values, embeddings.shape[1])
    with atomic_write(out) as file:
        pyarrow.parquet.write_table(pyarrow.table({"name": texts, "embedding": column}), file)
