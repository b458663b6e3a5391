#!/usr/bin/env python3
"""Compare the reference AutoAttack and `advxl eval` on one model, in turn: seconds, ratio, verdicts.

    cargo build --release
    python3 -m venv .venv && .venv/bin/pip install torch timm pyautoattack safetensors
    .venv/bin/python benchmarks/against_autoattack.py --model runs/cifar10_micro/model \\
        --data tensors:FILE.safetensors --n 256 --norm linf --eps 8/255 --threads 2

The reference is pyautoattack, the PyPI package of fra31/auto-attack, with the parameters of its
standard version for the norm. Its weights are frozen, so it computes no weight gradients. Both
programs get the same images, batch size and threads. Each attacks the images that survived its own
earlier attacks, or with --individually every image that is classified correctly.

The seconds of an attack are the time that each program spent in it. The total of the reference is
its evaluation, without starting Python, imports and loading; that of advxl is the whole process.
Ratios are seconds of the reference divided by seconds of advxl, medians over the rounds. Run
nothing else on the machine meanwhile.
"""
import argparse
import json
import statistics
import subprocess
import tempfile
import time
import warnings
from fractions import Fraction
from pathlib import Path
from unittest import mock

import timm
import torch
from pyautoattack import AutoAttack
from pyautoattack.state import EvaluationState
from safetensors.torch import load_file

NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}
ATTACKS = ["apgd-ce", "apgd-t", "fab-t", "square"]


class Normalized(torch.nn.Module):
    """A frozen model of images in [0, 1] from a folder in timm's layout. Counts its images."""

    def __init__(self, folder):
        super().__init__()
        self.model = timm.create_model(f"local-dir:{folder}", pretrained=True)
        for name in ("mean", "std"):
            values = torch.tensor(self.model.pretrained_cfg[name]).view(1, 3, 1, 1)
            self.register_buffer(name, values)
        self.seen = 0
        self.eval().requires_grad_(False)

    def forward(self, images):
        self.seen += len(images)
        return self.model((images - self.mean) / self.std)


def load_images(spec, count):
    """Images [n, 3, h, w] in [0, 1] and labels [n], the first `count` of the file."""
    tensors = load_file(spec.removeprefix("tensors:"))
    images, labels = tensors["images"][:count].contiguous(), tensors["labels"][:count].long()
    return (images.float() / 255 if images.dtype == torch.uint8 else images), labels


def standard(arguments, model, classes):
    """The reference's standard version, with the steps, queries and targets of the arguments."""
    epsilon = float(Fraction(arguments.eps))
    device = "cuda" if arguments.device == "cuda" else "cpu"
    suite = AutoAttack(model, norm=NORMS[arguments.norm], eps=epsilon, seed=arguments.seed, device=device)
    if arguments.steps:
        for attack in (suite.apgd, suite.apgd_targeted):
            attack.n_iter = attack.n_iter_orig = arguments.steps
            # Derived from the number of steps when the attack was constructed.
            attack.n_iter_2 = max(int(0.22 * arguments.steps), 1)
            attack.n_iter_min = max(int(0.06 * arguments.steps), 1)
            attack.size_decr = max(int(0.03 * arguments.steps), 1)
        suite.fab.n_iter = arguments.steps
    if arguments.queries:
        suite.square.n_queries = arguments.queries
    for attack in (suite.apgd_targeted, suite.fab):
        asked = arguments.targets or attack.n_target_classes
        # With more targets than other classes the reference fails; advxl uses all other classes.
        attack.n_target_classes = min(asked, classes - 1)
    return suite


def reference(arguments, model, images, labels, attacks):
    """Runs the attacks in order. Returns the stages, the clean one first, and the total seconds."""
    suite = standard(arguments, model, classes=model(images[:1]).shape[1])
    suite.attacks_to_run = attacks
    stages, last = [], time.perf_counter()

    def record(attack, robust):
        nonlocal last
        now = time.perf_counter()
        stages.append({"attack": attack, "seconds": now - last, "forward": model.seen,
                       "robust": robust.tolist(), "robust_count": int(robust.sum())})
        last, model.seen = now, 0

    class State(EvaluationState):
        """Records each attack when the reference marks it as finished."""

        def add_run_attack(self, attack):
            super().add_run_attack(attack)
            record(attack, self.robust_flags)

        @property
        def clean_accuracy(self):
            return self._clean_accuracy

        @clean_accuracy.setter
        def clean_accuracy(self, accuracy):
            self._clean_accuracy = accuracy
            record("clean", self.robust_flags)

    model.seen, begun = 0, last
    with mock.patch("pyautoattack.autoattack.EvaluationState", State):
        suite.run_standard_evaluation(images, labels, batch_size=arguments.batch)
    seconds = time.perf_counter() - begun
    for attack in attacks[len(stages) - 1:]:  # skipped, since no image survived
        record(attack, torch.tensor(stages[-1]["robust"]))
    return {"stages": stages, "robust": stages[-1]["robust"], "seconds": seconds}


def ours(arguments, attacks):
    """Runs the same attacks in advxl."""
    with tempfile.TemporaryDirectory() as out:
        command = [arguments.advxl, "eval", arguments.model, "--data", arguments.data]
        command += ["--attack", ",".join(["clean", *attacks]), "--norm", arguments.norm]
        command += ["--eps", arguments.eps, "--n", arguments.n, "--batch", arguments.batch]
        command += ["--seed", arguments.seed, "--threads", arguments.threads, "--device", arguments.device]
        for option in ("steps", "queries", "targets"):
            if value := getattr(arguments, option):
                command += [f"--{option}", value]
        command += ["--out", out, "--json"]
        begun = time.perf_counter()
        subprocess.run([str(word) for word in command], check=True, stdout=subprocess.PIPE)
        seconds = time.perf_counter() - begun
        result = json.loads((Path(out) / "result.json").read_text())
    stages = result["stages"]
    assert [stage["attack"] for stage in stages] == ["clean", *attacks]
    return {"stages": stages, "robust": result["robust"], "seconds": seconds}


def compare(arguments, model, images, labels, attacks):
    """Runs both programs in turn, round by round."""
    rounds = []
    for _ in range(arguments.rounds):
        theirs = reference(arguments, model, images, labels, attacks)
        rounds.append({"reference": theirs, "advxl": ours(arguments, attacks)})
        spent = {program: round(run["seconds"], 2) for program, run in rounds[-1].items()}
        print(f"# {', '.join(attacks)}: {spent}", flush=True)
    return rounds


def times(rounds, pick):
    """Median seconds of the reference and of advxl, and the median of their ratios."""
    theirs, mine = ([pick(each[which]) for each in rounds] for which in ("reference", "advxl"))
    ratios = [a / b if b > 0 else float("nan") for a, b in zip(theirs, mine)]
    return [statistics.median(values) for values in (theirs, mine, ratios)]


def stage_rows(rounds, count):
    """Yields a table row for each stage."""
    both = [rounds[0][which]["stages"] for which in ("reference", "advxl")]
    for index, stage in enumerate(both[0]):
        tried = [stages[index - 1]["robust_count"] if index else count for stages in both]
        standing = [stages[index]["robust_count"] / count for stages in both]
        spent = times(rounds, lambda run, index=index: run["stages"][index]["seconds"])
        yield [stage["attack"], *map(str, tried), *map("{:.2f}".format, spent),
               *map("{:.2%}".format, standing)]


def total_row(runs):
    """The last row of the table: totals of the rounds."""
    rounds = [{which: sum(run[which]["seconds"] for run in each)
               for which in ("reference", "advxl")} for each in zip(*runs)]
    return ["total", "", "", *map("{:.2f}".format, times(rounds, lambda seconds: seconds)), "", ""]


def print_table(table):
    names = ["images, reference", "images, advxl", "s, reference", "s, advxl", "ratio",
             "robust, reference", "robust, advxl"]
    print("\n| attack |", " | ".join(names), "|\n|---|" + "---:|" * len(names))
    for row in table:
        print("|", " | ".join(row), "|")
    print()


def disagreement(rounds):
    """Counts the images that one program fooled and the other did not."""
    theirs, mine = (torch.tensor(rounds[0][which]["robust"]) for which in ("reference", "advxl"))
    return {"images": len(mine), "standing_in_reference_only": int((theirs & ~mine).sum()),
            "standing_in_advxl_only": int((mine & ~theirs).sum()),
            "percent": 100 * (theirs != mine).double().mean().item()}


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--advxl", default="target/release/advxl", help="the program")
    parser.add_argument("--model", required=True, help="a model folder in timm's layout")
    parser.add_argument("--data", required=True, help="tensors:FILE, images at the model's size")
    parser.add_argument("--n", type=int, default=256, help="number of images, from the start")
    parser.add_argument("--norm", choices=NORMS, default="linf")
    parser.add_argument("--eps", default="8/255")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="for both programs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--attacks", default=",".join(ATTACKS), help="attacks, in order")
    parser.add_argument("--steps", type=int, help="steps of apgd and fab, in both programs")
    parser.add_argument("--queries", type=int, help="queries of square, in both programs")
    parser.add_argument("--targets", type=int, help="targets of apgd-t and fab-t, in both programs")
    parser.add_argument("--individually", action="store_true", help="run each attack on its own")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write all measurements to this file")
    return parser.parse_args()


def main():
    warnings.filterwarnings("ignore")
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    # Both compute in true f32.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    model = Normalized(arguments.model).to(arguments.device)
    images, labels = (tensor.to(arguments.device) for tensor in load_images(arguments.data, arguments.n))
    arguments.n = len(images)
    others = model(images[:1]).shape[1] - 1
    if (arguments.targets or 9) > others:
        print(f"# the model has {others + 1} classes: using at most {others} targets")
    print(f"# torch {torch.__version__}, {arguments.threads} threads, {arguments.n} images, "
          f"batch {arguments.batch}, {arguments.norm} {arguments.eps}", flush=True)

    attacks = arguments.attacks.split(",")
    chains = [[attack] for attack in attacks] if arguments.individually else [attacks]
    runs = [compare(arguments, model, images, labels, chain) for chain in chains]
    table = [row for rounds in runs for row in stage_rows(rounds, arguments.n)]
    if arguments.individually:
        table = [row for row in table if row[0] != "clean"]
    print_table([*table, total_row(runs)])
    for chain, rounds in zip(chains, runs):
        found = disagreement(rounds)
        print(f"After {', '.join(chain)} the verdicts differ on {found['percent']:.2f} % of "
              f"{found['images']} images: {found['standing_in_reference_only']} are robust only in the "
              f"reference, {found['standing_in_advxl_only']} only in advxl.")
    if arguments.json:
        settings = {key: str(value) for key, value in vars(arguments).items()}
        measured = [{"attacks": chain, "disagreement": disagreement(rounds), "rounds": rounds}
                    for chain, rounds in zip(chains, runs)]
        content = {"torch": torch.__version__, "settings": settings, "runs": measured}
        arguments.json.write_text(json.dumps(content) + "\n")


if __name__ == "__main__":
    main()
