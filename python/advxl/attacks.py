"""Single attacks on batches of images."""

from __future__ import annotations

from typing import Any, Callable, Sequence

from . import _advxl
from ._adapters import adapter_of, crossing, input_error, is_torch_tensor
from ._inputs import check_images, labels_of
from .autoattack import NORMS, AutoAttack, _put, _use_threads


def pgd(
    model: Callable[[Any], Any],
    x: Any,
    y: Any,
    *,
    eps: float | str,
    norm: str = "Linf",
    step_size: float | str | None = None,
    n_iter: int = 20,
    seed: int = 0,
    keys: Sequence[int] | None = None,
    device: Any = None,
) -> Any:
    """Run PGD on the cross entropy (Madry et al. 2018) from a random start, and return the last iterates.

    ``x`` ``[n, channels, height, width]`` in [0, 1] and ``y`` ``[n]`` are torch tensors or numpy arrays. All images,
    including misclassified ones, go through the model in one batch. ``step_size`` defaults to a quarter of ``eps``. The
    random start of an image depends on its key, which defaults to its index in the batch: pass other ``keys`` for other
    starts.
    """
    if norm not in NORMS:
        raise input_error(f"unknown norm {norm!r}", f"use any of {', '.join(NORMS)}")
    check_images(x, "x")
    labels = labels_of(y, len(x), "y")
    spec = {"name": "pgd", "norm": NORMS[norm], "eps": str(eps), "steps": int(n_iter)}
    if step_size is not None:
        spec["step_size"] = str(step_size)
    adapter = adapter_of(model, x, device)
    numbers = list(range(len(labels))) if keys is None else [int(key) for key in keys]
    if len(numbers) != len(labels):
        raise input_error(f"{len(numbers)} keys for {len(labels)} images")
    _use_threads()
    found = _advxl.perturb(adapter, crossing(x), labels, numbers, spec, int(seed))
    adversarial = x.detach().clone() if is_torch_tensor(x) else x.copy()
    _put(adversarial, list(range(len(labels))), found)
    return adversarial


def apgd(
    model: Callable[[Any], Any],
    x: Any,
    y: Any,
    *,
    eps: float | str,
    norm: str = "Linf",
    loss: str = "ce",
    n_iter: int = 100,
    n_restarts: int = 1,
    n_target_classes: int = 9,
    eot_iter: int = 1,
    bs: int = 250,
    seed: int = 0,
    device: Any = None,
) -> Any:
    """Run Auto-PGD (Croce and Hein 2020). Returns adversarial images where the model was fooled, else clean ones.

    ``loss`` is ``"ce"``, ``"dlr"`` or ``"dlr-targeted"`` (with ``n_target_classes`` targets in turn). For randomized
    models, ``eot_iter`` gradients are averaged.
    """
    names = {"ce": "apgd-ce", "dlr": "apgd-dlr", "dlr-targeted": "apgd-t"}
    if loss not in names:
        raise input_error(f"unknown loss {loss!r}", f"use one of {', '.join(names)}")
    adversary = _custom(model, norm, eps, seed, device, names[loss])
    for settings in (adversary.apgd, adversary.apgd_targeted):
        settings.n_iter, settings.n_restarts, settings.eot_iter = n_iter, n_restarts, eot_iter
    adversary.apgd_targeted.n_target_classes = n_target_classes
    return _fooled(adversary, x, y, bs)


def fab(
    model: Callable[[Any], Any],
    x: Any,
    y: Any,
    *,
    eps: float | str,
    norm: str = "Linf",
    targeted: bool = True,
    n_iter: int = 100,
    n_restarts: int = 1,
    n_target_classes: int = 9,
    bs: int = 250,
    seed: int = 0,
    device: Any = None,
) -> Any:
    """Run FAB (Croce and Hein 2020). Returns adversarial images within ``eps``, else clean ones.

    The targeted attack tries ``n_target_classes`` targets in turn, with one start each. The untargeted attack moves
    towards the class with the nearest boundary, which needs the gradients of all classes.
    """
    adversary = _custom(model, norm, eps, seed, device, "fab-t" if targeted else "fab")
    adversary.fab.n_iter, adversary.fab.n_restarts = n_iter, n_restarts
    adversary.fab.n_target_classes = n_target_classes
    return _fooled(adversary, x, y, bs)


def square(
    model: Callable[[Any], Any],
    x: Any,
    y: Any,
    *,
    eps: float | str,
    norm: str = "Linf",
    n_queries: int = 5000,
    bs: int = 250,
    seed: int = 0,
    device: Any = None,
) -> Any:
    """Run the gradient-free Square attack (Andriushchenko et al. 2020). Returns adversarial images, else clean ones."""
    adversary = _custom(model, norm, eps, seed, device, "square")
    adversary.square.n_queries = n_queries
    return _fooled(adversary, x, y, bs)


def _custom(model: Any, norm: str, eps: Any, seed: int, device: Any, attack: str) -> AutoAttack:
    return AutoAttack(
        model, norm=norm, eps=eps, seed=seed, verbose=False, attacks_to_run=[attack], version="custom", device=device
    )


def _fooled(adversary: AutoAttack, x: Any, y: Any, bs: int) -> Any:
    check_images(x, "x")
    return adversary.run_standard_evaluation(x, y, bs=bs)
