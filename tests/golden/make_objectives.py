"""Records the named objectives of advxl as PyTorch computes them: losses, gradients, and one update each of TRADES and
FARE.

    pip install torch timm numpy safetensors
    python tests/golden/make_objectives.py

Written from the papers' equations. Everything is computed in float64 and rounded to float32 once.
"""

import json
import platform
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from make_golden import FOLDER, random, save, small_vit
from safetensors.torch import load_file

SEED = 11
BETA, GAMMA, SCALE, SMOOTHING = 6.0, 2.0, 20.0, 0.1
FEATURES, LOGITS = 1.0, 0.5


def kl(p, q):
    """KL(softmax(p) || softmax(q)) of each row."""
    return F.kl_div(F.log_softmax(q, 1), F.log_softmax(p, 1), reduction="none", log_target=True).sum(1)


def cosine(x, y):
    return F.cosine_similarity(x, y, dim=1)


def contrastive(images, texts, scale):
    logits = scale * F.normalize(images, dim=1) @ texts.T
    own = torch.arange(len(images))
    rows, columns = (F.cross_entropy(each, own, reduction="none") for each in (logits, logits.T))
    return (rows + columns) / 2


def objectives(batch):
    """The loss of each image that training minimizes and that the attack maximizes, as functions of the outputs."""
    reference, reference_adversarial = batch["reference_clean"], batch["reference_adversarial"]
    labels, classes, captions = batch["labels"], batch["classes"], batch["captions"]

    def cross_entropy(logits, labels):
        return F.cross_entropy(logits, labels, reduction="none", label_smoothing=SMOOTHING)

    def tecoa(adversarial, _):
        return cross_entropy(SCALE * F.normalize(adversarial, dim=1) @ classes.T, labels % len(classes))

    def similarities(outputs):
        return SCALE * F.normalize(outputs, dim=1) @ captions.T

    def advflyp(adversarial, clean):
        unit = [F.normalize(x, dim=1) for x in (adversarial, reference_adversarial, clean)]
        features = sum(torch.linalg.vector_norm(unit[0] - other, dim=1) for other in unit[1:])
        logits = sum(
            kl(similarities(adversarial), similarities(other)) for other in (reference_adversarial, clean)
        )
        return contrastive(adversarial, captions, SCALE) + FEATURES * features + LOGITS * logits

    return {
        "trades": (
            lambda adversarial, clean: cross_entropy(clean, labels) + BETA * kl(clean, adversarial),
            lambda adversarial, clean: kl(reference, adversarial),
        ),
        "fare": 2 * (lambda adversarial, clean: ((adversarial - reference) ** 2).sum(1),),
        "tecoa": (tecoa, tecoa),
        "sim_clip": (
            lambda adversarial, clean: -(
                cosine(adversarial, clean.detach()) + cosine(clean, adversarial.detach())
            ) / 2,
            lambda adversarial, clean: -cosine(adversarial, reference),
        ),
        "advflyp": (advflyp, lambda adversarial, clean: contrastive(adversarial, captions, SCALE)),
        "gradient_norm": (
            lambda adversarial, clean: 0.8 * cross_entropy(clean, labels)
            + 0.2 * cross_entropy(adversarial, labels),
            lambda adversarial, clean: cross_entropy(adversarial, labels),
        ),
        "deacl": (
            lambda adversarial, clean: -cosine(clean, reference) - GAMMA * cosine(adversarial, clean),
            lambda adversarial, clean: -cosine(adversarial, reference),
        ),
    }


def record_objectives():
    generator = torch.Generator().manual_seed(SEED)
    names = ["adversarial", "clean", "reference_clean", "reference_adversarial"]
    tensors = {name: random(generator, 6, 5) for name in names}
    tensors["labels"] = torch.randint(0, 5, (6,), generator=generator)
    for name, count in (("classes", 4), ("captions", 6)):
        tensors[name] = F.normalize(random(generator, count, 5), dim=1).float().double()
    recorded = dict(tensors)
    for name, (training, attack) in objectives(tensors).items():
        for what, loss in (("", training), ("_attack", attack)):
            outputs = [tensors[key].clone().requires_grad_() for key in ("adversarial", "clean")]
            losses = loss(*outputs)
            gradients = torch.autograd.grad(losses.mean(), outputs, allow_unused=True)
            recorded[f"{name}{what}_loss"] = losses.mean().view(1)
            for key, gradient in zip(("adversarial", "clean"), gradients):
                if gradient is not None:
                    recorded[f"{name}{what}_gradient_{key}"] = gradient
    return recorded


def model_of(weights, scale=1.0):
    model = small_vit("avg", 0)
    model.model.load_state_dict({name: scale * value.double() for name, value in weights.items()})
    return model.double().eval()


def record_updates():
    """One PGD step from a fixed start, and the update on its result: TRADES, and FARE with a reference whose weights
    are 1.05 times the model's."""
    known = load_file(FOLDER / "vit.safetensors")
    weights = {
        key.removeprefix("avg."): value for key, value in known.items() if key.startswith("avg.")
    }
    images, labels = known["images"].double(), known["labels"]
    generator = torch.Generator().manual_seed(SEED)
    noise = torch.rand(images.shape, generator=generator).double() * 2 - 1
    start = (images + 8 / 255 * noise).clamp(0, 1).float().double()
    recorded = {"start": start}
    for name in ("trades", "fare"):
        model, frozen = model_of(weights), model_of(weights, 1.05)
        with torch.no_grad():
            reference = (frozen if name == "fare" else model)(images)
        training, attack = objectives({
            "reference_clean": reference, "reference_adversarial": None,
            "labels": labels, "classes": None, "captions": None,
        })[name]
        pixels = start.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(attack(model(pixels), None).sum(), pixels)
        adversarial = start + 4 / 255 * gradient.sign()
        adversarial = torch.min(torch.max(adversarial, images - 8 / 255), images + 8 / 255).clamp(0, 1)
        parameters = dict(model.model.named_parameters())
        optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
        loss = training(model(adversarial), model(images)).mean()
        loss.backward()
        recorded |= {f"{name}_gradient.{key}": each.grad.clone() for key, each in parameters.items()}
        optimizer.step()
        recorded |= {
            f"{name}_input_gradient": gradient,
            f"{name}_adversarial": adversarial,
            f"{name}_loss": loss.view(1),
        }
        recorded |= {f"{name}.{key}": each for key, each in parameters.items()}
    return recorded


def main():
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    save("objectives", record_objectives())
    save("updates", record_updates())
    versions = {"command": "python tests/golden/make_objectives.py", "seed": SEED}
    versions["python"] = platform.python_version()
    versions |= {package: version(package) for package in ("torch", "timm", "safetensors")}
    Path(FOLDER / "objectives_versions.json").write_text(json.dumps(versions, indent=2) + "\n")


if __name__ == "__main__":
    main()
