"""Models loaded by advxl, as callables."""

from __future__ import annotations

import os
from typing import Any, Sequence

from . import _advxl
from ._adapters import (
    _torch_functions,
    array_from_host,
    array_to_host,
    from_host,
    input_error,
    is_array,
    is_torch_tensor,
    to_host,
)


class Model:
    """A model loaded with ``advxl.load``. Callable on torch tensors and numpy arrays.

    ``model(x)`` maps images ``[n, 3, size, size]`` in [0, 1] (normalization is inside the model) to outputs
    ``[n, num_classes]`` of the same type, device and dtype. For torch tensors, gradients flow back to ``x``.
    """

    def __init__(self, loaded: _advxl.Model, path: str) -> None:
        self._loaded = loaded
        self.path = path
        self.training = False

    @property
    def num_classes(self) -> int:
        """Number of outputs."""
        return self._loaded.num_classes

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, empty if the model has none."""
        return self._loaded.class_names

    @property
    def image_size(self) -> int:
        """Image size in pixels that the model expects."""
        return self._loaded.image_size

    @property
    def mean(self) -> list[float]:
        """Mean of each channel, subtracted inside the model."""
        return self._loaded.mean

    @property
    def std(self) -> list[float]:
        """Standard deviation of each channel, by which the model divides."""
        return self._loaded.std

    @property
    def num_parameters(self) -> int:
        """Number of parameters."""
        return self._loaded.num_parameters

    @property
    def hash(self) -> str:
        """Hash of the weights."""
        return self._loaded.hash

    def __call__(self, x: Any) -> Any:
        if is_torch_tensor(x):
            return _torch_functions().Loaded.apply(x, self._loaded)
        if is_array(x):
            return array_from_host(self._loaded.logits(array_to_host(x))).astype(x.dtype, copy=False)
        raise input_error(f"`x` is a {type(x).__name__}, expected a torch tensor or a numpy array")

    def input_gradient(self, x: Any, slopes: Any) -> Any:
        """Return the gradient of ``(slopes * model(x)).sum()`` with respect to ``x``, of the same type as ``x``."""
        if is_torch_tensor(x):
            import torch

            _, tape = self._loaded.trace(to_host(x))
            return from_host(self._loaded.pull(tape, to_host(slopes))).to(x)
        _, tape = self._loaded.trace(array_to_host(x))
        return array_from_host(self._loaded.pull(tape, array_to_host(slopes))).astype(x.dtype, copy=False)

    def eval(self) -> "Model":
        """Return the model itself, which is always in evaluation mode."""
        return self

    def __repr__(self) -> str:
        return (
            f"<advxl.Model {self.path}: {self.num_parameters:,} parameters, {self.num_classes} classes, "
            f"{self.image_size} x {self.image_size} pixels>"
        )


def load(
    path: str | os.PathLike[str],
    *,
    arch: str | None = None,
    device: str = "auto",
    precision: str = "f32",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Model:
    """Load a model for inference and attacks.

    ``path`` is a run, a model folder (advxl, timm, open_clip or transformers), or, with ``arch`` (an architecture name
    of timm or open_clip), a weight file: safetensors, ``.pth`` or ``.bin``. Nothing in a pickle is executed. ``mean``
    and ``std`` override the model's normalization, for pixels in [0, 1].

    ``device`` is ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:1"``; ``precision`` is ``"f32"``, ``"tf32"`` or
    ``"bf16"``.
    """
    import warnings

    from .autoattack import _use_threads

    _use_threads()
    loaded = _advxl.Model(
        os.path.expanduser(os.fspath(path)),
        arch,
        device,
        precision,
        None if mean is None else [float(value) for value in mean],
        None if std is None else [float(value) for value in std],
    )
    for note in loaded.notes:
        warnings.warn(note, stacklevel=2)
    return Model(loaded, os.fspath(path))
