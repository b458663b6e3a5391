"""Record what Python reads from tar files and JSON texts.

Writes shards.safetensors: tar files of every form that Python and GNU tar write (compressed here, because they are
mostly zeros; the one named gzip is compressed twice), each with length and CRC-32 of the regular members that `tarfile`
finds when opened as in WebDataset (a stream, `r|*`); and JSON texts with the values that `json` reads, with null for
NaN and infinities, and U+FFFD for lone surrogates. Run in this folder, with GNU tar, numpy and safetensors installed:

    python make_shards.py
"""

import gzip
import io
import json
import math
import os
import subprocess
import sys
import tarfile
import tempfile
import zlib

import numpy as np
from safetensors.numpy import save_file

CONTENTS = {
    "000.jpg": b"a picture",
    "000.txt": b"words",
    "deep/" * 30 + "001.jpg": b"long path",
    "x" * 150 + ".png": b"long name",
    "sch\u00f6n \u732b.jpg": b"letters",
    "./002.jpg": b"dot",
    "empty.txt": b"",
    "block.jpg": bytes(range(256)) * 2,
}


def by_python(format, names=CONTENTS, **more):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(CONTENTS[name])
            info.pax_headers = dict(more)
            tar.addfile(info, io.BytesIO(CONTENTS[name]))
        folder = tarfile.TarInfo("deep")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, kind in [("link.jpg", tarfile.SYMTYPE), ("hard.jpg", tarfile.LNKTYPE)]:
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "000.jpg"
            tar.addfile(link)
    return buffer.getvalue()


def by_gnu_tar(*options):
    with tempfile.TemporaryDirectory() as folder:
        for name in ["000.jpg", "000.txt"]:
            with open(os.path.join(folder, name), "wb") as file:
                file.write(CONTENTS[name])
        with open(os.path.join(folder, "holes.png"), "wb") as file:
            for place in range(40):
                file.seek(place * 65536)
                file.write(b"data %d" % place)
            file.truncate(41 * 65536)
        names = ["000.jpg", "holes.png", "000.txt"]
        fixed = ["--owner=0", "--group=0", "--mtime=@0", "--no-acls", "--no-xattrs", "--blocking-factor=1"]
        return subprocess.run(["tar", "-c", *options, *fixed, *names], cwd=folder, check=True, capture_output=True).stdout


short = [name for name in CONTENTS if len(name) < 90 and name.isascii()]
plain = by_python(tarfile.PAX_FORMAT)
tars = {
    "ustar": by_python(tarfile.USTAR_FORMAT, short),
    "gnu": by_python(tarfile.GNU_FORMAT),
    "pax": plain,
    "pax with many headers": by_python(tarfile.PAX_FORMAT, comment="c" * 20000),
    "sparse gnu": by_gnu_tar("--sparse", "--format=gnu"),
    "sparse pax 0.0": by_gnu_tar("--sparse", "--format=pax", "--sparse-version=0.0"),
    "sparse pax 0.1": by_gnu_tar("--sparse", "--format=pax", "--sparse-version=0.1"),
    "sparse pax 1.0": by_gnu_tar("--sparse", "--format=pax", "--sparse-version=1.0"),
    "gzip": gzip.compress(plain, mtime=0),
}


def members(tar):
    with tarfile.open(fileobj=io.BytesIO(tar), mode="r|*") as file:
        for member in file:
            if member.isreg():
                content = file.extractfile(member).read()
                yield [member.name, len(content), zlib.crc32(content)]


def plain_value(value):
    match value:
        case float() if not math.isfinite(value):
            return None
        case int() if abs(value) >= 2**64:
            return float(value)
        case str():
            return "".join("\ufffd" if 0xD800 <= ord(letter) < 0xE000 else letter for letter in value)
        case list():
            return [plain_value(part) for part in value]
        case dict():
            return {plain_value(key): plain_value(part) for key, part in value.items()}
    return value


TEXTS = [
    b'\xef\xbb\xbf{"a":1}', b'{"a":NaN,"b":Infinity,"c":-Infinity}', b'{"caption": "a cat", "pwatermark": NaN}',
    b'{"a":"\\ud83d"}', b'{"a":"\\ude00 x", "b": NaN}', b'{"a":"\\ud83d\\ud83d\\ude00"}', b'{"a":"\xed\xa0\xbd"}',
    '{"a":"\u00e9\U0001f600"}'.encode("utf-16"), b"\xfe\xff" + '{"a":1}'.encode("utf-16-be"), b'{"a":1e999}', b'{"a":-1e999}',
    b"[1,]", b"{'a':1}", b'{"a":nan}', b'{"a":+1}', b'{"a":.5}', b'{"a":01}', b'{"a":"x\ty"}', b'{"a":"x\\u00"}',
    b'{"a":1}x', b"", b'{"a":1,"a":2}', b'{"a":-NaN}', b'{"a":"NaN"}', b'{"NaN":NaN}', b"NaN", b"[NaN", b'{"a":"caf\xe9"}',
    b'{"a":12345678901234567890123}', b'["\\ud83d\\u0041"]', b'["\\uD83D\\uDE00"]', b'["\\\\ud83d"]', b'["\\\\\\ud83d", NaN]',
    b'{"a": 1} // c', b'{"a":NaNa}', b"\x00", b"[1e5,1E+5,-7,0.1]", b'["\\ud83d\\n"]', b'["\x7f"]', b'["\\u0000"]', b'["\\/"]',
    b'["\\x41"]', b"[Infinity]", b"[infinity]", b"[-Infinit]", b"\xff\xfe", b'["\\ud83d', b'["\\ud83d\\', b"[NaN, [NaN, {}]]",
    b" \n[NaN ,\tInfinity\r\n] ", b'["\\"NaN", NaN]', b"[-1, -1.5, -Infinity]", b"[1 2]", b'{"\\ud83d": 1}', b"[12NaN]",
    json.dumps({"caption": "\ud83d half", "similarity": float("nan"), "list": [1.5, float("-inf")]}).encode(),
    json.dumps({"caption": "caf\u00e9"}, ensure_ascii=False).encode("utf-8-sig"),
]  # fmt: skip


def by_json(text):
    try:
        return [text.hex(), [plain_value(json.loads(text))]]
    except ValueError:
        return [text.hex(), None]


results = {}
for name, tar in tars.items():
    results[f"{name} tar"] = np.frombuffer(gzip.compress(tar, mtime=0), np.uint8)
    results[f"{name} members"] = np.frombuffer(json.dumps(list(members(tar))).encode(), np.uint8)
results["json"] = np.frombuffer(json.dumps([by_json(text) for text in TEXTS]).encode(), np.uint8)
gnu_tar = subprocess.run(["tar", "--version"], capture_output=True, text=True).stdout.splitlines()[0]
save_file(results, "shards.safetensors", metadata={"versions": json.dumps({"python": sys.version.split()[0], "tar": gnu_tar})})
