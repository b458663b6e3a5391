"""Logits and input gradients of advxl and timm on the same weights, both ways; see scripts/parity.

Theirs in ours: timm makes a model with random weights, written as a folder that Hugging Face users know, and
advxl predicts with it. Ours in timm: advxl trains for some updates, exports, and timm loads the folder as it is.
Differences are relative to the largest entry. Input gradients are those of the summed cross entropy.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

ADVXL = sys.argv[1]
LOGITS, GRADIENTS = 1e-4, 1e-3

# (name in the table, timm's architecture, arguments)
THEIRS = [
    ("ViT-Ti/16, class token", "vit_tiny_patch16_224", {}),
    ("ViT-S/16, class token", "vit_small_patch16_224", {}),
    ("ViT-S/32, class token", "vit_small_patch32_224", {}),
    ("ViT-B/16, class token", "vit_base_patch16_224", {}),
    ("ViT-B/16, mean of patches", "vit_base_patch16_224", {"global_pool": "avg"}),
    ("ViT-B/16, mean, no class token", "vit_base_patch16_224", {"global_pool": "avg", "class_token": False}),
    ("ViT-B/16, tanh GELU", "vit_base_patch16_224", {"act_layer": "gelu_tanh"}),
    ("ViT-L/16, mean of patches", "vit_large_patch16_224", {"global_pool": "avg"}),
]

RECIPE = """
seed = 1
precision = "f32"
model = {{ size = "vit_micro", width = 96, depth = 3, heads = 3, hidden = 384, {model} }}
data = {{ train = "synthetic:200", test = "synthetic:64" }}
average = {{ decay = 0.9 }}
checkpoint = {{ every_samples = 640, keep = 2 }}
log = {{ every_samples = 320 }}

[[stage]]
name = "train"
batch = 32
phases = [{{ image_size = 32, samples = 640 }}]
attack = {{ norm = "linf", epsilon = "8/255", step_size = "8/255", steps = 1, start = "random" }}
loss = {{ kind = "cross_entropy" }}
optimizer = {{ kind = "adamw", weight_decay = 0.05, betas = [0.9, 0.95] }}
learning_rate = {{ peak = 1e-3, warmup_samples = 64, decay = "cosine" }}
augmentation = {{ flip = true }}
"""

OURS = [
    ("average, fixed positions", 'pool = "average", class_token = false, position = "sincos2d"'),
    ("average, class token, learned positions", 'pool = "average", class_token = true, position = "learned"'),
    ("class token, learned positions", 'pool = "token", class_token = true, position = "learned"'),
    ("class token, tanh GELU", 'pool = "token", class_token = true, position = "learned", gelu = "tanh"'),
]


def run(*arguments):
    subprocess.run([ADVXL, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def of_timm(model, images, labels):
    """Logits and input gradients; normalisation as the model's configuration says."""
    config = model.pretrained_cfg
    mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    pixels = images.clone().requires_grad_()
    logits = model.eval()((pixels - mean) / std)
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), pixels)
    return logits.detach(), gradient


def of_advxl(folder, images, labels, scratch):
    data, out = scratch / "images.safetensors", scratch / "out.safetensors"
    save_file({"images": images.contiguous(), "labels": labels}, data)
    run("predict", folder, "--data", f"tensors:{data}", "--gradient", "--out", out)
    found = load_file(out)
    return found["logits"], found["gradients"]


def off(found, right):
    return ((found - right).abs().max() / right.abs().max()).item()


def theirs(architecture, arguments, folder):
    """A timm model with random weights in a folder as timm writes it."""
    torch.manual_seed(0)
    model = timm.create_model(architecture, pretrained=False, **arguments)
    with torch.no_grad():  # timm begins with a head of zeros and small weights: logits would tell nothing
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.02)
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    config = {
        "architecture": architecture,
        "num_classes": model.num_classes,
        "model_args": arguments,
        "pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    }
    model.pretrained_cfg = model.pretrained_cfg | {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    (folder / "config.json").write_text(json.dumps(config))
    return model


def ours(model, folder):
    """A model of ours, some updates old, exported."""
    recipe = folder.with_suffix(".toml")
    recipe.write_text(RECIPE.format(model=model))
    run("train", recipe, "--out", folder.with_suffix(".run"))
    run("export", folder.with_suffix(".run"), "--to", "timm", "--out", folder)
    return timm.create_model(f"local-dir:{folder}", pretrained=True)


def main():
    print(f"timm {timm.__version__}, torch {torch.__version__}\n")
    print("| from | model | image | logits off by | input gradients off by |\n|---|---|---|---|---|")
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        cases = [("timm", name, (architecture, arguments)) for name, architecture, arguments in THEIRS]
        cases += [("advxl", name, model) for name, model in OURS]
        for number, (origin, name, made) in enumerate(cases):
            folder = scratch / f"model{number}"
            model = theirs(*made, folder) if origin == "timm" else ours(made, folder)
            size = 224 if origin == "timm" else 32
            generator = torch.Generator().manual_seed(number)
            images = torch.rand(4, 3, size, size, generator=generator)
            labels = torch.randint(0, model.num_classes, (4,), generator=generator)
            right = of_timm(model, images, labels)
            found = of_advxl(folder, images, labels, scratch)
            logits, gradients = (off(a, b) for a, b in zip(found, right))
            failed |= logits > LOGITS or gradients > GRADIENTS
            print(f"| {origin} | {name} | {size} | {logits:.1e} | {gradients:.1e} |", flush=True)
    if failed:
        sys.exit(f"some differ by more than {LOGITS} in logits or {GRADIENTS} in gradients")


if __name__ == "__main__":
    main()
