#!/usr/bin/env python3
"""Measure whether FP8 attack passes cost robustness: the CIFAR-10 recipe with attacks in f32 and in FP8, per seed.

    benchmarks/fp8_attacks.py --data DATA --out RUNS [--seeds 3] [--share 4] [--device cpu]

Trains recipes/cifar10_micro.toml twice per seed, with `attack.precision` "f32" and "fp8" and everything else equal. On
CPUs the program emulates FP8; an H100 or H200 (--device cuda) supports it. Every trained model is evaluated in f32:
clean, PGD-20, and the worst case of apgd-ce and apgd-t. Prints a table of means and of differences paired by seed, with
95 % intervals of Student's t. Runs resume, and finished ones are reused, so the command can be interrupted and
repeated.

--share 4 trains on a fourth of the samples of each stage; 1 trains the whole recipe.
"""

import argparse
import json
import math
import os
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
RECIPE = os.path.join(HERE, "../recipes/cifar10_micro.toml")
PRECISIONS = ("f32", "fp8")
# 97.5 % points of Student's t, by degrees of freedom.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", required=True, help="a folder of CIFAR-10 binary files")
parser.add_argument("--out", required=True, help="folder for the runs")
parser.add_argument("--program", default=os.path.join(HERE, "../target/release/advxl"))
parser.add_argument("--seeds", type=int, default=3, choices=range(2, 11))
parser.add_argument("--share", type=int, default=4)
parser.add_argument("--device", default="cpu")
parser.add_argument("--pgd-images", type=int, default=1000)
parser.add_argument("--apgd-images", type=int, default=128)
a = parser.parse_args()


def call(*command):
    done = subprocess.run(command, stdout=subprocess.DEVNULL)
    if done.returncode != 0:
        sys.exit(f"`{' '.join(command)}` failed with exit code {done.returncode}")


def samples(whole, batch):
    return whole // a.share // batch * batch


def final(name, images, attacks):
    return f'{{ name = "{name}", images = {images}, attacks = {json.dumps(attacks)}, norm = "linf", epsilon = "8/255" }}'


def train(seed, precision):
    run = os.path.join(a.out, f"seed{seed}-{precision}")
    batch = 32
    settings = {
        "seed": seed,
        "precision": '"f32"',
        "data.train": json.dumps(a.data),
        "data.test": json.dumps(a.data),
        "evaluation.every_samples": 10**9,
        "final_evaluation": "[" + final("pgd", a.pgd_images, ["pgd"]) + ", " + final("apgd", a.apgd_images, ["apgd-ce", "apgd-t"]) + "]",
        "stage.pretrain.attack.precision": json.dumps(precision),
        "stage.finetune.attack.precision": json.dumps(precision),
        "stage.pretrain.phases": f"[{{ image_size = 16, samples = {samples(226_560, batch)} }}]",
        "stage.finetune.phases": f"[{{ image_size = 32, samples = {samples(30_208, batch)} }}]",
        "stage.pretrain.learning_rate.warmup_samples": samples(10_240, batch),
        "stage.finetune.learning_rate.warmup_samples": samples(1_536, batch),
    }
    overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    call(a.program, "train", RECIPE, "--out", run, "--device", a.device, *overrides)
    return run


def accuracies(run, name):
    """Returns accuracies in percent: clean, then after each attack."""
    with open(os.path.join(run, f"result-{name}.json")) as file:
        return [100 * stage["robust_accuracy"] for stage in json.load(file)["stages"]]


measures = {"clean": [], "PGD-20": [], "apgd-ce + apgd-t": []}
for seed in range(a.seeds):
    found = {name: {} for name in measures}
    for precision in PRECISIONS:
        run = train(seed, precision)
        found["clean"][precision], found["PGD-20"][precision] = accuracies(run, "pgd")
        found["apgd-ce + apgd-t"][precision] = accuracies(run, "apgd")[-1]
    for name in measures:
        measures[name].append([found[name][precision] for precision in PRECISIONS])
    print(f"seed {seed}: {json.dumps(found)}", file=sys.stderr)

print("| | images | attacks in f32, % | attacks in FP8, % | difference, points | 95 % interval |")
print("|---|---|---|---|---|---|")
for name, pairs in measures.items():
    count = len(pairs)
    differences = [fp8 - f32 for f32, fp8 in pairs]
    mean = sum(differences) / count
    deviation = math.sqrt(sum((d - mean) ** 2 for d in differences) / (count - 1))
    half = STUDENT[count - 1] * deviation / math.sqrt(count)
    columns = [sum(column) / count for column in zip(*pairs)]
    images = a.apgd_images if name.startswith("apgd") else a.pgd_images
    row = [name, images, *(f"{value:.2f}" for value in columns), f"{mean:+.2f}", f"{mean - half:+.2f} to {mean + half:+.2f}"]
    print("| " + " | ".join(str(cell) for cell in row) + " |")
