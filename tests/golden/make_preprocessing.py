"""Record what the evaluation transforms of timm and open_clip compute from small images: preprocessing.safetensors.

    pip install torch torchvision timm pillow numpy safetensors
    cd tests/golden && python make_preprocessing.py

timm's transforms are made by its `create_transform`. open_clip's `image_transform` is rebuilt here from the classes
that it takes from timm (`ResizeKeepRatio`, `CenterCropOrPad`) and torchvision, so that open_clip need not be installed.
`crop` is torchvision's `CenterCrop` alone.
Tensors are named after resize mode, border color, filter, size of the input, image size and crop fraction.
"""

import json

import numpy as np
import PIL
import timm
import torchvision
from PIL import Image
from safetensors.numpy import save_file
from timm.data import create_transform
from timm.data.transforms import CenterCropOrPad, ResizeKeepRatio
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize


def picture(width, height):
    """As in make_pictures.py."""
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


def of_timm(mode, mean, interpolation, size, fraction):
    """Applies timm's transform for a model's data configuration, without the final conversion to a tensor."""
    crop_mode = {"shortest": "center", "longest": "border", "squash": "squash"}[mode]
    configuration = dict(input_size=(3, size, size), crop_pct=fraction, crop_mode=crop_mode, mean=mean)
    transform = create_transform(**configuration, interpolation=interpolation, std=(1, 1, 1))
    return Compose(transform.transforms[:-2])


def of_open_clip(mode, fill, interpolation, size):
    """Applies `image_transform(is_train=False)` of open_clip 3.3.0, which has no crop fraction."""
    mode_of = InterpolationMode(interpolation)
    if mode == "longest":
        return Compose([ResizeKeepRatio(size, interpolation=interpolation, longest=1), CenterCropOrPad(size, fill=fill)])
    if mode == "squash":
        return Resize((size, size), interpolation=mode_of)
    return Compose([Resize(size, interpolation=mode_of), CenterCrop(size)])


IMAGENET = (0.485, 0.456, 0.406)
# Odd and even remainders in both directions, smaller and larger than the result, a line of pixels, a size that Pillow 13
# shrinks along the columns first.
SIZES = [(41, 29), (29, 42), (9, 7), (16, 16), (3, 50), (20, 61)]
results = {}
for number, (width, height) in enumerate(SIZES):
    image = Image.fromarray(picture(width, height))

    def record(mode, fill, interpolation, size, fraction, transform):
        name = f"{mode} {','.join(map(str, fill))} {interpolation} {width}x{height} {size} {fraction}"
        results[name] = np.asarray(transform(image)).copy()

    filters = ["bicubic", "bilinear", "nearest", "lanczos", "hamming", "box"]
    for place, (mode, size, fraction) in enumerate(
        [("shortest", 16, 0.875), ("shortest", 15, 0.9), ("squash", 16, 0.9), ("squash", 16, 1.0), ("longest", 16, 1.0), ("longest", 15, 0.7)]
    ):
        fill = [round(255 * value) for value in IMAGENET] if mode == "longest" else [0] * 3
        interpolation = filters[(number + place) % len(filters)]
        record(mode, fill, interpolation, size, fraction, of_timm(mode, IMAGENET, interpolation, size, fraction))
    for mode, interpolation in [("longest", "bicubic"), ("squash", "bilinear"), ("shortest", "bicubic")]:
        record(mode, [0] * 3, interpolation, 12, 1.0, of_open_clip(mode, 0, interpolation, 12))
    for size in [12, 15]:
        record("crop", [0] * 3, "bilinear", size, 1.0, CenterCrop(size))

versions = {"pillow": PIL.__version__, "torchvision": torchvision.__version__, "timm": timm.__version__}
save_file(results, "preprocessing.safetensors", metadata={"versions": json.dumps(versions)})
