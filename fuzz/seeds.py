"""Write the seeds of the fuzz targets into `corpus/`: small valid files, and the kinds of damage that parsers detect.

    pip install pillow
    python fuzz/seeds.py

Most are extracted from `tests/golden`; the rest are generated here. Inputs found by fuzzing are kept in the same folders
under other names and are not changed.
"""

import gzip
import io
import json
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent
GOLDEN = ROOT.parent / "tests" / "golden"
CORPUS = ROOT / "corpus"
LARGEST = 6000


def seed(target, name, content):
    if len(content) <= LARGEST:
        folder = CORPUS / target
        folder.mkdir(parents=True, exist_ok=True)
        safe = "".join(letter if letter.isalnum() else "_" for letter in name)
        (folder / f"seed_{safe}").write_bytes(content)


def tensors(path):
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    for name, info in header.items():
        if name != "__metadata__":
            begin, end = info["data_offsets"]
            yield name, content[8 + size + begin : 8 + size + end]


def safetensors(entries, metadata=None):
    header, data = {"__metadata__": metadata} if metadata else {}, b""
    for name, (dtype, shape, content) in entries.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data


def jpeg():
    kept = {"baseline file", "cmyk file", "orientation 6 file", "subsampled file"}
    for name, content in tensors(GOLDEN / "jpeg.safetensors"):
        if name in kept:
            seed("jpeg", name, content)
    for name, content in tensors(GOLDEN / "jpeg_kinds.safetensors"):
        if name.endswith("file") and (" of " not in name or "odd" in name or "5 x 4" in name):
            seed("jpeg", f"kinds {name}", content)


def picture():
    plain = Image.effect_noise((9, 7), 80)
    palette = plain.convert("P")
    modes = {"L": plain, "P": palette, "RGB": plain.convert("RGB"), "RGBA": plain.convert("RGBA"), "LA": plain.convert("LA")}
    modes |= {"1": plain.convert("1"), "I16": plain.convert("I;16")}
    for name, picture in modes.items():
        file = io.BytesIO()
        picture.save(file, "PNG")
        seed("picture", f"png {name}", file.getvalue())
    file = io.BytesIO()
    modes["RGB"].save(file, "PNG", icc_profile=b"\0" * 300, dpi=(72, 72))
    seed("picture", "png icc", file.getvalue())
    for name, options in {"lossless": {"lossless": True}, "lossy": {"quality": 50}}.items():
        for mode in ["RGB", "RGBA"]:
            file = io.BytesIO()
            modes[mode].save(file, "WEBP", **options)
            seed("picture", f"webp {name} {mode}", file.getvalue())
    file = io.BytesIO()
    modes["RGB"].save(file, "WEBP", save_all=True, append_images=[modes["RGB"].rotate(90)], lossless=True)
    seed("picture", "webp animated", file.getvalue())
    for kind in ["BMP", "TIFF", "PPM", "GIF"]:
        for mode in ["RGB", "L", "P", "1"]:
            file = io.BytesIO()
            if kind != "PPM" or mode != "P":
                modes[mode].save(file, kind)
                seed("picture", f"{kind} {mode}", file.getvalue())
    for name, start in {"html": b"<!doctype html>", "lfs": b"version https://git-lfs", "zeros": bytes(99), "gif": b"GIF89a"}.items():
        seed("picture", name, start)


def shards():
    members = {"000.jpg": b"x" * 20, "000.txt": b"a cat", "a/001.png": b"y", "a/001.json": b'{"caption": "dog"}', "001.cls": b"7\n"}
    for kind in ["USTAR", "GNU", "PAX"]:
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=getattr(tarfile, f"{kind}_FORMAT")) as tar:
            names = dict(members)
            if kind != "USTAR":
                names["n" * 120 + "\u00e9.jpg"] = b"z" * 600
            for name, content in names.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                if kind == "PAX":
                    info.pax_headers = {"size": str(len(content)), "comment": "x"}
                tar.addfile(info, io.BytesIO(content))
            link = tarfile.TarInfo("link.jpg")
            link.type, link.linkname = tarfile.SYMTYPE, "000.jpg"
            tar.addfile(link)
        content = file.getvalue().rstrip(b"\0")
        content += bytes(-len(content) % 512 + 1024)
        if len(content) > LARGEST:
            content = content[:LARGEST // 512 * 512]
        seed("tar", kind, content)
        seed("tar", f"{kind} cut", content[:1500])
        seed("tar", f"{kind} gz", gzip.compress(content, mtime=0))
    spans = struct.pack("<QQQIIIIIBB2x", 512, 1536, 0, 20, 5, 0, 7, 3, 0, 0)
    seed("caption_json", "utf16", '{"caption": "a cat"}'.encode("utf-16"))
    seed("shard_index", "one", b"\0" * 32 + spans + b"000" + b"{}")
    seed("shard_index", "told", struct.pack("<6I", 1, 1, 8, 1, 3, 2).replace(b"\1", b"\1", 1) + b"\0" * 8 + spans + b"000{}")
    for number, text in enumerate(['{"caption": "a cat"}', '{"caption":"\\ud83d\\ude00 \\u00e9","n":[1,{"a":null}]}',
                                   '{"caption": "a", "p": NaN, "q": -Infinity}', '\ufeff{"caption": "\\ud800"}', '[1]', '{"caption": ""}']):
        seed("caption_json", str(number), text.encode())


def numbers():
    floats = struct.pack("<12f", *[index / 12 for index in range(12)])
    labels = struct.pack("<1q", 0)
    seed("safetensors", "weights", safetensors({"model.a": ("F32", [3, 4], floats), "model.b": ("F16", [2], b"\0<\0="), "model.c": ("BF16", [1], b"\x80?")}))
    seed("safetensors", "images", safetensors({"images": ("F32", [1, 3, 2, 2], floats), "labels": ("I64", [1], labels)}, {"classes": '["a"]'}))
    seed("safetensors", "embeddings", safetensors({"embeddings": ("F32", [3, 4], floats), "keys": ("U8", [6], b"a\nbc\nd")}, {"text_model": "x", "context": "8"}))
    seed("safetensors", "half embeddings", safetensors({"embeddings": ("F16", [3, 2], b"\0<" * 6)}))
    for name in ("stored", "deflated", "zip64_deflated", "bad_both", "bad_negative", "bad_structured", "bad_fortran"):
        seed("npz", name, (GOLDEN / "archives" / f"{name}.npz").read_bytes())
    seed("npz", "array", (GOLDEN / "archives" / "bad_single.npy").read_bytes())
    for path in sorted((GOLDEN / "weights").glob("*.pth")):
        seed("pytorch", path.stem, path.read_bytes())
        try:
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    if name.endswith("data.pkl"):
                        seed("pytorch", f"pickle of {path.stem}", archive.read(name))
        except zipfile.BadZipFile:
            pass
    for protocol in range(5):
        seed("pytorch", f"plain {protocol}", pickle.dumps({"a": [1, 2.5, "b", None, True, (3, 10**30)], "c": {"d": b"e"}}, protocol))
    names = b"\n".join(b"class%d" % number for number in range(10))
    seed("cifar", "ten", names + b"\0" + bytes([3]) + bytes(range(200)))
    seed("cifar", "hundred", b"\n".join(b"%d" % number for number in range(100)) + b"\0" + bytes([1, 99, 5]))
    counters = {"schema": "1", "samples": "64", "stage": "0", "step": "2", "run_step": "2", "data": "x"}
    seed("checkpoint", "counters", json.dumps(counters).encode())
    seed("checkpoint", "file", safetensors({"weights.a": ("F32", [12], floats)}, {"advxl": json.dumps(counters | {"hash": "0"})}))


def cbor(value):
    def head(kind, number):
        return bytes([kind << 5 | number]) if number < 24 else bytes([kind << 5 | 24, number])

    if value is None or isinstance(value, bool):
        return bytes([{False: 0xF4, True: 0xF5, None: 0xF6}[value]])
    if isinstance(value, int):
        return head(0, value)
    if isinstance(value, float):
        return b"\xfb" + struct.pack(">d", value)
    if isinstance(value, str):
        return head(3, len(value.encode())) + value.encode()
    if isinstance(value, list):
        return head(4, len(value)) + b"".join(map(cbor, value))
    return head(5, len(value)) + b"".join(cbor(key) + cbor(item) for key, item in value.items())


def recipes():
    for path in sorted((ROOT.parent / "recipes").glob("*.toml")):
        lines = [line.split("#")[0].rstrip() if '"' not in line.split("#")[0] else line for line in path.read_text().splitlines()]
        text = "\n".join(line for line in lines if line and not line.startswith("#"))
        seed("recipe", path.stem, text.encode())
    text = (ROOT.parent / "recipes" / "cifar10_micro.toml").read_text().encode()
    sets = ["seed=1", "model.size=\"vit_micro\"", "stage.0.batch=8", "evaluation.images=10", "log.every_samples=1_000"]
    seed("recipe", "overrides", text + b"\0" + "\n".join(sets).encode())
    outcome = {
        "stages": [{"attack": "clean", "tried": 2, "robust_count": 1, "forward": 2, "backward": 0, "seconds": 0.1}],
        "robust": [True, False], "broken_by": [None, "clean"], "distance": [None, None], "margin": [0.123456789, -1e-300],
        "classes": 3, "images_hash": "00", "pixels": [0.0, 1.0], "queue": [0], "marks": {},
    }
    seed("progress", "one", cbor({"fingerprint": "00", "outcome": outcome, "images": 0, "images_hash": "00"}))


def model_files():
    folders = ["clip/open_clip", "clip/clipa", "clip/hugging_face_clip_vision", "clip/hugging_face_vit", None, "text/clipa", "text/custom", "text/hf_gelu"]
    for number, folder in enumerate(folders):
        if folder is None:
            config = {
                "architecture": "vit_huge_patch14_224", "num_classes": 5, "global_pool": "avg", "label_names": list("abcde"),
                "model_args": {"num_heads": 2, "depth": 2, "patch_size": 2, "act_layer": "gelu"},
                "pretrained_cfg": {"input_size": [3, 6, 6], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
                "advxl": {"position": "learned", "norm_eps": 1e-6},
            }
            content = json.dumps(config).encode()
        else:
            content = next(path for path in (GOLDEN / folder).glob("*config.json") if "preprocessor" not in path.name).read_bytes()
        preprocessor = GOLDEN / (folder or "") / "preprocessor_config.json"
        if folder and preprocessor.is_file():
            content += b"\0" + preprocessor.read_bytes()
        seed("model_config", f"{number}", bytes([number]) + content)


def text():
    merges = "#version: 0.2\na b\nab c</w>\n"
    letters = [chr(code) for code in [*range(33, 127), *range(161, 173), *range(174, 256)]]
    letters += [chr(256 + number) for number in range(256 - len(letters))]
    vocabulary = {token: number for number, token in enumerate([*letters, *[letter + "</w>" for letter in letters], "ab", "abc</w>", "<|startoftext|>", "<|endoftext|>"])}
    small = {token: vocabulary[token] for token in ["a", "b", "c</w>", "ab", "abc</w>", "<|startoftext|>", "<|endoftext|>"]}
    seed("tokenizer", "compressed", b"\0" + gzip.compress(merges.encode(), mtime=0))
    seed("tokenizer", "two files", b"\1" + json.dumps(small, ensure_ascii=False).encode() + b"\0" + merges.encode())
    seed("tokenizer", "bpe json", b"\2" + json.dumps({"model": {"type": "BPE", "end_of_word_suffix": "</w>", "vocab": small, "merges": ["a b", ["ab", "c</w>"]]}}).encode())
    seed("tokenizer", "list", b"\3[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n##b\ncat\n")
    pieces = {token: number for number, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "##b", "cat"])}
    piece = {"version": "1.0", "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True},
             "pre_tokenizer": {"type": "BertPreTokenizer"}, "added_tokens": [],
             "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100, "vocab": pieces}}
    seed("tokenizer", "word pieces", b"\2" + json.dumps(piece).encode())
    captions = json.loads((GOLDEN / "text" / "some.json").read_text())
    captions += ["&lt;b&gt; &amp;#39; &#x1f600; &notin", "\u00c3\u00a9t\u00c3\u00a9 \u00e2\u20ac\u0153quoted\u00e2\u20ac\u009d", "\ufb01 \u2028 \x1b[31mred\x1b[0m", "\U0001f600" * 3]
    for number, caption in enumerate(captions):
        seed("caption", str(number), caption.encode())
    words = ["8/255", "1e-3", " 4 / 255 ", "-0", "synthetic:10_000@64", "tensors:a.safetensors", "shards:data/{00000..00099}.tar", "data/{train,val}/{0..9}.tar, b.tar",
             "cuda:0", "auto", "C:\\images", "s3://bucket/{0..3}.tar", "1/0", "synthetic:"]
    for number, word in enumerate(words):
        seed("words", str(number), word.encode())


if __name__ == "__main__":
    for old in CORPUS.glob("*/seed_*"):
        old.unlink()
    for make in [jpeg, picture, shards, numbers, recipes, model_files, text]:
        make()
