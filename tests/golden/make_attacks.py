"""Record the results of the reference AutoAttack for comparison with advxl.

    pip install torch timm pyautoattack numpy safetensors
    python tests/golden/make_attacks.py

Writes `attacks.safetensors` and `attacks_versions.json` next to this file. `README.md` lists every
tensor. The reference is `pyautoattack`, the PyPI package of fra31/auto-attack. Inputs are rounded to
float32 first; from them the reference computes in float64, so that a test compares float32
arithmetic with the exact result. Only the verdicts are float32 throughout, as in real use.
"""

import json
import platform
from collections import OrderedDict
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from pyautoattack import AutoAttack, autopgd_base
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted, L1_projection
from pyautoattack.fab_projections import projection_l1, projection_l2, projection_linf
from pyautoattack.fab_pt import FABAttack_PT
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

FOLDER = Path(__file__).resolve().parent
PACKAGES = ["pyautoattack", "torch", "timm", "numpy", "safetensors"]

NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}
LOSSES = ("ce", "dlr", "dlr_targeted")

# Seed of the tiny model, and four images (see `tiny_inputs`) whose paths do not depend on rounding.
TINY_SEED = 3
TINY_CHOSEN = [679, 811, 2458, 2156]
TINY_EPSILONS = {"linf": 8 / 255, "l2": 0.25, "l1": 0.5}
APGD_STEPS, FAB_STEPS = 40, 20
FLOAT32_DEVIATION, NOISY_DEVIATION = 5e-6, 1e-5

# With these, 30 to 60 % of the toy images survive the attacks.
VERDICT_EPSILONS = {"linf": 8 / 255, "l2": 0.6, "l1": 6.0}
VERDICT_ATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square")
CLASSES = 8


def random(generator, *shape, scale=1.0):
    """Returns normal random numbers in float64 that are exact in float32."""
    return (torch.randn(shape, generator=generator) * scale).float().double()


def random_images(generator, *shape):
    """Pixels in [0, 1]; about one in six is exactly 0 or 1, so that bounds matter."""
    pixels = torch.rand(shape, generator=generator) * 1.2 - 0.1
    return pixels.clamp(0, 1).float().double()


@contextmanager
def reference_in(dtype):
    """Lets the reference compute in `dtype`.

    Some of its tensors have the default type. It casts others with `float()`, which would lose
    float64 precision. So this sets the default type and makes `float()` keep float64.
    """
    cast, default = torch.Tensor.float, torch.get_default_dtype()
    kept = torch.float64 if dtype == torch.float64 else None
    torch.set_default_dtype(dtype)
    with mock.patch.object(torch.Tensor, "float", lambda t: t if t.dtype == kept else cast(t)):
        yield
    torch.set_default_dtype(default)


def record_losses():
    """Records the three losses that APGD maximizes, and their derivatives in the logits."""
    generator = torch.Generator().manual_seed(0)
    logits = random(generator, 8, 6, scale=3.0)
    order = logits.argsort(dim=1, descending=True)
    # Labels: the classes in order of their logits, then again the top classes.
    rank = torch.tensor([0, 1, 2, 3, 5, 0, 0, 1])
    rows = torch.arange(8)
    labels, targets = order[rows, rank], order[rows, torch.tensor([1, 0, 0, 4, 2, 1, 3, 0])]
    logits[5] += 100  # exp(100) overflows float32
    for row in (6, 7):  # nearly tied at the top, on both sides of the label
        logits[row, order[row, 1]] = logits[row, order[row, 0]] - 1e-3
    logits = logits.float().double().requires_grad_()

    tensors = {"logits": logits, "labels": labels, "targets": targets}
    targeted = APGDAttack_targeted(None, eps=1.0)
    targeted.y_target = targets
    functions = {
        "ce": nn.CrossEntropyLoss(reduction="none"),
        "dlr": APGDAttack(None, eps=1.0).dlr_loss,
        "dlr_targeted": targeted.dlr_loss_targeted,
    }
    for name, function in functions.items():
        with reference_in(torch.float64):
            values = function(logits, labels)
        tensors[f"{name}_values"] = values
        (tensors[f"{name}_slopes"],) = torch.autograd.grad(values.sum(), logits)
    return tensors


def nearest_in_l1_ball(clean, points, epsilons):
    """Returns the nearest point in ball and box by bisection, independently of the reference."""
    offsets = points - clean

    def shrunk(threshold):
        shorter = offsets.sign() * (offsets.abs() - threshold.view(-1, 1)).clamp(min=0)
        return (clean + shorter).clamp(0, 1)

    low, high = torch.zeros(len(clean)), offsets.abs().amax(dim=1)
    for _ in range(100):
        middle = (low + high) / 2
        outside = (shrunk(middle) - clean).abs().sum(dim=1) > epsilons
        low, high = torch.where(outside, middle, low), torch.where(outside, high, middle)
    return shrunk(low)


def record_l1_projection():
    """Records projections onto the intersection of the l1 ball and the pixel range."""
    generator = torch.Generator().manual_seed(1)
    clean = random_images(generator, 12, 48)
    clean[9] = clean[9].round()  # every pixel at a bound: half of the offsets are clipped immediately
    # Rows 0 to 3 are inside the ball: a small step, none, and two limited only by the box.
    scales = torch.tensor([0.002, 0.0, 0.02, 0.02, 0.1, 0.3, 1.0, 3.0, 10.0, 1.0, 0.3, 0.1])
    offsets = torch.randn(12, 48, generator=generator) * scales.view(-1, 1)
    offsets[10, ::3] = 0  # unchanged pixels
    offsets[11, 1:] = 0  # a single changed pixel
    offsets[11, 0] = 5.0
    clean[11, 0] = 0.125
    points = (clean + offsets).float().double()
    points[0] = points[0].clamp(0, 1)
    epsilons = torch.tensor([0.5, 1.0, 2.0, 2.0, 0.5, 1.0, 2.0, 4.0, 12.0, 1.5, 0.25, 0.5])

    with reference_in(torch.float64):
        projected = points + L1_projection(clean, points - clean, epsilons)
    assert torch.allclose(projected, nearest_in_l1_ball(clean, points, epsilons), atol=1e-9)
    return {
        "l1_clean": clean,
        "l1_points": points,
        "l1_epsilons": epsilons,
        "l1_projected": projected,
    }


def shortest_move(norm, point, weights, gap):
    """Returns the smallest move in the box that raises `weights @ point` by `gap`, or as far as possible.

    Independent of the reference: coordinate by coordinate for l1, otherwise by bisection.
    """
    if gap < 0:
        weights, gap = -weights, -gap
    corner = torch.where(weights > 0, 1 - point, -point) * (weights != 0)
    if weights @ corner <= gap:
        return corner
    if norm == "l1":
        move = torch.zeros_like(point)
        for at in weights.abs().argsort(descending=True):
            move[at] = corner[at] * min(1.0, (gap / (weights[at] * corner[at])).item())
            gap = gap - weights[at] * move[at]
            if gap <= 0:
                return move

    def moved(length):
        limits = torch.ones_like(point) if norm == "linf" else weights.abs()
        return corner.sign() * torch.minimum(corner.abs(), length * limits)

    low, high = 0.0, 1.0 if norm == "linf" else (1 / weights[weights != 0].abs().min()).item()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if weights @ moved(middle) < gap else (low, middle)
    return moved(low)


def record_planes():
    """Records FAB's projections onto a hyperplane within the pixel range."""
    generator = torch.Generator().manual_seed(2)
    points = random_images(generator, 12, 48)
    weights = random(generator, 12, 48)
    weights[torch.rand(12, 48, generator=generator) < 0.1] = 0
    points[6], weights[6] = (points[6] * 64).round() / 64, (weights[6] * 16).round() / 16
    values = (weights * points).sum(dim=1)
    highest = (weights.clamp(min=0)).sum(dim=1) - values
    lowest = (weights.clamp(max=0)).sum(dim=1) - values
    # Fractions of the way to the corner, upwards or downwards. Above 1 the plane misses the box.
    # Row 6 is exactly on its plane, row 7 almost.
    shares = torch.tensor([0.1, -0.1, 0.4, -0.4, 1.2, -1.2, 0.0, 1e-6, 0.8, -0.8, 0.02, -0.02])
    gaps = torch.where(shares > 0, shares * highest, -shares * lowest)
    offsets = (values + gaps).float().double()

    tensors = {"plane_points": points, "plane_weights": weights, "plane_offsets": offsets}
    projections = {"linf": projection_linf, "l2": projection_l2, "l1": projection_l1}
    for norm, project in projections.items():
        with reference_in(torch.float64):
            moves = project(points, weights, offsets)
        for row in range(12):
            best = shortest_move(norm, points[row], weights[row], offsets[row] - values[row])
            assert torch.allclose(moves[row], best, atol=1e-9), f"{norm}, row {row}"
        tensors[f"plane_{norm}"] = moves
    return tensors


class TinyModel:
    """A model of twelve pixels, ten tanh units and six classes. Keeps its inputs and outputs."""

    def __init__(self, weights, noise=0.0):
        self.weights, self.noise = weights, noise
        self.asked, self.answers = [], []

    def __call__(self, images):
        w1, b1, w2, b2 = self.weights
        logits = torch.tanh(images.flatten(1) @ w1 + b1) @ w2 + b2
        logits = logits + self.noise * torch.randn(logits.shape)
        # The reference changes these images in place later, when it returns to its best ones.
        self.asked.append(images.detach().clone())
        self.answers.append(logits.detach().argmax(dim=1))
        return logits


def tiny_inputs():
    """Returns weights, images, predicted labels and the classes with the second-highest logits.

    The images are four of 4,000 random ones. The paths of about 260 of them hardly change in float32
    or under noise of its size, for any attack. The four reach the pixel bounds in every norm,
    oscillate in linf or keep moving in l1, and are fooled immediately, late or never.
    """
    generator = torch.Generator().manual_seed(TINY_SEED)
    weights = [
        random(generator, 12, 10, scale=9 * 12**-0.5),
        random(generator, 10, scale=0.5),
        random(generator, 10, 6, scale=1.5 * 10**-0.5),
        random(generator, 6, scale=0.1),
    ]
    generator = torch.Generator().manual_seed(1000 + TINY_SEED)
    images = random_images(generator, 4000, 3, 2, 2)[TINY_CHOSEN]
    ranked = TinyModel(weights)(images).argsort(dim=1)
    return weights, images, ranked[:, -1], ranked[:, -2]


def moved_pixels(change):
    """Counts changed pixels. The reference counts `x + d - x != 0`, which includes rounding residues."""
    return (change.abs() > 1e-6).flatten(1).sum(dim=1)


def apgd_path(model, images, labels, targets, norm, loss):
    """Returns every input of one APGD run from the clean images, and which are misclassified."""
    options = {"n_iter": APGD_STEPS, "norm": NORMS[norm], "eps": TINY_EPSILONS[norm], "rho": 0.75}
    if loss == "dlr_targeted":
        attack = APGDAttack_targeted(model, **options)
        attack.y_target = targets
    else:
        attack = APGDAttack(model, loss=loss, **options)
    attack.init_hyperparam(images)
    with mock.patch.object(autopgd_base, "L0_norm", moved_pixels):
        attack.attack_single_run(images, labels, x_init=images)
    return torch.stack(model.asked), (torch.stack(model.answers) != labels).long()


class RecordingFab(FABAttack_PT):
    """Keeps the points whose label the reference computes: the image, then each new point."""

    def _get_predicted_label(self, x):
        self.__dict__.setdefault("points", []).append(x.detach().clone())
        return super()._get_predicted_label(x)


def fab_path(model, images, labels, norm, targeted):
    """Returns the new point of each iteration, before it is pulled back, and the nearest adversarial point."""
    attack = RecordingFab(model, NORMS[norm], n_iter=FAB_STEPS, eps=TINY_EPSILONS[norm])
    attack.target_class = 2
    found = attack.attack_single_run(images, labels, is_targeted=targeted)
    return torch.stack(attack.points[1:]), found


def tiny_paths(weights, images, labels, targets, noise=0.0):
    """Returns all paths. `noise` is added to every weight (relative) and to every logit."""
    weights = [w * (1 + noise * torch.randn(w.shape)) for w in weights]
    paths = {}
    for norm in NORMS:
        for loss in LOSSES:
            path = apgd_path(TinyModel(weights, noise), images, labels, targets, norm, loss)
            paths |= zip((f"apgd_{norm}_{loss}_{what}" for what in ("iterates", "wrong")), path)
        for kind in ("t", "u"):
            path = fab_path(TinyModel(weights, noise), images, labels, norm, kind == "t")
            paths |= zip((f"fab_{norm}_{kind}_{what}" for what in ("iterates", "found")), path)
    return paths


def farthest(paths, others):
    """Returns the largest difference between the numbers of two runs."""
    return max((paths[key] - others[key]).abs().max().item() for key in paths)


def record_tiny():
    """Records iterates of APGD and FAB on a model so small that rounding does not change the paths."""
    weights, images, labels, targets = tiny_inputs()
    with reference_in(torch.float64):
        paths = tiny_paths(weights, images, labels, targets)
        for seed in range(6):
            torch.manual_seed(seed)
            noisy = tiny_paths(weights, images, labels, targets, noise=3e-7)
            assert farthest(paths, noisy) < NOISY_DEVIATION, f"seed {seed}"
    with reference_in(torch.float32):
        single = tiny_paths([w.float() for w in weights], images.float(), labels, targets)
    assert farthest(paths, single) < FLOAT32_DEVIATION
    names = ("tiny_w1", "tiny_b1", "tiny_w2", "tiny_b2")
    tensors = dict(zip(names, weights))
    return tensors | {"tiny_images": images, "tiny_labels": labels, "tiny_targets": targets} | paths


def toy_patterns(generator, count):
    """Returns smooth random images: 4 x 4 colors, resized to 16 x 16."""
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    return F.interpolate(coarse, size=16, mode="bicubic", align_corners=False)


def toy_images(generator, shapes, count):
    """Returns images of class patterns, shifted and scaled, with smooth and pixel-wise noise, and labels."""
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    strengths = 0.14 * (0.5 + torch.rand(count, 1, 1, 1, generator=generator))
    shifts = torch.randint(-2, 3, (count, 2), generator=generator).tolist()
    shown = torch.stack([shapes[k].roll(s, (1, 2)) for k, s in zip(labels.tolist(), shifts)])
    noise = 0.15 * toy_patterns(generator, count)
    noise += 0.05 * torch.randn(count, 3, 16, 16, generator=generator)
    pixels = (0.5 + strengths * shown + noise).clamp(0, 1)
    return (pixels * 255).round().to(torch.uint8), labels


def toy_cnn():
    layers = OrderedDict(
        conv1=nn.Conv2d(3, 12, 3, stride=2, padding=1),
        relu1=nn.ReLU(),
        conv2=nn.Conv2d(12, 24, 3, stride=2, padding=1),
        relu2=nn.ReLU(),
        flatten=nn.Flatten(),
        linear=nn.Linear(24 * 4 * 4, CLASSES),
    )
    return nn.Sequential(layers)


class ToyVit(VisionTransformer):
    """The ViT of `vit.safetensors` with average pooling, eight classes, mean and deviation 0.5."""

    def __init__(self):
        super().__init__(
            img_size=16,
            patch_size=4,
            embed_dim=24,
            depth=2,
            num_heads=3,
            num_classes=CLASSES,
            global_pool="avg",
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )

    def forward(self, images):
        return super().forward((images - 0.5) / 0.5)


def training_attack(model, images, labels, sparse):
    """Runs three steps of PGD: linf 4/255, or l1 with eight pixels per step and a total of at most 5."""
    change = torch.zeros_like(images)
    for _ in range(3):
        change.requires_grad_()
        loss = F.cross_entropy(model((images + change).clamp(0, 1)), labels)
        (gradient,) = torch.autograd.grad(loss, change)
        change = change.detach()
        if not sparse:
            change = (change + 2 / 255 * gradient.sign()).clamp(-4 / 255, 4 / 255)
            continue
        sizes = gradient.flatten(1).abs()
        steepest = (sizes >= sizes.topk(8).values[:, -1:]).view_as(gradient)
        change += 2.5 / 8 * gradient.sign() * steepest
        lengths = change.flatten(1).abs().sum(dim=1).view(-1, 1, 1, 1)
        change *= 5 / lengths.clamp(min=5)
    return (images + change).clamp(0, 1)


def train(model, images, labels, epochs):
    """Trains adversarially for a few seconds, half of the batches against l1."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    updates = epochs * (len(images) // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=updates)
    for _ in range(epochs):
        for at in torch.randperm(len(images)).split(128):
            attacked = training_attack(model, images[at], labels[at], torch.rand(()) < 0.5)
            optimizer.zero_grad()
            F.cross_entropy(model(attacked), labels[at]).backward()
            optimizer.step()
            schedule.step()
    return model.requires_grad_(False).eval()


def reduced_standard(model, norm, seed):
    """Returns AutoAttack's standard version with fewer steps, targets, restarts and queries."""
    suite = AutoAttack(model, norm=NORMS[norm], eps=VERDICT_EPSILONS[norm], seed=seed)
    steps = 50
    for attack in (suite.apgd, suite.apgd_targeted):
        attack.n_iter = attack.n_iter_orig = steps
        attack.n_iter_2 = int(0.22 * steps)
        attack.n_iter_min, attack.size_decr = int(0.06 * steps), int(0.03 * steps)
    suite.apgd.n_restarts = 2 if norm == "l1" else 1
    suite.apgd_targeted.n_target_classes = suite.fab.n_target_classes = 3
    suite.fab.n_iter = 30
    suite.square.n_queries = 300
    return suite


def verdict(model, images, labels, norm, attack, seed):
    """Returns 1 for each image that is still classified correctly after this attack alone."""
    suite = reduced_standard(model, norm, seed)
    suite.attacks_to_run = [attack]
    attacked, answers = suite.run_standard_evaluation(images, labels)
    change = (attacked - images).flatten(1)
    lengths = change.norm(p={"linf": float("inf"), "l2": 2, "l1": 1}[norm], dim=1)
    assert lengths.max() < VERDICT_EPSILONS[norm] + 1e-5, f"{norm} {attack}: {lengths.max()}"
    assert -1e-6 < attacked.min() and attacked.max() < 1 + 1e-6
    return (answers == labels).long()


def record_verdicts():
    """Records which images of a toy problem each attack fools, for two small trained classifiers."""
    generator = torch.Generator().manual_seed(0)
    shapes = toy_patterns(generator, CLASSES)
    training, training_labels = toy_images(generator, shapes, 4096)
    stored, labels = toy_images(generator, shapes, 128)
    images = stored / 255
    tensors = {"verdict_images": stored, "verdict_labels": labels}
    tensors["verdict_epsilons"] = torch.tensor(list(VERDICT_EPSILONS.values()))

    for name, make, epochs in (("cnn", toy_cnn, 8), ("vit", ToyVit, 12)):
        torch.manual_seed(0)
        model = train(make(), training / 255, training_labels, epochs)
        tensors |= {f"{name}.{key}": weight for key, weight in model.state_dict().items()}
        tensors[f"{name}_clean"] = (model(images).argmax(dim=1) == labels).long()
        print(f"{name}: clean {tensors[f'{name}_clean'].float().mean():.1%}")
        for norm in NORMS:
            for attack in VERDICT_ATTACKS:
                both = [verdict(model, images, labels, norm, attack, seed) for seed in (0, 1)]
                key = f"{name}_{norm}_{attack}"
                tensors[key], tensors[f"{key}_seed1"] = both
                shares = ", ".join(f"{v.float().mean():.1%}" for v in both)
                print(f"{key}: {shares}, {(both[0] != both[1]).sum()} images differ", flush=True)
    return tensors


def save(tensors):
    """Saves floating-point tensors as float32, labels and verdicts as int64, images as uint8."""
    stored = {
        key: (t.detach().float() if t.is_floating_point() else t).contiguous().clone()
        for key, t in tensors.items()
    }
    for key, tensor in stored.items():
        assert not tensor.is_floating_point() or tensor.isfinite().all(), key
    path = FOLDER / "attacks.safetensors"
    save_file(stored, path, metadata={"about": "tests/golden/make_attacks.py; see README.md"})
    print(f"{path.name}: {len(stored)} tensors, {path.stat().st_size} bytes")


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)

    torch.set_default_dtype(torch.float64)
    tensors = record_losses() | record_l1_projection() | record_planes() | record_tiny()
    torch.set_default_dtype(torch.float32)
    save(tensors | record_verdicts())

    versions = {"command": "python tests/golden/make_attacks.py", "tiny_seed": TINY_SEED}
    versions["python"] = platform.python_version()
    versions |= {package: version(package) for package in PACKAGES}
    versions["cpu"] = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    (FOLDER / "attacks_versions.json").write_text(json.dumps(versions, indent=2) + "\n")


if __name__ == "__main__":
    main()
