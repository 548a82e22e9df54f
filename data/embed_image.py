"""Owns the making of data/embedded/fashion.parquet from the Debian package: `python -m data.embed_image FOLDER`.

The first rows of each class: 400 of train, 100 of validation, 100 of test. Same input and same pyarrow, same bytes.
"""

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.base import SPLITS
from data.fashion import EMBEDDED, EMBEDDED_COUNTS, NUM_CLASSES, SIDE, FashionSplit, fetch_folder, read_folder
from data.sources import sha256_file


def embedded_part(splits: dict[str, FashionSplit]) -> pa.Table:
    """Columns split, row (in the train or test file), label, image (784 bytes, row by row)."""
    columns: dict[str, list[pa.Array]] = {"split": [], "row": [], "label": [], "image": []}
    for name in SPLITS:
        split, per_class = splits[name], EMBEDDED_COUNTS[name] // NUM_CLASSES
        first = [np.flatnonzero(split.labels == label)[:per_class] for label in range(NUM_CLASSES)]
        chosen = np.sort(np.concatenate(first))
        images = [image.tobytes() for image in split.images[chosen]]
        columns["split"].append(pa.array([name] * len(chosen)))
        columns["row"].append(pa.array(split.rows[chosen], type=pa.int32()))
        columns["label"].append(pa.array(split.labels[chosen], type=pa.uint8()))
        columns["image"].append(pa.array(images, type=pa.binary(SIDE * SIDE)))
    return pa.table({name: pa.concat_arrays(parts) for name, parts in columns.items()})


def write(table: pa.Table, path: Path) -> None:
    pq.write_table(
        table, path, compression="zstd", compression_level=19, use_dictionary=["split"], write_statistics=False,
        store_schema=False,
    )  # fmt: skip


def main(downloads: Path) -> None:
    downloads.mkdir(parents=True, exist_ok=True)
    write(embedded_part(read_folder(fetch_folder(downloads))), EMBEDDED)
    print(f"{sha256_file(EMBEDDED)}  {EMBEDDED.stat().st_size:,} bytes  {EMBEDDED}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m data.embed_image FOLDER   (where the Debian package is, or is to be put)")
    main(Path(sys.argv[1]))
