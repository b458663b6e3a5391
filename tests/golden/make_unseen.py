"""Records the corruptions of the unseen attacks as PyTorch computes them: images and gradients of the parameters.

    pip install torch numpy safetensors
    python tests/golden/make_unseen.py

Written from the descriptions of ImageNet-UA (Kaufmann et al., arXiv:1908.08016), with PyTorch's own operations wherever
it has them: convolutions of whole planes, `interpolate`, `grid_sample`, a JPEG round trip. Inputs are float32. From them
everything is computed in float64 and rounded to float32 once.
"""

import json
import math
import platform
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

FOLDER = Path(__file__).resolve().parent
SEED = 5
SIZES = [(24, 24), (40, 32)]


def pixel(x, shares, size):
    """Each block moves towards its top left pixel."""
    height, width = x.shape[-2:]
    rows, columns = torch.arange(height) // size, torch.arange(width) // size
    corners = x[:, rows * size][:, :, columns * size]
    share = shares[:, rows][:, :, columns]
    return x * (1 - share) + corners * share


def elastic(x, flow):
    """A coarse flow, enlarged bicubically, displaces where the image is read."""
    height, width = x.shape[-2:]
    flow = F.interpolate(flow[None], size=(height, width), mode="bicubic")
    down, across = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    grid = torch.stack([across, down], -1)[None] + flow.permute(0, 2, 3, 1)
    return F.grid_sample(x[None], grid, mode="bilinear", align_corners=False)[0]


def gabor_kernel(size, sides, frequency, angle, sigma=3.0):
    axis = torch.linspace(-0.5, 0.5, size)
    y, x = torch.meshgrid(axis, axis, indexing="ij")

    def wave(angle):
        along = x * math.cos(angle) + y * math.sin(angle)
        across = y * math.cos(angle) - x * math.sin(angle)
        envelope = torch.exp(-0.5 * (along**2 + across**2) / (sigma + 1e-3) ** 2)
        return envelope * torch.cos(2 * math.pi * frequency * along)

    return wave(angle) + sum(wave(angle + math.pi * side / sides) for side in range(1, sides)) / sides


def gabor(x, weights, mask, kernel):
    """A sparse plane per channel, convolved with the kernel."""
    noise = F.conv2d((weights * mask)[:, None], kernel[None, None], padding=kernel.shape[-1] // 2)[:, 0]
    return x + torch.maximum(torch.minimum(noise, 1 - x), -x)


def jpeg(x, noise):
    """To YCbCr, 8 x 8 blocks and their cosine transform; noise; and back."""
    _, height, width = x.shape
    k = torch.arange(8.0)
    dct = torch.cos(math.pi * (k[None] + 0.5) * k[:, None] / 8) / 2
    dct[0] /= math.sqrt(2)
    forward = torch.tensor(
        [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]
    )
    backward = torch.tensor([[1.0, 0.0, 1.402], [1.0, -0.344136, -0.714136], [1.0, 1.772, 0.0]])
    shift = torch.tensor([0.0, 128.0, 128.0])[:, None, None]
    ycbcr = torch.einsum("ij,jhw->ihw", forward, 255 * x) + shift
    blocks = ycbcr.reshape(3, height // 8, 8, width // 8, 8).transpose(2, 3).reshape(3, -1, 8, 8)
    coefficients = dct @ (blocks - 128) @ dct.T + 255 * noise
    blocks = dct.T @ coefficients @ dct + 128
    ycbcr = blocks.reshape(3, height // 8, width // 8, 8, 8).transpose(2, 3).reshape(3, height, width)
    return (torch.einsum("ij,jhw->ihw", backward, ycbcr - shift) / 255).clamp(0, 1)


def flake(size, end, thickness, is_mirrored, blur, sigma):
    """An antialiased line from the center to `end` (row, column), continued on the other side, and blurred."""
    half = size // 2
    down, across = end[0] - half, end[1] - half
    steep = across < down
    slope = across / down if steep else down / across
    wide = thickness * math.sqrt(1 + slope) / 2
    kernel = torch.zeros(size, size)
    for along in range((down if steep else across) + 1):
        for other in range(size - half):
            off = other - slope * along
            value = min(max(min(1 + wide / 2 - off, 1 + wide / 2 + off), 0), 1)
            row, column = (along, other) if steep else (other, along)
            kernel[half + row, half + column] = value
    kernel[: half + 1, : half + 1] = kernel.flip(0, 1)[: half + 1, : half + 1]
    if is_mirrored:
        kernel = kernel.flip(1)
    if blur == 1:
        return kernel
    at = torch.arange(blur) - blur // 2
    gauss = torch.exp(-0.5 * (at / sigma) ** 2)
    gauss = gauss / gauss.sum()
    padded = F.pad(kernel[None, None], [blur // 2] * 4, mode="reflect")
    return F.conv2d(padded, (gauss[:, None] * gauss)[None, None])[0, 0]


def snow(x, brightness, mask, kernels):
    """Layers of sparse planes, convolved with a flake each and added; the image is made paler."""
    planes = (brightness * mask) ** 4
    fallen = F.conv2d(planes[None], kernels[None], padding=kernels.shape[-1] // 2)[0]
    luma = (torch.tensor([0.2126, 0.7152, 0.0722])[:, None, None] * x).sum(0)
    pale = torch.maximum(x, 1.5 * luma + 0.5)
    return (0.85 * x + 0.15 * pale + fallen).clamp(0, 1)


def hsv_to_rgb(hsv):
    import colorsys

    return torch.tensor([colorsys.hsv_to_rgb(*row) for row in hsv.tolist()])


def kaleidoscope(x, changes, greys, masks, colors, transparency, edge=5):
    """Shapes over the image, then their edges: what a shape gains when it is enlarged."""
    masks = masks.to(x.dtype)
    painted = (masks[:, None] * (colors + changes)[:, :, None, None]).sum(0)
    covered = masks.amax(0)
    image = (1 - covered * (1 - transparency)) * x + painted
    larger = F.max_pool2d(masks[:, None], edge, stride=1, padding=edge // 2)[:, 0]
    edges = ((larger > 0) & (masks == 0)).any(0)
    return torch.where(edges, greys.abs(), image).clamp(0, 1), edges


def glitch(x, displacements):
    """Horizontal bars of each channel, displaced sideways."""
    _, height, width = x.shape
    bars = displacements.shape[1]
    shift = displacements[:, torch.arange(height) // (height // bars)][..., None]
    across = (2 * torch.arange(width) / width - 1).expand(3, height, width) + shift
    down = (2 * torch.arange(height) / height - 1)[:, None].expand(3, height, width)
    grid = torch.stack([across, down], -1)
    return F.grid_sample(x[:, None], grid, padding_mode="reflection", align_corners=False)[:, 0]


def wood(x, field, rings):
    """Rings around the center, displaced by a field that is enlarged bilinearly."""
    _, height, width = x.shape
    across = (torch.arange(width) - width / 2) * 2 / width
    down = ((torch.arange(height) - height / 2) * 2 / height)[:, None]
    displaced = F.interpolate(field[None, None], size=(height, width), mode="bilinear")[0, 0]
    distance = torch.sqrt(across**2 + down**2) + displaced
    return x * torch.sin(math.pi * rings * distance).abs() ** (1 / 8)


def main():
    torch.set_default_dtype(torch.float64)
    generator = torch.Generator().manual_seed(SEED)

    def uniform(*shape, low=0.0, high=1.0):
        return (low + (high - low) * torch.rand(shape, generator=generator)).float().double()

    tensors = {}
    for height, width in SIZES:
        size = f"{height}x{width}"
        large = height > 24
        # A few pixels are exactly 0 or 1.
        x = (uniform(3, height, width) * 1.2 - 0.1).clamp(0, 1).float().double()
        slopes = uniform(3, height, width, low=-1, high=1)
        tensors[f"images {size}"], tensors[f"slopes {size}"] = x, slopes

        def record(name, render, *parameters):
            parameters = [values.requires_grad_() for values in parameters]
            image = render(*parameters)
            gradients = torch.autograd.grad((image * slopes).sum(), parameters)
            tensors[f"{name} {size} image"] = image
            for number, (values, gradient) in enumerate(zip(parameters, gradients)):
                tensors[f"{name} {size} parameters {number}"] = values
                tensors[f"{name} {size} gradient {number}"] = gradient

        block = 16 if large else 4
        shape = (3, -(-height // block), -(-width // block))
        record("pixel", lambda shares: pixel(x, shares, block), uniform(*shape))

        factor = 8 if large else 2
        shape = (2, height // factor, width // factor)
        record("elastic", lambda flow: elastic(x, flow), uniform(*shape, low=-0.15, high=0.15))

        kernel = gabor_kernel(23, 5 if large else 3, 4.25, 0.6)
        mask = uniform(3, height, width) < 0.1
        tensors[f"gabor {size} points"] = mask.flatten().nonzero()[:, 0]
        tensors[f"gabor {size} kernel"] = kernel
        weights = uniform(3, height, width, low=-0.06, high=0.06)
        record("gabor", lambda weights: gabor(x, weights, mask, kernel), weights)

        noise = uniform(3, height // 8 * (width // 8), 8, 8, low=-0.05, high=0.05)
        record("jpeg", lambda noise: jpeg(x, noise), noise)

        side, blur = (15, 3) if large else (3, 1)
        draws = []
        for layer in range(5):
            end = [side // 2 + 1 + (3 * layer + 5 * axis) % (side - side // 2 - 1) for axis in range(2)]
            draws.append([*end, [1, 3, 5][layer % 3], layer % 2, 10 + layer])
        kernels = [flake(side, draw[:2], draw[2], draw[3] == 1, blur, draw[4]) for draw in draws]
        kernels = torch.stack(kernels)
        mask = uniform(5, height, width) < 0.03
        tensors[f"snow {size} points"] = mask.nonzero()
        tensors[f"snow {size} draws"] = torch.tensor(draws, dtype=torch.float64)
        tensors[f"snow {size} kernels"] = kernels
        brightness = uniform(5, height, width, low=-0.3, high=0.8)
        record("snow", lambda brightness: snow(x, brightness, mask, kernels), brightness)

        down, across = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        centers = torch.tensor([[2, 3], [11, 12], [13, 15], [20, 20]])
        near = [(down - row) ** 2 + (across - column) ** 2 < 14 for row, column in centers]
        masks = torch.stack(near)
        hsv = torch.stack([uniform(4), uniform(4, low=0.7), uniform(4, low=0.8)], 1)
        colors = hsv_to_rgb(hsv).float().double()
        tensors[f"kaleidoscope {size} masks"] = masks.to(torch.uint8)
        tensors[f"kaleidoscope {size} hsv"], tensors[f"kaleidoscope {size} colors"] = hsv, colors
        changes = uniform(4, 3, low=-0.15, high=0.15)
        greys = uniform(height, width, low=-0.15, high=0.15)
        transparency = 0.1 if large else 0.2

        def shapes(changes, greys):
            return kaleidoscope(x, changes, greys, masks, colors, transparency)[0]

        edges = kaleidoscope(x, changes, greys, masks, colors, transparency)[1]
        tensors[f"kaleidoscope {size} edges"] = edges.flatten().nonzero()[:, 0]
        record("kaleidoscope", shapes, changes, greys)

        bars = 8 if large else 12
        # Up to where a bar is displaced by more than the image and reflected twice.
        displacements = uniform(3, bars, low=-0.3, high=0.3)
        displacements[0, :2] = torch.tensor([3.3, -5.4]).float().double()
        record("glitch", lambda displacements: glitch(x, displacements), displacements)

        resolution = 32 if large else 16
        field = uniform(resolution, resolution, low=-0.1, high=0.1)
        record("wood", lambda field: wood(x, field, 4 if large else 5), field)

    stored = {
        name: (tensor.detach().float() if tensor.is_floating_point() else tensor).contiguous().clone()
        for name, tensor in tensors.items()
    }
    for name, tensor in stored.items():
        assert not tensor.is_floating_point() or tensor.isfinite().all(), name
    path = FOLDER / "unseen.safetensors"
    save_file(stored, path, metadata={"about": "tests/golden/make_unseen.py; see README.md"})
    print(f"{path.name}: {len(stored)} tensors, {path.stat().st_size} bytes")
    versions = {
        "command": "python tests/golden/make_unseen.py",
        "seed": SEED,
        "python": platform.python_version(),
        **{package: version(package) for package in ["torch", "safetensors"]},
    }
    (FOLDER / "unseen_versions.json").write_text(json.dumps(versions, indent=2) + "\n")


if __name__ == "__main__":
    main()
