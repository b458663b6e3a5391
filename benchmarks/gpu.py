#!/usr/bin/env python3
"""An adversarial training step in PyTorch as its users would write it for speed: the other side of `scripts/gpu-check speed`.

timm's models, bf16 autocast, fused attention, fused AdamW, and in the attack gradients of the images alone: weights want none there.
Prints one JSON object for eager and one for compiled execution, with the fields of `advxl bench step`.
"""

import argparse
import json
import time

import timm
import torch
import torch.nn.functional as F

EPSILON = 4 / 255
MODELS = {
    "vit_s16": "vit_small_patch16_224",
    "vit_b16": "vit_base_patch16_224",
    "vit_l16": "vit_large_patch16_224",
    "vit_l14": "vit_large_patch14_clip_224",
    "vit_h14": "vit_huge_patch14_224",
}

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", choices=MODELS, required=True)
parser.add_argument("--image-size", type=int, required=True)
parser.add_argument("--batch", type=int, required=True)
parser.add_argument("--attack-steps", type=int, required=True)
parser.add_argument("--classes", type=int, default=1000)
parser.add_argument("--repeats", type=int, default=10)
a = parser.parse_args()

device = torch.device("cuda")
torch.manual_seed(0)
torch.set_float32_matmul_precision("high")
images = torch.rand(a.batch, 3, a.image_size, a.image_size, device=device)
labels = torch.randint(0, a.classes, (a.batch,), device=device)

for compiled in (False, True):
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    extra = {"pre_norm": False} if a.model == "vit_l14" else {}
    model = timm.create_model(MODELS[a.model], img_size=a.image_size, num_classes=a.classes, **extra).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    call = torch.compile(model) if compiled else model

    def loss(images):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return F.cross_entropy(call(images).float(), labels)

    def step():
        model.requires_grad_(False)
        delta = torch.empty_like(images).uniform_(-EPSILON, EPSILON)
        for _ in range(a.attack_steps):
            delta.requires_grad_(True)
            (gradient,) = torch.autograd.grad(loss((images + delta).clamp(0, 1)), [delta])
            delta = (delta.detach() + EPSILON * gradient.sign()).clamp(-EPSILON, EPSILON)
        model.requires_grad_(True)
        optimizer.zero_grad(set_to_none=True)
        loss((images + delta).clamp(0, 1)).backward()
        optimizer.step()

    for _ in range(3):
        step()
    seconds = []
    for _ in range(a.repeats):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    median = sorted(seconds)[len(seconds) // 2]
    print(
        json.dumps(
            {
                "program": f"pytorch {torch.__version__}{' compiled' if compiled else ''}",
                "device": torch.cuda.get_device_name(),
                "precision": "bf16",
                "model": a.model,
                "image_size": a.image_size,
                "batch": a.batch,
                "attack_steps": a.attack_steps,
                "seconds_per_step": round(median, 5),
                "images_per_second": round(a.batch / median, 1),
                "device_memory_mib": torch.cuda.max_memory_allocated() >> 20,
            }
        ),
        flush=True,
    )
    del model, optimizer, call
