#!/usr/bin/env python3
"""Compare AutoAttack of advxl and of pyautoattack on the same torch models and images, in turn.

    python3 -m venv .venv && .venv/bin/pip install torch timm pyautoattack ./advxl-*.whl
    .venv/bin/python benchmarks/python_autoattack.py --data cifar-10-batches-bin

Trains a CNN, a ViT and a ConvNeXt for a few minutes (FGSM adversarial training; saved in --models), then attacks each
in three norms with the standard version. Prints, for each program, the number of robust images, the images passed
forward and backward, the total seconds, and the seconds spent in the model and its gradients; then the number of images
on which the verdicts of the programs differ, and on which those of two seeds of each program differ. Fails if a
returned image is outside its ball or does not get the verdict claimed.
"""

import argparse
import glob
import os
import time

import numpy as np
import torch
from torch import nn

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", required=True, help="a folder of CIFAR-10 binary files, or `synthetic` for blobs of color")
parser.add_argument("--device", default="cpu")
parser.add_argument("--models", default="python_autoattack_models", help="folder for the trained models")
parser.add_argument("--images", type=int, default=64)
parser.add_argument("--bs", type=int, default=64)
parser.add_argument("--only", default="cnn,vit,convnext")
parser.add_argument("--norms", default="Linf,L2,L1")
parser.add_argument("--version", default="standard")
parser.add_argument("--seeds", type=int, default=1, help="number of seeds for each program")
a = parser.parse_args()

EPSILON = {"Linf": 8 / 255, "L2": 0.5, "L1": 12.0}


def images(split):
    if a.data == "synthetic":
        generator = torch.Generator().manual_seed(split == "test")
        y = torch.randint(10, (4096 if split == "train" else 1024,), generator=generator)
        colors = torch.rand(10, 3, 4, 4, generator=torch.Generator().manual_seed(9))
        blobs = nn.functional.interpolate(colors[y], 32, mode="bilinear")
        return (0.3 + 0.4 * blobs + 0.1 * torch.randn(len(y), 3, 32, 32, generator=generator)).clamp(0, 1), y
    files = sorted(glob.glob(os.path.join(a.data, "*.bin")))
    files = [file for file in files if ("test" in os.path.basename(file)) == (split == "test")]
    rows = np.concatenate([np.fromfile(file, dtype=np.uint8).reshape(-1, 3073) for file in files])
    pixels = rows[:, 1:].reshape(-1, 3, 32, 32)
    return torch.from_numpy(pixels).float() / 255, torch.from_numpy(rows[:, 0]).long()


def made(name):
    torch.manual_seed(0)
    if name == "cnn":
        layers = [nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU()]
        layers += [nn.Conv2d(64, 64, 3, 1, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 10)]
        return nn.Sequential(*layers)
    import timm

    if name == "vit":
        return timm.models.VisionTransformer(img_size=32, patch_size=4, embed_dim=96, depth=4, num_heads=3, num_classes=10)
    return timm.models.ConvNeXt(num_classes=10, depths=(1, 1, 2, 1), dims=(24, 48, 96, 128), patch_size=2)


def trained(name, epochs=3):
    path = os.path.join(a.models, f"{name}.pth")
    model = made(name)
    if os.path.isfile(path):
        model.load_state_dict(torch.load(path))
        return model.eval().to(a.device)
    model.to(a.device)
    x, y = (part.to(a.device) for part in images("train"))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(epochs):
        order = torch.randperm(len(x))
        for at in range(0, len(x) - 127, 128):
            clean, labels = x[order[at : at + 128]], y[order[at : at + 128]]
            moved = (clean + (torch.rand_like(clean) * 2 - 1) * 4 / 255).clamp(0, 1).requires_grad_()
            (slope,) = torch.autograd.grad(nn.functional.cross_entropy(model(moved), labels), moved)
            moved = (clean + (moved - clean + 5 / 255 * slope.sign()).clamp(-4 / 255, 4 / 255)).clamp(0, 1).detach()
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(moved), labels).backward()
            optimizer.step()
    os.makedirs(a.models, exist_ok=True)
    torch.save(model.state_dict(), path)
    return model.eval()


def synchronize():
    if a.device != "cpu":
        torch.cuda.synchronize()


class Measured(nn.Module):
    """Counts the images passed forward and backward, and the seconds of the forward passes."""

    def __init__(self, model):
        super().__init__()
        self.model, self.forwards, self.backwards, self.seconds = model, 0, 0, 0.0
        self.eval()

    def forward(self, x):
        synchronize()
        begun = time.perf_counter()
        logits = self.model(x)
        synchronize()
        self.seconds += time.perf_counter() - begun
        self.forwards += len(x)
        self.backwards += len(x) if logits.requires_grad else 0
        return logits


_autograd = torch.autograd.grad
in_gradients = [0.0]


def timed_gradient(*arguments, **keywords):
    synchronize()
    begun = time.perf_counter()
    found = _autograd(*arguments, **keywords)
    synchronize()
    in_gradients[0] += time.perf_counter() - begun
    return found


def attacked(program, model, norm, x, y, seed):
    measured = Measured(model)
    in_gradients[0] = 0.0
    begun = time.perf_counter()
    if program == "advxl":
        import advxl

        adversary = advxl.AutoAttack(measured, norm=norm, eps=EPSILON[norm], seed=seed, version=a.version, verbose=False)
        found = adversary.run_standard_evaluation(x, y, bs=a.bs)
    else:
        import pyautoattack

        adversary = pyautoattack.AutoAttack(
            measured, norm=norm, eps=EPSILON[norm], seed=seed, version=a.version, device=a.device
        )
        found, _ = adversary.run_standard_evaluation(x, y, batch_size=a.bs)
    seconds = time.perf_counter() - begun
    with torch.no_grad():
        robust = model(found).argmax(1) == y
    if program == "advxl":
        assert robust.tolist() == adversary.result.robust, "the model does not confirm the verdict of an image"
    moved = (found - x).flatten(1)
    longest = {"Linf": moved.abs().amax(1), "L2": moved.norm(dim=1), "L1": moved.abs().sum(1)}[norm].max().item()
    assert longest <= EPSILON[norm] * (1 + 1e-5) + 1e-6, f"{program}: perturbation {longest} exceeds epsilon"
    return robust, measured, seconds, in_gradients[0]


torch.autograd.grad = timed_gradient
x, y = (part[: a.images].to(a.device) for part in images("test"))
print(f"torch {torch.__version__} on {a.device}, {torch.get_num_threads()} threads, {a.images} images, {a.version}")
print("| model | norm | program | clean | robust | forward | backward | seconds | in the model | overhead |")
print("|---|---|---|---|---|---|---|---|---|---|")
summary = []
for name in a.only.split(","):
    model = trained(name)
    with torch.no_grad():
        clean = (model(x).argmax(1) == y).sum().item()
    for norm in a.norms.split(","):
        verdicts, times, counts = {}, {}, {}
        for seed in range(a.seeds):
            for program in ["advxl", "pyautoattack"]:
                robust, measured, seconds, gradients = attacked(program, model, norm, x, y, seed)
                inside = measured.seconds + gradients
                verdicts[program, seed] = robust
                times.setdefault(program, []).append(seconds)
                counts[program] = (measured.forwards, measured.backwards)
                print(
                    f"| {name} | {norm} | {program} | {clean} | {robust.sum().item()} | {measured.forwards} | "
                    f"{measured.backwards} | {seconds:.1f} | {inside:.1f} | {100 * (seconds - inside) / inside:.0f} % |",
                    flush=True,
                )
        differ = (verdicts["advxl", 0] != verdicts["pyautoattack", 0]).sum().item()
        own = [
            (verdicts[program, 0] != verdicts[program, seed]).sum().item()
            for program in ["advxl", "pyautoattack"]
            for seed in range(1, a.seeds)
        ]
        ratio = np.median(times["pyautoattack"]) / np.median(times["advxl"])
        summary.append(f"| {name} | {norm} | {ratio:.2f} | {differ} | {', '.join(map(str, own)) or '-'} |")
print("\n| model | norm | times as fast | differing verdicts | between seeds of advxl, of pyautoattack |")
print("|---|---|---|---|---|")
print("\n".join(summary))
