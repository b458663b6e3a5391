"""Write small data sets with NumPy and with PyArrow: archives (`.npz`) and Parquet files, valid and not.

Writes the folder archives, and its versions.json. Run in this folder, with numpy, pyarrow and pillow installed:

    python make_archives.py

Pixel (row, column, channel) of image n is (40 n + 16 row + 3 column + 70 channel) modulo 256, and its label 3 n modulo 4.
"""

import io
import json
import pathlib
import zipfile

import numpy as np
import PIL
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

FOLDER = pathlib.Path("archives")
COUNT, HEIGHT, WIDTH = 6, 16, 17


def images(height=HEIGHT, width=WIDTH):
    n, row, column, channel = np.ogrid[:COUNT, :height, :width, :3]
    return ((40 * n + 16 * row + 3 * column + 70 * channel) % 256).astype("uint8")


def labels(dtype="int64"):
    return (3 * np.arange(COUNT) % 4).astype(dtype)


def archives():
    np.savez(FOLDER / "stored.npz", image=images(), label=labels())
    np.savez_compressed(FOLDER / "deflated.npz", images=images(16, 16), labels=labels("int32"))
    # What NumPy writes when an archive has more than 4 GiB.
    limit, zipfile.ZIP64_LIMIT = zipfile.ZIP64_LIMIT, 10
    np.savez(FOLDER / "zip64.npz", image=images(16, 16), label=labels("uint8"))
    np.savez_compressed(FOLDER / "zip64_deflated.npz", image=images(16, 16), label=labels("uint8"))
    zipfile.ZIP64_LIMIT = limit
    np.savez(FOLDER / "unlabeled.npz", image=images(16, 16))

    small = images(2, 2)
    for name, arrays in {
        "fortran": {"image": np.asfortranarray(small), "label": labels()},
        "floats": {"image": small.astype("float32") / 255, "label": labels()},
        "int64": {"image": small.astype("int64"), "label": labels()},
        "first": {"image": small.transpose(0, 3, 1, 2), "label": labels()},
        "gray": {"image": small[..., :1], "label": labels()},
        "flat": {"image": small.reshape(COUNT, -1), "label": labels()},
        "none": {"image": small[:0], "label": labels()[:0]},
        "missing": {"x_train": small, "y_train": labels()},
        "both": {"image": small, "images": small, "label": labels()},
        "lengths": {"image": small, "label": labels()[:-1]},
        "negative": {"image": small, "label": labels() - 1},
        "great": {"image": small, "label": labels() + 999_998},
        "float_labels": {"image": small, "label": labels("float32")},
        "big_endian": {"image": small, "label": labels(">i8")},
        "structured": {"image": np.zeros(2, [("a", "u1"), ("b", "i4", (2,))])},
    }.items():
        np.savez_compressed(FOLDER / f"bad_{name}.npz", **arrays)
    np.save(FOLDER / "bad_single.npy", small)
    with zipfile.ZipFile(FOLDER / "bad_bzip2.npz", "w", zipfile.ZIP_BZIP2) as archive:
        file = io.BytesIO()
        np.save(file, small)
        archive.writestr(zipfile.ZipInfo("image.npy"), file.getvalue(), zipfile.ZIP_BZIP2)


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def features(**columns):
    return {"huggingface": json.dumps({"info": {"features": columns}})}


IMAGE = {"_type": "Image"}
NAMES = {"_type": "ClassLabel", "names": ["airplane", "bird", "cat", "deer"]}


def write(name, columns, metadata=None, **options):
    path = FOLDER / name
    path.parent.mkdir(exist_ok=True)
    table = pa.table(columns)
    pq.write_table(table.replace_schema_metadata(metadata), path, **{"compression": "snappy"} | options)


def parquet():
    encoded = [png(image) for image in images()]
    struct = [{"bytes": one, "path": f"{n}.png"} for n, one in enumerate(encoded)]
    about = features(img=IMAGE, label=NAMES)
    # As `datasets` writes CIFAR-10; the table of the first file has several groups of rows.
    for name, rows, options in [
        ("train-00000-of-00002", slice(0, 3), {"row_group_size": 2}),
        ("train-00001-of-00002", slice(3, 6), {"compression": "zstd"}),
        ("test-00000-of-00001", slice(1, 3), {}),
    ]:
        write(f"named/{name}.parquet", {"img": struct[rows], "label": labels()[rows]}, about, **options)
    # Without names, structs or a split; one image is missing.
    plain = {"fine_label": labels("int32"), "image": encoded[:4] + [None, encoded[5]]}
    write("plain.parquet", plain, compression="none", use_dictionary=False)
    write("unlabeled.parquet", {"image": struct[:2], "label": [-1, -1]}, features(image=IMAGE, label=NAMES))

    write("bad_columns.parquet", {"pixels": encoded[:2], "label": [0, 1]})
    write("bad_gzip.parquet", {"image": encoded[:2], "label": [0, 1]}, compression="gzip")
    write("bad_labels.parquet", {"image": encoded[:3], "label": [0, -1, None]})
    write("bad_names.parquet", {"image": encoded[:2], "label": [0, 4]}, features(image=IMAGE, label=NAMES))
    write("bad_great.parquet", {"image": encoded[:2], "label": [0, 1_000_000]})
    write("other.parquet", {"image": encoded[:2], "label": [0, 1]})
    write("bad_rows.parquet", {"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())})


FOLDER.mkdir(exist_ok=True)
archives()
parquet()
versions = {"numpy": np.__version__, "pyarrow": pa.__version__, "pillow": PIL.__version__}
(FOLDER / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")
