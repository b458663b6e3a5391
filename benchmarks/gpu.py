#!/usr/bin/env python3
"""Time an adversarial training step in PyTorch, written for speed: the baseline of `scripts/gpu-check speed`.

timm's models, bf16 autocast, fused attention, fused AdamW, and no weight gradients in the attack. Modes are eager
execution and those of torch.compile: `compiled` is its default, `reduce-overhead` replays CUDA graphs, `max-autotune`
also times kernels. Prints one JSON object for each step and mode with the fields of `advxl bench step`, or `error` if a
mode fails or exceeds its time limit.
"""

import argparse
import gc
import json
import signal
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
    "convnext_tiny": "convnext_tiny",
    "convnext_base": "convnext_base",
}
# advxl's vit_micro: no timm model has these sizes.
MICRO = {"patch_size": 4, "embed_dim": 192, "depth": 9, "num_heads": 3}
MODES = {
    "eager": None,
    "compiled": {},
    "reduce-overhead": {"mode": "reduce-overhead"},
    "max-autotune": {"mode": "max-autotune"},
}

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument(
    "works", nargs="*", metavar="MODEL,SIZE,BATCH,STEPS", help="steps to time, in order; or set one step with the options"
)
parser.add_argument("--model", choices=[*MODELS, "vit_micro"])
parser.add_argument("--image-size", type=int)
parser.add_argument("--batch", type=int)
parser.add_argument("--attack-steps", type=int)
parser.add_argument("--classes", type=int, default=1000)
parser.add_argument("--repeats", type=int, default=10)
parser.add_argument("--modes", default="eager,compiled", help=f"comma-separated list of {', '.join(MODES)}")
parser.add_argument("--limit", type=int, default=300, help="time limit for each mode, including compilation, in seconds")
a = parser.parse_args()
modes = a.modes.split(",")
if unknown := [mode for mode in modes if mode not in MODES]:
    parser.error(f"unknown mode `{unknown[0]}`, expected one of {', '.join(MODES)}")


class Work:
    """A training step with one model, image size, batch size and attack."""

    def __init__(self, model, image_size, batch, attack_steps):
        if model not in [*MODELS, "vit_micro"]:
            parser.error(f"unknown model `{model}`, expected one of {', '.join([*MODELS, 'vit_micro'])}")
        self.model, self.image_size, self.batch, self.attack_steps = model, int(image_size), int(batch), int(attack_steps)

    def make_model(self):
        if self.model == "vit_micro":
            return timm.models.VisionTransformer(img_size=self.image_size, num_classes=a.classes, **MICRO)
        extra = {"pre_norm": False} if self.model == "vit_l14" else {}
        if not self.model.startswith("convnext"):
            extra["img_size"] = self.image_size
        return timm.create_model(MODELS[self.model], num_classes=a.classes, **extra)

    def measure(self, options):
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        images = torch.rand(self.batch, 3, self.image_size, self.image_size, device=device)
        labels = torch.randint(0, a.classes, (self.batch,), device=device)
        model = self.make_model().to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        call = model if options is None else torch.compile(model, **options)

        def loss(images):
            with torch.autocast("cuda", dtype=torch.bfloat16):
                return F.cross_entropy(call(images).float(), labels)

        def step():
            model.requires_grad_(False)
            delta = torch.empty_like(images).uniform_(-EPSILON, EPSILON)
            for _ in range(self.attack_steps):
                delta.requires_grad_(True)
                (gradient,) = torch.autograd.grad(loss((images + delta).clamp(0, 1)), [delta])
                delta = (delta.detach() + EPSILON * gradient.sign()).clamp(-EPSILON, EPSILON)
            model.requires_grad_(True)
            optimizer.zero_grad(set_to_none=True)
            loss((images + delta).clamp(0, 1)).backward()
            optimizer.step()

        for _ in range(4):
            step()
        seconds = []
        for _ in range(a.repeats):
            torch.cuda.synchronize()
            begun = time.perf_counter()
            step()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begun)
        median = sorted(seconds)[len(seconds) // 2]
        return {
            "seconds_per_step": round(median, 5),
            "images_per_second": round(self.batch / median, 1),
            "device_memory_mib": torch.cuda.max_memory_allocated() >> 20,
        }


def out_of_time(*_):
    raise TimeoutError(f"not finished within {a.limit} s")


given = [work.split(",") for work in a.works] or [[a.model, a.image_size, a.batch, a.attack_steps]]
if wrong := [work for work in given if len(work) != 4 or None in work]:
    parser.error(f"expected MODEL,SIZE,BATCH,STEPS or all four options, got {wrong[0]}")
works = [Work(*work) for work in given]
device = torch.device("cuda")
torch.manual_seed(0)
torch.set_float32_matmul_precision("high")
signal.signal(signal.SIGALRM, out_of_time)
for work, mode in [(work, mode) for work in works for mode in modes]:
    begun = time.perf_counter()
    signal.alarm(a.limit)
    try:
        found = work.measure(MODES[mode])
    except Exception as error:  # A failing mode is a result too.
        found = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    signal.alarm(0)
    line = {
        "program": f"pytorch {torch.__version__}{'' if mode == 'eager' else ' ' + mode}",
        "device": torch.cuda.get_device_name(),
        "precision": "bf16",
        **vars(work),
        **found,
        "seconds_in_all": round(time.perf_counter() - begun, 1),
    }
    print(json.dumps(line), flush=True)
