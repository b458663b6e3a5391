"""Compares the objectives in small: a tiny CLIP model, trained here on synthetic images and captions, is made robust by
FARE, TeCoA, Sim-CLIP and AdvFLYP for equal compute and evaluated zero-shot.

    python3 benchmarks/objectives.py --program target/release/advxl --out RUNS [--seed 0]

Runs resume: start the same command again after an interruption. Prints a Markdown table. Equal compute means equally many
forward passes, as `advxl plan` counts them, with PGD-2 at l-infinity 4/255.
"""

import argparse
import json
import subprocess
from pathlib import Path

MODEL = """
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
STAGE = """
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
ATTACK = 'attack = { norm = "linf", epsilon = "4/255", step_size = "2/255", steps = 2, start = "random" }'
# Forward passes per image: 2 k + 3 with k = 2 steps, clean images, references.
OBJECTIVES = {
    "FARE": ('{ kind = "fare" }', 2 * 2 + 3 + 1),
    "TeCoA": ('{ kind = "tecoa", scale = 100 }', 2 * 2 + 3),
    "Sim-CLIP": ('{ kind = "sim_clip" }', 2 * 2 + 3 + 3 + 1),
    "AdvFLYP": ('{ kind = "advflyp", scale = 100 }', 2 * 2 + 3 + 3 + 1),
}
PASSES = 200_000


def train(program, folder, name, text):
    recipe = folder / f"{name}.toml"
    recipe.write_text(text)
    subprocess.run([program, "train", recipe, "--out", folder / name], check=True)


def accuracies(run):
    result = json.loads((run / "result-zero_shot.json").read_text())
    return [stage["robust_accuracy"] for stage in result["stages"]]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=76_800, help="samples of the clean CLIP model")
    arguments = parser.parse_args()
    folder, program = arguments.out, arguments.program
    folder.mkdir(parents=True, exist_ok=True)
    new = "{ new = { context = 16, width = 64, depth = 2, heads = 2, embedding = 64 }, templates = " + TEMPLATES + " }"
    clean = MODEL.format(seed=arguments.seed) + STAGE.format(
        name="clip", samples=arguments.samples, objective='{ kind = "contrastive" }', text=new, decay=0.05, rate=1e-3, attack=""
    )
    train(program, folder, "clean", clean)
    clip = folder / "clean/stages/clip"
    rows = {"clean CLIP": (0, folder / "clean")}
    for name, (objective, passes) in OBJECTIVES.items():
        samples = PASSES // passes // 128 * 128
        text = f'{{ model = "{clip}/text", templates = {TEMPLATES} }}'
        recipe = f'start = {{ weights = "{clip}" }}\n' + MODEL.format(seed=arguments.seed) + STAGE.format(
            name="robust", samples=samples, objective=objective, text=text, decay=1e-4, rate=1e-4, attack=ATTACK
        )
        train(program, folder, name, recipe)
        rows[name] = (samples, folder / name)
    print("| | samples | clean | PGD-20 | APGD-CE |\n|---|---|---|---|---|")
    for name, (samples, run) in rows.items():
        cells = " | ".join(f"{100 * value:.1f} %" for value in accuracies(run))
        print(f"| {name} | {samples:,} | {cells} |")


if __name__ == "__main__":
    main()
