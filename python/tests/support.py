"""What the tests share. Run them with `scripts/test python`."""

import os
import unittest

try:
    import numpy
except ImportError:
    numpy = None
try:
    import torch
except ImportError:
    torch = None

needs_numpy = unittest.skipUnless(numpy, "numpy is not installed")
needs_torch = unittest.skipUnless(torch, "torch is not installed")

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")

# A model that trains in seconds.
RECIPE = """
seed = 7
precision = "f32"
model = { size = "vit_micro", width = 32, depth = 2, heads = 2, hidden = 64, pool = "average", class_token = true, position = "learned" }
data = { train = "synthetic:200", test = "synthetic:64" }
checkpoint = { every_samples = 64, keep = 2 }
log = { every_samples = 32 }

[[final_evaluation]]
name = "pgd"
images = 16
attacks = ["pgd"]
norm = "linf"
epsilon = "4/255"

[[stage]]
name = "pretrain"
batch = 32
phases = [{ image_size = 32, samples = 128 }]
attack = { norm = "linf", epsilon = "4/255", step_size = "4/255", steps = 1, start = "random" }
objective = { kind = "cross_entropy" }
optimizer = { kind = "adamw", weight_decay = 0.05, betas = [0.9, 0.95] }
learning_rate = { peak = 1e-3, warmup_samples = 0, decay = "cosine" }
augmentation = { flip = true }
"""


def linear_functions():
    """A linear model of four classes on images of 3 x 4 x 4 pixels: its logits and gradient, on numpy arrays, and weights."""
    weights = numpy.random.default_rng(5).standard_normal((48, 4)).astype("float32")

    def logits(x):
        return x.reshape(len(x), 48) @ weights

    def gradient(x, slopes):
        return (slopes @ weights.T).reshape(x.shape)

    return logits, gradient, weights


def linear_images(count, seed=0):
    """Images well inside of [0, 1], and the classes that the linear model takes them for."""
    x = numpy.random.default_rng(seed).uniform(0.3, 0.7, (count, 3, 4, 4)).astype("float32")
    logits, _, _ = linear_functions()
    return x, logits(x).argmax(1)


def linear_margins(x, labels, norm):
    """How far each image is from the nearest other class of the linear model, in a norm: known on paper."""
    logits, _, weights = linear_functions()
    z = logits(x)
    nearest = []
    for row, label in zip(z, labels):
        distances = []
        for rival in range(4):
            if rival == label:
                continue
            difference = weights[:, label] - weights[:, rival]
            dual = {
                "Linf": numpy.abs(difference).sum(),
                "L2": numpy.sqrt((difference**2).sum()),
            }[norm]
            distances.append((row[label] - row[rival]) / dual)
        nearest.append(min(distances))
    return numpy.array(nearest)
