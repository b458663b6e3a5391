#!/usr/bin/env python3
"""Compare one adversarial training step in PyTorch and in advxl, in turn: the ratio of their images per second.

    cargo build --release
    python3 -m venv .venv && .venv/bin/pip install torch numpy
    .venv/bin/python benchmarks/against_pytorch.py

PyTorch runs eagerly in f32 and in bf16 autocast, and compiled in both; the best of them counts. advxl is run with
bf16, and computes in f32, with a notice, if the CPU is not faster in bf16. Both do the same work: a ViT with class
token and learned positions, random start, k input gradients, one full gradient, AdamW. Run nothing else on the machine.

A round times a few steps of each program in turn; the result is the median of the rounds' ratios with their spread.
Variants of PyTorch that take more than 1.5 times as long as its best in the first step are not run again.
"""
import argparse, json, resource, statistics, subprocess, sys, time, warnings

import torch
import torch.nn as nn
import torch.nn.functional as F

warnings.filterwarnings("ignore")
MODELS = {  # patch, width, depth, heads
    "vit_micro": (4, 192, 9, 3),
    "vit_ti16": (16, 192, 12, 3),
    "vit_s16": (16, 384, 12, 6),
    "vit_b16": (16, 768, 12, 12),
    "vit_l16": (16, 1024, 24, 16),
}
WORK = [  # model, pixels, batch, attack steps, attack alone in f32
    ("vit_s16", 112, 32, 1, False),
    ("vit_b16", 112, 8, 1, False),
    ("vit_s16", 224, 8, 3, False),
    ("vit_micro", 32, 64, 1, False),
    ("vit_micro", 32, 128, 1, True),
    ("convnext_tiny", 112, 8, 1, False),
]
CONVNEXTS = {  # width of the first stage, depths
    "convnext_atto": (40, (2, 2, 6, 2)),
    "convnext_tiny": (96, (3, 3, 9, 3)),
}
EPSILON = 4 / 255


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        batch, tokens, width = x.shape
        parts = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        mixed = F.scaled_dot_product_attention(*parts.permute(2, 0, 3, 1, 4))
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Vit(nn.Module):
    def __init__(self, name, size, classes=1000):
        super().__init__()
        patch, width, depth, heads = MODELS[name]
        self.embed = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, classes)

    def forward(self, images):
        x = self.embed((images - 0.5) / 0.25).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


class ConvNextBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x):
        branch = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        branch = self.gamma * self.fc2(F.gelu(self.fc1(branch)))
        return x + branch.permute(0, 3, 1, 2)


class Norm2d(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNext(nn.Module):
    def __init__(self, name, classes=1000):
        super().__init__()
        first, depths = CONVNEXTS[name]
        widths = [first << stage for stage in range(4)]
        layers = [nn.Conv2d(3, first, 4, 4), Norm2d(first, eps=1e-6)]
        for stage, (width, depth) in enumerate(zip(widths, depths)):
            if stage > 0:
                layers += [Norm2d(widths[stage - 1], eps=1e-6), nn.Conv2d(widths[stage - 1], width, 2, 2)]
            layers += [ConvNextBlock(width) for _ in range(depth)]
        self.layers = nn.Sequential(*layers)
        self.norm, self.head = nn.LayerNorm(widths[3], eps=1e-6), nn.Linear(widths[3], classes)

    def forward(self, images):
        return self.head(self.norm(self.layers((images - 0.5) / 0.25).mean((2, 3))))


def stepper(work, precision, compiled):
    """Returns a function that runs one step."""
    name, size, batch, attack_steps, attack_only = work
    torch.manual_seed(0)
    # Channels last makes PyTorch's convolutions faster on a CPU.
    model = ConvNext(name).to(memory_format=torch.channels_last) if name in CONVNEXTS else Vit(name, size)
    call = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    images, labels = torch.rand(batch, 3, size, size), torch.randint(0, 1000, (batch,))
    if name in CONVNEXTS:
        images = images.to(memory_format=torch.channels_last)

    def loss(images):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            return F.cross_entropy(call(images).float(), labels)

    def step():
        delta = torch.empty_like(images).uniform_(-EPSILON, EPSILON)
        for _ in range(attack_steps):
            delta.requires_grad_(True)
            (gradient,) = torch.autograd.grad(loss((images + delta).clamp(0, 1)), [delta])
            delta = (delta.detach() + EPSILON * gradient.sign()).clamp(-EPSILON, EPSILON)
        if not attack_only:
            optimizer.zero_grad(set_to_none=True)
            loss((images + delta).clamp(0, 1)).backward()
            optimizer.step()

    if attack_only:
        model.requires_grad_(False)
    return step


def seconds(step, count):
    times = []
    for _ in range(count):
        begun = time.perf_counter()
        step()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def ours(binary, work, threads, steps):
    name, size, batch, attack_steps, attack_only = work
    command = [binary, "--threads", str(threads), "bench", "step", "--model", name, "--image-size", str(size)]
    command += ["--batch", str(batch), "--attack-steps", str(attack_steps), "--repeats", str(steps)]
    command += ["--precision", "f32", "--attack-only"] if attack_only else ["--precision", "bf16"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def compare(arguments, work):
    variants = {("f32", False): None}
    if not work[4]:
        variants |= {("bf16", False): None, ("f32", True): None, ("bf16", True): None}
    first = {}
    for key in list(variants):
        variants[key] = stepper(work, *key)
        variants[key](), variants[key]()
        first[key] = seconds(variants[key], 1)
    for key, took in first.items():
        if took > 1.5 * min(first.values()):
            del variants[key]
    name = lambda key: key[0] + (" compiled" if key[1] else " eager")
    print(f"# {work[0]} at {work[1]}, batch {work[2]}, PGD-{work[3]}{', attack alone' if work[4] else ''}: first step of",
          ", ".join(f"{name(key)} {took:.3f} s" for key, took in first.items()), flush=True)
    ratios, rounds = [], []
    for _ in range(arguments.rounds):
        theirs = {key: seconds(step, arguments.steps) for key, step in variants.items()}
        best = min(theirs, key=theirs.get)
        mine = ours(arguments.advxl, work, arguments.threads, arguments.steps)
        ratios.append(theirs[best] / mine["seconds_per_step"])
        rounds.append((work[2] / theirs[best], name(best), mine))
    middle = sorted(range(len(ratios)), key=ratios.__getitem__)[len(ratios) // 2]
    rate, best, mine = rounds[middle]
    print(json.dumps({
        "model": work[0], "image_size": work[1], "batch": work[2], "attack_steps": work[3], "attack_only": work[4],
        "ratio": round(ratios[middle], 3), "ratios": [round(ratio, 3) for ratio in sorted(ratios)],
        "pytorch": best, "pytorch_images_per_second": round(rate, 2), "advxl": mine["precision"],
        "advxl_images_per_second": mine["images_per_second"], "share_of_peak": mine["share_of_peak"],
        "peak_gflops": mine["peak_gflops"],
    }), flush=True)
    return best


def memory(arguments, work, best):
    """Prints the peak memory of both programs for one row, each in a separate process."""
    command = [sys.executable, __file__, "--alone", best, "--row", str(WORK.index(work)), "--threads", str(arguments.threads)]
    theirs = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    mine = ours(arguments.advxl, work, arguments.threads, 3)["peak_memory_mib"]
    print(json.dumps({"peak_memory_mib": {"pytorch": theirs, "advxl": mine}, "ratio": round(mine / theirs, 3)}), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--advxl", default="target/release/advxl", help="the program")
    parser.add_argument("--row", type=int, action="append", help="run only this row, counted from 0; may be repeated")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="timed steps per round, after two warmup steps")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [WORK[row] for row in arguments.row or range(len(WORK))]
    if arguments.alone:
        precision, kind = arguments.alone.split()
        step = stepper(rows[0], precision, kind == "compiled")
        seconds(step, 3)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
        return
    print(f"# torch {torch.__version__}, {arguments.threads} threads", flush=True)
    for work in rows:
        best = compare(arguments, work)
        if work == WORK[0]:
            memory(arguments, work, best)


if __name__ == "__main__":
    main()
