"""Record results of PyTorch, timm and torchattacks for comparison with advxl.

    pip install torch timm torchattacks numpy safetensors
    python tests/golden/make_golden.py

Writes `vit`, `models`, `position`, `adamw`, `pgd`, `loss` and `contrastive` (`.safetensors`) and `versions.json` next
to this file. `README.md` lists every tensor. Inputs are rounded to float32 first, then everything is computed
in float64 and stored as float32: a test compares float32 arithmetic with the exact result, not with
the rounding of another program. Two computations are float32 throughout: PGD, because attacks run in that
precision, and timm's resampling, which casts internally.
"""

import json
import platform
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
import torchattacks
from safetensors.torch import save_file
from timm.data.mixup import mixup_target
from timm.layers import LayerNorm2d, PatchEmbed, build_sincos2d_pos_embed, resample_abs_pos_embed
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models.convnext import ConvNeXt
from timm.models.vision_transformer import VisionTransformer

FOLDER = Path(__file__).resolve().parent
PACKAGES = ["torch", "timm", "torchattacks", "numpy", "safetensors"]

# Only `pgd` depends on the choice of the seed. Of the seeds 0 to 99, this one keeps the gradients of all five
# sign steps furthest from zero, where rounding could flip a sign (see `record_pgd`).
SEED = 14
SMALLEST_GRADIENT = 4e-6

CLASSES = 5
SMOOTHING = 0.1
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Normalized(torch.nn.Module):
    """A model of images in [0, 1], with the normalization as its first layer, as in advxl."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        mean, std = (images.new_tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        return self.model((images - mean) / std)


def random(generator, *shape, scale=1.0, shift=0.0):
    """Returns normal random numbers in float64 that are exact in float32."""
    values = torch.randn(shape, generator=generator) * scale + shift
    return values.float().double()


def random_images(generator, *shape):
    """Returns pixels in [0, 1]; about one in six is exactly 0 or 1, so that clipping matters."""
    pixels = torch.rand(shape, generator=generator) * 1.2 - 0.1
    return pixels.clamp(0, 1).float().double()


def small_vit(pool, seed, gelu="none"):
    """Returns a timm ViT with random nonzero weights and logits of the order of one."""
    model = VisionTransformer(
        img_size=16,
        patch_size=4,
        embed_dim=24,
        depth=2,
        num_heads=3,
        mlp_ratio=4,
        num_classes=CLASSES,
        global_pool=pool,
        class_token=True,
        qkv_bias=True,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        act_layer=partial(torch.nn.GELU, approximate=gelu),  # `none` is the exact GELU, with erf
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in ("cls_token", "pos_embed"):
                weight.copy_(random(generator, *weight.shape, scale=0.3))
            elif name.endswith("bias"):
                weight.copy_(random(generator, *weight.shape, scale=0.2))
            elif "norm" in name:
                weight.copy_(random(generator, *weight.shape, scale=0.2, shift=1.0))
            else:
                fan_in = weight[0].numel()
                weight.copy_(random(generator, *weight.shape, scale=fan_in**-0.5))
    return Normalized(model).eval()


def small_convnext(**arguments):
    """Returns a timm ConvNeXt whose stages have 16 x 16, 8 x 8, 4 x 4 and 2 x 2 positions."""
    return ConvNeXt(num_classes=CLASSES, depths=(1, 1, 2, 1), dims=(8, 12, 16, 24), patch_size=1, **arguments)


class ConvStem(torch.nn.Module):
    """3 x 3 convolutions, norms over the channels and GELUs: the stem of Singh et al. 2023 for both models."""

    def __init__(self, outputs, steps, width=None):
        super().__init__()
        layers, inputs = [], 3
        for channels, step in zip(outputs, steps):
            layers += [torch.nn.Conv2d(inputs, channels, 3, step, padding=1), LayerNorm2d(channels, eps=1e-6), torch.nn.GELU()]
            inputs = channels
        if width is not None:
            layers.append(torch.nn.Conv2d(inputs, width, 1))
        self.stem = torch.nn.Sequential(*layers)

    def forward(self, x):
        return self.stem(x)


def randomised(model, seed):
    """Sets random nonzero weights that give logits of the order of one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in ("cls_token", "pos_embed"):
                weight.copy_(random(generator, *weight.shape, scale=0.3))
            elif name.endswith("bias"):
                weight.copy_(random(generator, *weight.shape, scale=0.2))
            elif weight.dim() == 1:  # factors of norms, layer scales
                weight.copy_(random(generator, *weight.shape, scale=0.2, shift=1.0))
            else:
                weight.copy_(random(generator, *weight.shape, scale=weight[0].numel() ** -0.5))
    return Normalized(model).eval()


def batch(seed):
    """Images [4, 3, 16, 16] and labels [4]."""
    generator = torch.Generator().manual_seed(1000 + seed)
    images = random_images(generator, 4, 3, 16, 16)
    labels = torch.randint(0, CLASSES, (4,), generator=generator)
    return images, labels


def record_vit():
    """Records logits, loss and every gradient of the ViT, for both kinds of pooling."""
    images, labels = batch(SEED)
    tensors = {"images": images, "labels": labels}
    for pool in ("token", "avg"):
        model = small_vit(pool, SEED)
        pixels = images.clone().requires_grad_()
        logits = model(pixels)
        loss = F.cross_entropy(logits, labels, label_smoothing=SMOOTHING)
        loss.backward()
        tensors[f"{pool}_logits"] = logits
        tensors[f"{pool}_loss"] = loss.view(1)
        tensors[f"{pool}_image_gradient"] = pixels.grad
        for name, weight in model.model.named_parameters():
            tensors[f"{pool}.{name}"] = weight
            tensors[f"{pool}_gradient.{name}"] = weight.grad
    # Tanh GELU, with the same weights as `avg`.
    pixels = images.clone().requires_grad_()
    logits = small_vit("avg", SEED, gelu="tanh")(pixels)
    F.cross_entropy(logits, labels, label_smoothing=SMOOTHING).backward()
    tensors["tanh_logits"], tensors["tanh_image_gradient"] = logits, pixels.grad
    return tensors


def sincos_2d(width, grid):
    """MAE's fixed position embedding, [1 + grid * grid, width], zeros for the class token.

    With omega_i = 10000^(-i / (width / 4)), patch (row, column) gets
    [sin(column omega), cos(column omega), sin(row omega), cos(row omega)]. MAE's code calls the first
    half `emb_h`, but its meshgrid puts the columns there; the result is authoritative.
    """
    omega = 10000.0 ** (-np.arange(width // 4) / (width / 4))
    rows, columns = np.divmod(np.arange(grid * grid), grid)
    column_angles, row_angles = np.outer(columns, omega), np.outer(rows, omega)
    quarters = [f(angles) for angles in (column_angles, row_angles) for f in (np.sin, np.cos)]
    patches = torch.from_numpy(np.concatenate(quarters, axis=1))

    # timm has the same four quarters in another order: sin row, sin column, cos row, cos column.
    theirs = build_sincos2d_pos_embed([grid, grid], dim=width)
    theirs = theirs.view(-1, 4, width // 4)[:, [1, 3, 0, 2]].reshape(-1, width)
    assert torch.allclose(patches, theirs.double(), atol=1e-6)
    return torch.cat([torch.zeros(1, width), patches])


def record_models():
    """Records logits, loss and every gradient of a ConvNeXt and of both architectures with a convolutional stem."""
    images, labels = batch(SEED)
    tensors = {"images": images, "labels": labels}
    convnext, stemmed, products = small_convnext(), small_convnext(), small_convnext(conv_mlp=True)
    stemmed.stem = ConvStem([4, 8], [1, 1])
    vit = small_vit("avg", SEED).model
    vit.patch_embed = PatchEmbed(16, 2, embed_dim=24)
    vit.patch_embed.proj = ConvStem([48], [2], 24)
    vit.pos_embed = torch.nn.Parameter(torch.zeros(1, 65, 24))
    models = {"convnext": convnext, "products": products, "convnext_stem": stemmed, "vit_stem": vit}
    for name, model in models.items():
        model = randomised(model, SEED)
        pixels = images.clone().requires_grad_()
        logits = model(pixels)
        loss = F.cross_entropy(logits, labels, label_smoothing=SMOOTHING)
        loss.backward()
        tensors |= {f"{name}_logits": logits, f"{name}_loss": loss.view(1), f"{name}_image_gradient": pixels.grad}
        for weight_name, weight in model.model.named_parameters():
            tensors[f"{name}.{weight_name}"] = weight
            if name != "products":  # the same function as `convnext`, which has the gradients
                tensors[f"{name}_gradient.{weight_name}"] = weight.grad
    return tensors


def record_position():
    """Records fixed positions at two sizes, and learned ones resampled up, down and to an odd size."""
    tensors = {f"sincos_{grid}x{grid}": sincos_2d(24, grid) for grid in (4, 7)}
    generator = torch.Generator().manual_seed(SEED)
    learned = random(generator, 1, 1 + 4 * 4, 8)
    tensors["learned_4x4"] = learned
    for grid in (7, 2, 3):
        tensors[f"learned_4x4_to_{grid}x{grid}"] = resample_abs_pos_embed(
            learned, [grid, grid], num_prefix_tokens=1, interpolation="bicubic", antialias=True
        )
    return tensors


def record_adamw():
    """Records five updates: clipping by the global norm, AdamW, EMA."""
    steps, decay = 5, 0.9
    generator = torch.Generator().manual_seed(SEED)
    weight = random(generator, 6, 4).requires_grad_()
    bias = random(generator, 4).requires_grad_()
    averages = [weight.detach().clone(), bias.detach().clone()]
    rates = torch.tensor([0.002, 0.01, 0.008, 0.005, 0.001]).float().double()
    # Norms on both sides of the limit of 1, so that only some updates are clipped.
    scales = [1.0, 0.05, 0.5, 0.1, 2.0]
    gradients = [
        [random(generator, *p.shape, scale=scale) for p in (weight, bias)] for scale in scales
    ]
    optimizer = torch.optim.AdamW(
        [{"params": [weight], "weight_decay": 0.05}, {"params": [bias], "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=1e-8,
    )

    tensors = {"weight": weight.detach().clone(), "bias": bias.detach().clone()}
    tensors["learning_rates"] = rates
    history = {name: [] for name in ("norms", "weight", "bias", "weight_ema", "bias_ema")}
    for rate, (weight_gradient, bias_gradient) in zip(rates, gradients):
        for group in optimizer.param_groups:
            group["lr"] = rate.item()
        weight.grad, bias.grad = weight_gradient.clone(), bias_gradient.clone()
        history["norms"].append(torch.nn.utils.clip_grad_norm_([weight, bias], 1.0))
        optimizer.step()
        for average, parameter in zip(averages, (weight, bias)):
            average.mul_(decay).add_(parameter.detach(), alpha=1 - decay)
        for name, value in zip(("weight", "bias", "weight_ema", "bias_ema"), (weight, bias, *averages)):
            history[name].append(value.detach().clone())

    tensors["weight_gradients"] = torch.stack([g[0] for g in gradients])
    tensors["bias_gradients"] = torch.stack([g[1] for g in gradients])
    tensors["gradient_norms"] = torch.stack(history.pop("norms"))
    for name, values in history.items():
        assert len(values) == steps
        tensors[f"{name}_after"] = torch.stack(values)
    return tensors


def climb(model, images, labels, step, project, steps):
    """Runs PGD from the clean images; returns the images after each step, and the smallest gradient entries."""
    adversarial, path, smallest = images, [], []
    for _ in range(steps):
        pixels = adversarial.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(pixels), labels), pixels)
        adversarial = (images + project(adversarial + step(gradient) - images)).clamp(0, 1)
        path.append(adversarial)
        smallest.append(gradient.abs().min())
    return torch.stack(path), torch.stack(smallest)


def pgd_inputs(seed):
    """Returns the `token` ViT of this seed, its images and its labels, in float32."""
    images, labels = batch(seed)
    return small_vit("token", seed).float(), images.float(), labels


def linf_path(model, images, labels):
    """Runs five steps of 2/255 with epsilon 8/255."""
    return climb(
        model,
        images,
        labels,
        step=lambda gradient: 2 / 255 * gradient.sign(),
        project=lambda change: change.clamp(-8 / 255, 8 / 255),
        steps=5,
    )


def l2_path(model, images, labels):
    """Runs five steps of 0.2 with epsilon 0.5. As in torchattacks, projects to the ball, then to the pixel range."""

    def norms(change):
        return change.flatten(1).norm(dim=1).view(-1, 1, 1, 1)

    return climb(
        model,
        images,
        labels,
        step=lambda gradient: 0.2 * (gradient / (norms(gradient) + 1e-10)),
        project=lambda change: change * (0.5 / norms(change)).clamp(max=1),
        steps=5,
    )


def record_pgd():
    """Records the images after every step of PGD for two norms, the last equal to torchattacks to the bit."""
    model, images, labels = pgd_inputs(SEED)

    linf, smallest = linf_path(model, images, labels)
    # The float32 error is below 1e-7 here. Closer to zero, another order of summation could flip a
    # sign, and with it a pixel by two steps.
    assert smallest.min() > SMALLEST_GRADIENT, f"smallest gradient {smallest.min():.1e}"
    theirs = torchattacks.PGD(model, eps=8 / 255, alpha=2 / 255, steps=5, random_start=False)
    assert torch.equal(linf[-1], theirs(images, labels))

    l2, _ = l2_path(model, images, labels)
    theirs = torchattacks.PGDL2(model, eps=0.5, alpha=0.2, steps=5, random_start=False)
    assert torch.equal(l2[-1], theirs(images, labels))

    return {
        "images": images,
        "labels": labels,
        "linf_after": linf,
        "linf_smallest_gradient": smallest,
        "l2_after": l2,
    }


def record_contrastive():
    """Records CLIP's loss of a batch and its gradients, as defined by open_clip."""
    generator = torch.Generator().manual_seed(SEED)
    images = random(generator, 6, 5).requires_grad_()
    texts = F.normalize(random(generator, 6, 5), dim=1).float().double().requires_grad_()
    log_scale = torch.tensor([1.75]).requires_grad_()
    similarities = log_scale.exp() * F.normalize(images, dim=1) @ texts.T
    own = torch.arange(6)
    loss = (F.cross_entropy(similarities, own) + F.cross_entropy(similarities.T, own)) / 2
    loss.backward()
    return {
        "images": images, "texts": texts, "log_scale": log_scale, "loss": loss.view(1),
        "image_gradient": images.grad, "text_gradient": texts.grad, "log_scale_gradient": log_scale.grad,
    }


def record_loss():
    """Records cross entropy with the soft targets of MixUp, with label smoothing before mixing."""
    generator = torch.Generator().manual_seed(SEED)
    logits = random(generator, 6, 7, scale=3.0)
    logits[5] = (logits[5] + 100).float().double()  # exp(100) overflows float32
    labels = torch.randint(0, 7, (6,), generator=generator)
    # One weight per image; the partner of image i is image 5 - i. The first image is not mixed.
    weights = torch.tensor([1.0, 0.3, 0.75, 0.5, 0.9, 0.1]).float().double()
    targets = mixup_target(labels, 7, lam=weights.view(-1, 1), smoothing=SMOOTHING)

    logits.requires_grad_()
    values = -(targets * F.log_softmax(logits, dim=1)).sum(dim=1)
    values.mean().backward()
    assert torch.allclose(values.mean(), SoftTargetCrossEntropy()(logits, targets))
    assert torch.allclose(values[0], LabelSmoothingCrossEntropy(SMOOTHING)(logits[:1], labels[:1]))
    return {
        "logits": logits,
        "labels": labels,
        "weights": weights,
        "targets": targets,
        "values": values,
        "gradient": logits.grad,
    }


def save(name, tensors):
    """Saves floating-point tensors as float32; labels stay int64."""
    stored = {
        key: (t.detach().float() if t.is_floating_point() else t).contiguous().clone()
        for key, t in tensors.items()
    }
    for key, tensor in stored.items():
        assert not tensor.is_floating_point() or tensor.isfinite().all(), key
    path = FOLDER / f"{name}.safetensors"
    save_file(stored, path, metadata={"about": f"tests/golden/make_golden.py, {name}; see README.md"})
    print(f"{path.name}: {len(stored)} tensors, {path.stat().st_size} bytes")


def main():
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)

    save("vit", record_vit())
    save("models", record_models())
    save("position", record_position())
    save("adamw", record_adamw())
    save("pgd", record_pgd())
    save("loss", record_loss())
    save("contrastive", record_contrastive())

    versions = {"command": "python tests/golden/make_golden.py", "seed": SEED}
    versions["python"] = platform.python_version()
    versions |= {package: version(package) for package in PACKAGES}
    versions["cpu"] = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    (FOLDER / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


if __name__ == "__main__":
    main()
