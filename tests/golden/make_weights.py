"""Write small weight files with `torch.save`, and their contents as safetensors.

    pip install torch timm numpy safetensors
    python tests/golden/make_weights.py
    python tests/golden/make_weights.py --large h14 FILE

Writes `weights/*.pth`, each below 30 kB, `weights/tensors.safetensors` with their tensors as PyTorch
reads them, contiguous and in float32, under the names `FILE.TENSOR`, and `weights/versions.json`.
`deit3.safetensors` holds a timm model with DeiT-3's layout, images and timm's logits for them.
`advxl.pth` has the names and relative shapes of AdvXL's released ViT-H/14: class token, mean pooling,
`fc_norm` and no `norm`. `hostile.pth` calls `os.system` when it is unpickled with full trust, which no
code here does.

With `--large` it writes only one file, with the names and shapes of AdvXL's ViT-H/14 or ViT-g/14 at 336
pixels (2.5 and 4.1 GB) and random weights.
"""

import argparse
import json
import os
from collections import OrderedDict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import save_file

FOLDER = Path(__file__).resolve().parent / "weights"
SEED = 14


def transformer(width, depth, hidden, patch, tokens, classes):
    """Returns random weights with timm's names, as in AdvXL's released files."""

    def random(*shape):
        return torch.randn(shape) * 0.1

    weights = OrderedDict(cls_token=random(1, 1, width), pos_embed=random(1, tokens, width))

    def layer(name, *shape):
        weights[f"{name}.weight"] = random(*shape)
        weights[f"{name}.bias"] = random(shape[0])

    layer("patch_embed.proj", width, 3, patch, patch)
    for block in range(depth):
        name = f"blocks.{block}"
        layer(f"{name}.norm1", width)
        layer(f"{name}.attn.qkv", 3 * width, width)
        layer(f"{name}.attn.proj", width, width)
        layer(f"{name}.norm2", width)
        layer(f"{name}.mlp.fc1", hidden, width)
        layer(f"{name}.mlp.fc2", width, hidden)
    layer("fc_norm", width)
    layer("head", classes, width)
    return weights


class Code:
    """Pickles as a function call, as malicious files do."""

    def __reduce__(self):
        return os.system, ("echo this must never run",)


# (width, depth, hidden, patch, tokens, classes): 576 patches and the class token.
LARGE = {"h14": (1280, 32, 5120, 14, 577, 1000), "g14": (1408, 40, 6144, 14, 577, 1000)}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--large", nargs=2, metavar=("SIZE", "FILE"), help="h14 or g14")
    large = parser.parse_args().large
    torch.manual_seed(SEED)
    if large:
        torch.save(transformer(*LARGE[large[0]]), large[1])
        return
    FOLDER.mkdir(exist_ok=True)
    tensors = {}

    def record(file, weights):
        for name, tensor in weights.items():
            tensors[f"{file}.{name}"] = tensor.detach().float().clone().contiguous()

    def save(file, content, **options):
        torch.save(content, FOLDER / f"{file}.pth", **options)

    plain = {"a": torch.randn(3, 4), "b.c": torch.randn(5), "empty": torch.zeros(0, 2)}
    plain["one"] = torch.tensor(1.5)
    save("plain", plain)
    record("plain", plain)

    # Like files of training programs: the weights among other objects.
    weights = {"a": torch.nn.Parameter(torch.randn(2, 3)), "double": torch.randn(4).double()}
    model = torch.nn.ParameterDict({"w": torch.nn.Parameter(torch.randn(3))})
    optimizer = torch.optim.AdamW(model.parameters())
    model["w"].sum().backward()
    optimizer.step()
    content = {
        "epoch": 3,
        "args": argparse.Namespace(lr=1e-3, out=Path("runs"), layers=[1, {"x": None}], big=2**80),
        "best": np.float64(71.5),
        "when": np.arange(3),
        "optimizer": optimizer.state_dict(),
        "state_dict": weights,
    }
    save("wrapped", content)
    record("wrapped", weights)

    # Pickle protocol 4 has different opcodes for text, names and the memo.
    save("protocol4", content, pickle_protocol=4)

    average = OrderedDict((f"module.base_model.{name}", torch.randn(4)) for name in "xyz")
    average._metadata = {"": {"version": 1}}
    last = OrderedDict((name, torch.zeros_like(tensor)) for name, tensor in average.items())
    save("average", {"state_dict": last, "state_dict_ema": average, "scaler": None})
    record("average", {name.removeprefix("module.base_model."): t for name, t in average.items()})

    half = {"f16": torch.randn(3, 3).half(), "bf16": torch.randn(3, 3).bfloat16()}
    half["i64"] = torch.arange(3)
    save("half", half)
    record("half", {name: half[name] for name in ["f16", "bf16"]})

    base = torch.randn(6, 8)
    views = {
        "whole": base,
        "turned": base.t(),
        "row": base[2],
        "column": base[:, 3],
        "part": base[1:5:2, 2:7],
        "blocks": base.reshape(2, 3, 2, 4).permute(2, 0, 3, 1),
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    }
    save("views", views)
    record("views", views)

    advxl = transformer(width=12, depth=2, hidden=48, patch=2, tokens=10, classes=5)
    save("advxl", advxl)
    record("advxl", advxl)

    save("hostile", {"a": torch.zeros(2), "more": Code()})
    save("old", plain, _use_new_zipfile_serialization=False)
    save("module", torch.nn.Linear(2, 2))
    # 16 TB of numbers in a file of 1 kB.
    save("endless", {"a": torch.zeros(1).expand(1 << 21, 1 << 21)})

    # Common variants: compiled, in a wrapper of another name, with a normalization layer, several models at once.
    pair = {"a.weight": torch.randn(2, 3), "b.bias": torch.randn(2)}
    compiled = {f"module._orig_mod.model.{name}": tensor for name, tensor in pair.items()}
    compiled |= {"module._orig_mod.normalize.mean": torch.tensor([0.5, 0.25, 0.125]).view(1, 3, 1, 1)}
    compiled |= {"module._orig_mod.normalize.std": torch.tensor([0.2, 0.3, 0.4]).view(1, 3, 1, 1)}
    save("compiled", {"net": compiled, "acc": torch.tensor(0.9), "optimizer": {"state": {"a": pair["b.bias"]}}})
    record("compiled", pair)
    save("distilled", {"epoch": 1, "student": last, "teacher": {f"module.{n}": t for n, t in pair.items()}})
    record("distilled", pair)
    other = {name: tensor + 1 for name, tensor in pair.items()}
    save("several", {"generator": pair, "inner": {"critic": other}, "lr_scheduler": {"w": pair["b.bias"]}})

    # DeiT-3: no position embedding for the class token, layer scale.
    model = timm.models.VisionTransformer(
        img_size=8, patch_size=2, embed_dim=12, depth=2, num_heads=3, mlp_ratio=2, num_classes=5,
        no_embed_class=True, init_values=1e-6,
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.3)
        images = torch.rand(2, 3, 8, 8)
        logits = model.double().eval()((images.double() - 0.5) / 0.25).float()
    deit3 = {name: tensor.float().contiguous() for name, tensor in model.state_dict().items()}
    save_file(deit3 | {"images": images, "logits": logits}, FOLDER / "deit3.safetensors")

    save_file(tensors, FOLDER / "tensors.safetensors")
    versions = {name: version(name) for name in ["torch", "timm", "numpy", "safetensors"]} | {"seed": SEED}
    (FOLDER / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")


if __name__ == "__main__":
    main()
