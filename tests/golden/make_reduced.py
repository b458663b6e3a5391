"""Record what Pillow's draft mode decodes from the files of jpeg_kinds.safetensors at 1/2, 1/4 and 1/8 scale.

Writes jpeg_reduced.safetensors. Run in this folder, with pillow, numpy and safetensors installed:

    python make_reduced.py
"""

import io
import json

import numpy as np
import PIL.features
from PIL import Image
from safetensors.numpy import load_file, save_file

results = {}
for name, file in sorted(load_file("jpeg_kinds.safetensors").items()):
    if not name.endswith(" file"):
        continue
    for reduction in (2, 4, 8):
        image = Image.open(io.BytesIO(file.tobytes()))
        width, height = image.size
        # Draft picks the largest reduction that keeps at least the requested size.
        image.draft(None, (max(1, width // reduction), max(1, height // reduction)))
        if image.size != (-(-width // reduction), -(-height // reduction)):
            continue
        pixels = np.asarray(image.convert("RGB"))
        results[f"{name.removesuffix(' file')} 1/{reduction}"] = pixels.copy()

versions = {"pillow": PIL.__version__, "libjpeg-turbo": PIL.features.version("libjpeg_turbo")}
save_file(results, "jpeg_reduced.safetensors", metadata={"versions": json.dumps(versions)})
print(len(results), versions)
