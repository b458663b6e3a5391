"""Records the margin of probabilities (PMA) and the ranking of targets (MALT) as PyTorch computes them.

    pip install torch numpy safetensors
    python tests/golden/make_malt.py

Written from the papers' equations (arXiv:2411.15210, arXiv:2407.02240). Everything is computed in float64, by automatic
differentiation, and rounded to float32 once. The slopes of confident predictions cancel even in float64, so they are
stored as computed with 60 digits; automatic differentiation must agree to 1e-15.
"""

import json
import platform
from decimal import Decimal, getcontext
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file

FOLDER = Path(__file__).parent
SEED = 17
CLASSES, CANDIDATES, HIDDEN, IMAGES = 24, 12, 16, 16
DUAL = {"linf": 1, "l2": 2}
# Smallest relative difference between neighbors of a ranking. Rounding to float32 changes a distance by about 1e-6.
APART = 1e-4


def probability_margin(logits, labels):
    """Returns the largest probability of another class minus that of the label."""
    p = logits.softmax(1)
    own = torch.nn.functional.one_hot(labels, logits.shape[1]).bool()
    return p.masked_fill(own, -1).max(1).values - p[own]


def exact_slopes(logits, label):
    """Returns the derivative of the margin `p_r - p_y` by each logit."""
    powers = [Decimal(z).exp() for z in logits]
    p = [power / sum(powers) for power in powers]
    rival = max((k for k in range(len(p)) if k != label), key=lambda k: p[k])
    margin = p[rival] - p[label]
    return [float(p[k] * ((k == rival) - (k == label) - margin)) for k in range(len(p))]


def record_margins(generator):
    """Random logits of eight classes; the spread grows, up to predictions whose probability is 1 in float32."""
    logits = torch.randn(24, 8, generator=generator) * torch.logspace(-0.5, 1.2, 24).view(-1, 1)
    labels = torch.randint(0, 8, (24,), generator=generator)
    # Confident predictions, correct and wrong.
    for row in range(16, 24):
        logits[row, labels[row] if row < 21 else (labels[row] + 1) % 8] += 4 * row - 50
    logits = logits.float().double().requires_grad_()
    values = probability_margin(logits, labels)
    (differentiated,) = torch.autograd.grad(values.sum(), logits)
    slopes = torch.tensor([exact_slopes(*row) for row in zip(logits.tolist(), labels.tolist())])
    assert (slopes - differentiated).abs().max() < 1e-15
    return {"pma_logits": logits.detach(), "pma_labels": labels, "pma_values": values, "pma_slopes": slopes}


def record_ranking(generator):
    """The network is `tanh(x w1 + b1) w2 + b2`; labels are its predictions."""
    w1 = torch.randn(48, HIDDEN, generator=generator) * 0.4
    # Classes differ in how steep they are, so that the largest logit is seldom the nearest boundary.
    w2 = torch.randn(HIDDEN, CLASSES, generator=generator) * torch.logspace(-0.6, 0.4, CLASSES)
    w2 = w2[:, torch.randperm(CLASSES, generator=generator)]
    b1, b2 = (torch.randn(n, generator=generator) * 0.2 for n in (HIDDEN, CLASSES))
    w1, w2, b1, b2 = (tensor.float().double() for tensor in (w1, w2, b1, b2))

    def network(x):
        return torch.tanh(x.flatten() @ w1 + b1) @ w2 + b2

    kept, labels, rankings = [], [], {norm: [] for norm in DUAL}
    while len(kept) < IMAGES:
        x = torch.rand(3, 4, 4, generator=generator).float().double()
        logits = network(x)
        order = logits.argsort(descending=True)
        label, candidates = order[0], order[1 : CANDIDATES + 1]
        jacobian = torch.func.jacrev(network)(x).flatten(1)
        gaps = logits[label] - logits[candidates]
        change = jacobian[label] - jacobian[candidates]
        distances = {norm: gaps / change.norm(p=p, dim=1) for norm, p in DUAL.items()}
        sorted_distances = [d.sort().values for d in distances.values()] + [logits[order]]
        if any(((d[1:] - d[:-1]).abs() < APART * d[1:].abs()).any() for d in sorted_distances):
            continue
        kept.append(x)
        labels.append(label)
        for norm, d in distances.items():
            rankings[norm].append(candidates[d.argsort()])
    changed = sum((one != other).any().item() for one, other in zip(rankings["linf"], rankings["l2"]))
    print(f"{changed} of {IMAGES} images have different rankings in linf and l2")
    names = {"malt_w1": w1, "malt_b1": b1, "malt_w2": w2, "malt_b2": b2}
    names |= {"malt_images": torch.stack(kept), "malt_labels": torch.stack(labels)}
    return names | {f"malt_{norm}": torch.stack(found) for norm, found in rankings.items()}


def main():
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    getcontext().prec = 60
    generator = torch.Generator().manual_seed(SEED)
    tensors = record_margins(generator) | record_ranking(generator)
    stored = {
        key: (t.detach().float() if t.is_floating_point() else t).contiguous().clone() for key, t in tensors.items()
    }
    assert all(t.isfinite().all() for t in stored.values() if t.is_floating_point())
    path = FOLDER / "malt.safetensors"
    save_file(stored, path, metadata={"about": "tests/golden/make_malt.py; see README.md"})
    print(f"{path.name}: {len(stored)} tensors, {path.stat().st_size} bytes")
    versions = {"command": "python tests/golden/make_malt.py", "seed": SEED, "python": platform.python_version()}
    versions |= {package: version(package) for package in ("torch", "safetensors")}
    (FOLDER / "malt_versions.json").write_text(json.dumps(versions, indent=2) + "\n")


if __name__ == "__main__":
    main()
