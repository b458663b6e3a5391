"""Compares the objectives in small, with one seed.

    python3 benchmarks/objectives.py captions --program target/release/advxl --out RUNS
    python3 benchmarks/objectives.py cifar --program target/release/advxl --out RUNS --data DIR

`captions`: a tiny CLIP model, trained here on synthetic images and captions, is made robust by FARE, TeCoA, Sim-CLIP and
AdvFLYP and evaluated zero-shot. `cifar`: a ViT, trained adversarially on CIFAR-10 at 16 pixels, is fine-tuned at 32 with
several objectives and norms. All runs of a comparison have the same compute, counted in forward passes: a forward and
backward pass counts as two, with weight gradients as three. Runs resume: start the same command again after an
interruption. Prints a Markdown table.
"""

import argparse
import json
import re
import subprocess
from pathlib import Path

CAPTIONS = """
seed = {seed}
precision = "f32"
model = {{ size = "vit_micro", depth = 4, pool = "token", class_token = true, position = "learned", pre_norm = true }}
data = {{ train = "synthetic:12_000", test = "synthetic:1_200" }}
checkpoint = {{ every_samples = 12_800, keep = 2 }}
log = {{ every_samples = 6_400 }}

[[final_evaluation]]
name = "zero_shot"
images = 1_200
attacks = ["pgd", "apgd-ce"]
norm = "linf"
epsilon = "4/255"
"""
TEMPLATES = """["a red {} on a plain blue background", "a small green {} on a striped yellow background", \
"a large blue {} on a shaded red background", "an orange {} on a speckled green background"]"""
CAPTIONS_STAGE = """
[[stage]]
name = "{name}"
batch = 128
phases = [{{ image_size = 32, samples = {samples} }}]
objective = {objective}
text = {text}
optimizer = {{ kind = "adamw", weight_decay = {decay}, betas = [0.9, 0.98], clip_norm = 1.0 }}
learning_rate = {{ peak = {rate}, warmup_samples = 6_400, decay = "cosine" }}
augmentation = {{ pad_crop = 2, flip = false }}
{attack}
"""
CAPTIONS_ATTACK = 'attack = { norm = "linf", epsilon = "4/255", step_size = "2/255", steps = 2, start = "random" }'
CAPTIONS_PASSES = 200_000
# Objective, learning rate, and passes per image: 2 k + 3 with k = 2 steps, clean images, references.
CAPTIONS_OBJECTIVES = {
    "FARE": ('{ kind = "fare" }', 1e-4, 2 * 2 + 3 + 1),
    "TeCoA": ('{ kind = "tecoa", scale = 100 }', 1e-4, 2 * 2 + 3),
    "AdvFLYP": ('{ kind = "advflyp", scale = 100 }', 1e-4, 2 * 2 + 3 + 3 + 1),
    "Sim-CLIP": ('{ kind = "sim_clip" }', 1e-4, 2 * 2 + 3 + 3 + 1),
    "Sim-CLIP, rate 1e-5": ('{ kind = "sim_clip" }', 1e-5, 2 * 2 + 3 + 3 + 1),
}

CIFAR = """
seed = {seed}
precision = "bf16"
model = {{ size = "vit_micro", depth = 6, pool = "average", class_token = false, position = "sincos2d", position_size = 256 }}
data = {{ train = "{data}", test = "{data}" }}
average = {{ decay = 0.99 }}
checkpoint = {{ every_samples = 12_800, keep = 2 }}
log = {{ every_samples = 6_400 }}

[[stage]]
name = "{name}"
batch = 32
phases = [{{ image_size = {size}, samples = {samples} }}]
objective = {objective}
optimizer = {{ kind = "adamw", weight_decay = 0.05, betas = [0.9, 0.98], clip_norm = 1.0 }}
learning_rate = {{ peak = {rate}, warmup_samples = {warmup}, decay = "cosine" }}
augmentation = {{ pad_crop = 2, flip = true }}
{attack}
"""
NORMS = {"linf": "8/255", "l2": "0.5", "l1": "12"}
CIFAR_EVALUATION = """
[[final_evaluation]]
name = "{norm}"
images = {images}
attacks = ["apgd-ce"]
norm = "{norm}"
epsilon = "{epsilon}"
"""
CIFAR_PASSES = 69_120
LINF = '{ norm = "linf", epsilon = "8/255", step_size = "2.67/255" }'
L1 = '{ norm = "l1", epsilon = "12", step_size = "4" }'
CROSS_ENTROPY = '{ kind = "cross_entropy", label_smoothing = 0.1 }'


def pgd(*norms, combine="alternate"):
    how = f', combine = "{combine}"' if len(norms) > 1 else ""
    return f'attack = {{ norms = [{", ".join(norms)}]{how}, steps = 3, start = "random" }}'


# Objective, attack and passes per image.
CIFAR_OBJECTIVES = {
    "AT, linf": (CROSS_ENTROPY, pgd(LINF), 2 * 3 + 3),
    "TRADES, linf": ('{ kind = "trades", beta = 6 }', pgd(LINF), 2 * 3 + 3 + 3 + 1),
    "AT, l1": (CROSS_ENTROPY, pgd(L1), 2 * 3 + 3),
    "AT, linf and l1 in turn (E-AT)": (CROSS_ENTROPY, pgd(LINF, L1), 2 * 3 + 3),
    "AT, worst of linf and l1": (CROSS_ENTROPY, pgd(LINF, L1, combine="worst"), 2 * (2 * 3 + 1) + 3),
    "gradient norm, no attack": ('{ kind = "gradient_norm", weight = 0.0314 }', "", 2 + 3 + 3),
}


def train(program, folder, name, text):
    recipe = folder / f"{name}.toml"
    recipe.write_text(text)
    subprocess.run([program, "train", recipe, "--out", folder / name], check=True)


def result(run, evaluation):
    return json.loads((run / f"result-{evaluation}.json").read_text())


def row(name, samples, accuracies):
    cells = " | ".join(f"{100 * value:.1f} %" for value in accuracies)
    return f"| {name} | {samples:,} | {cells} |"


def captions(program, folder, seed):
    """Prints the table of the objectives for CLIP's image encoder."""
    model = CAPTIONS.format(seed=seed)
    new = "{ new = { context = 16, width = 64, depth = 2, heads = 2, embedding = 64 }, templates = " + TEMPLATES + " }"
    stage = {"name": "clip", "samples": 76_800, "objective": '{ kind = "contrastive" }', "text": new}
    train(program, folder, "clean", model + CAPTIONS_STAGE.format(**stage, decay=0.05, rate=1e-3, attack=""))
    clip = folder / "clean/stages/clip"
    rows = {"clean CLIP": (76_800, "clean")}
    for name, (objective, rate, passes) in CAPTIONS_OBJECTIVES.items():
        samples = CAPTIONS_PASSES // passes // 128 * 128
        text = f'{{ model = "{clip}/text", templates = {TEMPLATES} }}'
        stage = {"name": "robust", "samples": samples, "objective": objective, "text": text}
        stage = CAPTIONS_STAGE.format(**stage, decay=1e-4, rate=rate, attack=CAPTIONS_ATTACK)
        run = re.sub("[^a-zA-Z0-9-]+", "_", name)
        train(program, folder, run, f'start = {{ weights = "{clip}" }}\n' + model + stage)
        rows[name] = (samples, run)
    print("| | samples | clean | PGD-20 | APGD-CE |\n|---|---|---|---|---|")
    for name, (samples, run) in rows.items():
        stages = result(folder / run, "zero_shot")["stages"]
        print(row(name, samples, [stage["robust_accuracy"] for stage in stages]))


def cifar(program, folder, seed, data, images):
    """Prints the table of the objectives for a classifier."""
    stage = {"seed": seed, "data": data, "name": "pretrain", "samples": 115_200, "size": 16}
    attack = 'attack = { norm = "linf", epsilon = "8/255", step_size = "8/255", steps = 1, start = "random" }'
    train(program, folder, "pretrain", CIFAR.format(**stage, objective=CROSS_ENTROPY, rate=5e-4, warmup=10_240, attack=attack))
    start = f'start = {{ weights = "{folder}/pretrain" }}\n'
    evaluations = "".join(CIFAR_EVALUATION.format(norm=norm, epsilon=NORMS[norm], images=images) for norm in NORMS)
    print_rows = []
    for name, (objective, attack, passes) in CIFAR_OBJECTIVES.items():
        samples = CIFAR_PASSES // passes // 32 * 32
        stage = {"seed": seed, "data": data, "name": "finetune", "samples": samples, "size": 32}
        text = CIFAR.format(**stage, objective=objective, rate=4e-4, warmup=1_536, attack=attack)
        run = re.sub("[^a-zA-Z0-9]+", "_", name)
        train(program, folder, run, start + text + evaluations)
        found = [result(folder / run, norm) for norm in NORMS]
        union = [all(of_norms) for of_norms in zip(*(of_norm["robust"] for of_norm in found), strict=True)]
        accuracies = [of_norm["robust_accuracy"] for of_norm in found]
        clean = found[0]["stages"][0]["robust_accuracy"]
        print_rows.append(row(name, samples, [clean, *accuracies, sum(union) / len(union)]))
    print("| | samples | clean | linf | l2 | l1 | union |\n|---|---|---|---|---|---|---|")
    print("\n".join(print_rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", choices=["captions", "cifar"])
    parser.add_argument("--program", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10 binary files")
    parser.add_argument("--images", type=int, default=200, help="test images of CIFAR-10")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = arguments.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.comparison == "captions":
        captions(arguments.program, folder, arguments.seed)
    elif arguments.data:
        cifar(arguments.program, folder, arguments.seed, arguments.data.resolve(), arguments.images)
    else:
        parser.error("`cifar` requires --data")


if __name__ == "__main__":
    main()
