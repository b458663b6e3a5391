"""Record what Pillow, PyTorch, torchvision and timm compute from small images.

Writes resize.safetensors, operations.safetensors, jpeg.safetensors and jpeg_kinds.safetensors.

The images are drawn by a formula that the Rust tests repeat, so that only results are
stored. Run in this folder, with pillow, torch, torchvision, timm, numpy and safetensors installed:

    python make_pictures.py
"""

import io
import json

import numpy as np
import PIL.features
import timm
import torch
import torchvision
from PIL import Image, ImageOps
from safetensors.numpy import save_file
from timm.data import auto_augment as timm_ops
from torch.nn.functional import interpolate
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize


def picture(width, height):
    """Returns smooth slopes, hard edges and noise from a linear congruential generator; [height, width, 3]."""
    state, out = 12345, np.zeros((height, width, 3), np.uint8)
    for y in range(height):
        for x in range(width):
            for c in range(3):
                state = (state * 1103515245 + 12345) % 2**31
                slope = (x * 5 + y * 3 + c * 40) % 256
                edge = 255 if (x // 4 + y // 3 + c) % 3 == 0 else 0
                noise = (state >> 16) % 256
                out[y, x, c] = (slope, edge, noise)[(x // 5 + y // 5) % 3]
    return out


FILTERS = {"box": Image.BOX, "bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}
SIZES = [((37, 23), (16, 11)), ((16, 12), (29, 31)), ((30, 20), (30, 9)), ((25, 40), (8, 40)), ((31, 31), (32, 32))]

results = {}
for (width, height), new in SIZES:
    image = Image.fromarray(picture(width, height))
    for name, resample in FILTERS.items():
        resized = np.asarray(image.resize(new, resample))
        results[f"pillow {name} {width}x{height} {new[0]}x{new[1]}"] = resized.copy()

for (width, height), (new_width, new_height) in SIZES[:2]:
    planes = torch.from_numpy(picture(width, height)).permute(2, 0, 1).float()[None] / 255
    for name in ["bilinear", "bicubic"]:
        resized = interpolate(planes, (new_height, new_width), mode=name, antialias=True)
        key = f"torch {name} {width}x{height} {new_width}x{new_height}"
        results[key] = resized[0].clamp(0, 1).numpy()

# Evaluation: resize the shorter side to floor(size / fraction), then crop the center.
for (width, height), size, fraction, name in [((41, 29), 20, 0.875, "bicubic"), ((22, 35), 24, 0.9, "bilinear")]:
    transform = Compose([Resize(int(size / fraction), InterpolationMode(name)), CenterCrop(size)])
    image = transform(Image.fromarray(picture(width, height)))
    results[f"torchvision {name} {width}x{height} {size} {fraction}"] = np.asarray(image).copy()

versions = {"pillow": PIL.__version__, "torch": torch.__version__, "torchvision": torchvision.__version__, "timm": timm.__version__}
save_file(results, "resize.safetensors", metadata={"versions": json.dumps(versions)})

# The operations of RandAugment, as timm calls Pillow, on an image of 21 x 17.
OPERATIONS = [
    ("AutoContrast", timm_ops.auto_contrast, []),
    ("Equalize", timm_ops.equalize, []),
    ("Invert", timm_ops.invert, []),
    ("Rotate", timm_ops.rotate, [27.0]),
    ("Rotate", timm_ops.rotate, [-11.3]),
    ("Posterize", timm_ops.posterize, [1]),
    ("Posterize", timm_ops.posterize, [3]),
    ("Solarize", timm_ops.solarize, [26]),
    ("Solarize", timm_ops.solarize, [256]),
    ("SolarizeAdd", timm_ops.solarize_add, [99]),
    ("Color", timm_ops.color, [0.19]),
    ("Color", timm_ops.color, [1.81]),
    ("Contrast", timm_ops.contrast, [0.19]),
    ("Contrast", timm_ops.contrast, [1.81]),
    ("Brightness", timm_ops.brightness, [0.37]),
    ("Brightness", timm_ops.brightness, [1.63]),
    ("Sharpness", timm_ops.sharpness, [0.19]),
    ("Sharpness", timm_ops.sharpness, [1.81]),
    ("ShearX", timm_ops.shear_x, [0.27]),
    ("ShearY", timm_ops.shear_y, [-0.27]),
    ("TranslateX", timm_ops.translate_x_rel, [0.4]),
    ("TranslateY", timm_ops.translate_y_rel, [-0.37]),
]

# An image of low contrast, so that AutoContrast and Equalize have an effect.
source = Image.fromarray(40 + picture(21, 17) // 2)
moving = {"fillcolor": (124, 116, 104), "resample": Image.BILINEAR}
results = {}
for name, function, arguments in OPERATIONS:
    result = function(source, *arguments, **moving)
    results[" ".join([name, *map(str, arguments)])] = np.asarray(result).copy()

save_file(results, "operations.safetensors", metadata={"versions": json.dumps(versions)})

# JPEG files and the pixels that Pillow decodes, with the EXIF orientation applied.
smooth = Image.fromarray(np.stack([
    np.add.outer(np.arange(14) * 9, np.arange(19) * 4),
    np.add.outer(np.arange(14) * -6, np.arange(19) * 8) + 80,
    np.add.outer(np.arange(14) * 3, np.arange(19) * -5) + 120,
], axis=-1).astype(np.uint8))
files = {
    "baseline": (smooth, {"subsampling": 0}),
    "subsampled": (smooth, {"subsampling": 2}),
    "progressive": (smooth, {"progressive": True, "subsampling": 0}),
    "grey": (smooth.convert("L"), {}),
    "cmyk": (smooth.convert("CMYK"), {}),
}
for orientation in range(2, 9):
    exif = Image.Exif()
    exif[0x0112] = orientation
    files[f"orientation {orientation}"] = (smooth, {"exif": exif, "subsampling": 0})
results = {}
for name, (image, options) in files.items():
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90, **options)
    results[f"{name} file"] = np.frombuffer(buffer.getvalue(), np.uint8)
    decoded = ImageOps.exif_transpose(Image.open(buffer)).convert("RGB")
    results[f"{name} pixels"] = np.asarray(decoded).copy()

save_file(results, "jpeg.safetensors", metadata={"versions": json.dumps(versions)})

# Small files of every kind of JPEG that the decoder supports: sampling, sizes, codes, scans.


def encoded(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **{"quality": 85, "subsampling": 0, **options})
    return buffer.getvalue()


def frame_at(file):
    """Returns the position of the frame header, after its marker."""
    at = 2
    while file[at + 1] not in (0xC0, 0xC1, 0xC2):
        at += 2 + int.from_bytes(file[at + 2 : at + 4], "big")
    return at + 2


def with_frame(file, width, height, factors):
    """Declares another size and sampling with as many blocks for the same data, since Pillow cannot write these."""
    file, at = bytearray(file), frame_at(file)
    file[at + 3 : at + 7] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    for place, factor in enumerate(factors):
        file[at + 9 + 3 * place] = factor
    return bytes(file)


def in_three_scans(image, factors):
    """Combines three gray files into the scans of one file, with these sampling factors."""
    across, down = [max(factor >> 4 for factor in factors), max(factor & 15 for factor in factors)]
    files = []
    for plane, factor in zip(image.convert("YCbCr").split(), factors):
        size = (-(-image.width * (factor >> 4) // across), -(-image.height * (factor & 15) // down))
        files.append(encoded(plane.resize(size)))
    result = bytearray(files[0][: files[0].index(b"\xff\xda")])
    at = result.index(b"\xff\xc0")
    size = image.height.to_bytes(2, "big") + image.width.to_bytes(2, "big")
    components = b"".join(bytes([number + 1, factor, 0]) for number, factor in enumerate(factors))
    result[at : at + 13] = b"\xff\xc0\0\x11\x08" + size + b"\x03" + components
    for number, file in enumerate(files):
        scan = bytearray(file[file.index(b"\xff\xda") : -2])
        scan[5] = number + 1
        result += scan
    return bytes(result + b"\xff\xd9")


drawn = lambda width, height: Image.fromarray(picture(width, height))
flat = Image.fromarray(np.full((24, 24, 3), (200, 30, 90), np.uint8))
files = {
    "444": encoded(drawn(37, 29)),
    "422": encoded(drawn(37, 29), subsampling=1),
    "420": encoded(drawn(37, 29), subsampling=2),
    "440": with_frame(encoded(drawn(29, 37), subsampling=1), 37, 29, [0x12]),
    "411": with_frame(encoded(drawn(32, 64), subsampling=2), 37, 29, [0x41]),
    "grey": encoded(drawn(37, 29).convert("L")),
    "grey of odd factors": with_frame(encoded(drawn(17, 9).convert("L")), 17, 9, [0x22]),
    "rgb": encoded(drawn(21, 10), keep_rgb=True),
    "three scans": in_three_scans(drawn(37, 29), [0x22, 0x11, 0x11]),
    "three scans, fine blue": in_three_scans(drawn(21, 10), [0x11, 0x22, 0x12]),
    "best": encoded(drawn(16, 16), quality=100),
    "worst": encoded(drawn(40, 24), quality=1, subsampling=2),
    "flat": encoded(flat, subsampling=2),
    "optimized": encoded(drawn(16, 16), optimize=True, subsampling=2),
    "restarts 444": encoded(drawn(37, 29), restart_marker_blocks=3),
    "restarts 420": encoded(drawn(40, 24), restart_marker_blocks=1, subsampling=2),
    "progressive 444": encoded(drawn(16, 16), progressive=True),
    "progressive 420": encoded(drawn(37, 29), progressive=True, subsampling=2),
    "progressive grey": encoded(drawn(21, 10).convert("L"), progressive=True),
    "progressive restarts": encoded(drawn(37, 29), progressive=True, subsampling=1, restart_marker_blocks=4),
}
for sampling, subsampling in [("422", 1), ("420", 2)]:
    for width, height in [(1, 1), (3, 3), (4, 1), (5, 4), (8, 8), (16, 16), (65, 17)]:
        if (width, sampling) != (65, "422"):
            files[f"{sampling} of {width} x {height}"] = encoded(drawn(width, height), subsampling=subsampling)
results = {}
for name, file in files.items():
    results[f"{name} file"] = np.frombuffer(file, np.uint8)
    results[f"{name} pixels"] = np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).copy()

versions["libjpeg-turbo"] = PIL.features.version_feature("libjpeg_turbo")
save_file(results, "jpeg_kinds.safetensors", metadata={"versions": json.dumps(versions)})
