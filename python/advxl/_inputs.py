"""Input images and labels: torch tensors, numpy arrays, data loaders and other iterators of batches."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from typing import Any, Iterable

from ._adapters import crossing, input_error, is_array, is_torch_tensor


def check_images(x: Any, name: str) -> None:
    """Check that ``x`` is a batch of images: floats of shape ``[n, channels, height, width]``."""
    shape = [int(length) for length in x.shape]
    kind = str(x.dtype).removeprefix("torch.")
    is_float = x.is_floating_point() if is_torch_tensor(x) else x.dtype.kind == "f"
    if not is_float:
        scaled = f"{name}.float() / 255" if is_torch_tensor(x) else f"{name}.astype('float32') / 255"
        hint = f"use {scaled}" if kind == "uint8" else None
        raise input_error(f"`{name}` is {kind}, expected floating-point images in [0, 1]", hint)
    if len(shape) != 4:
        hint = f"add the batch dimension: {name}[None]" if len(shape) == 3 else None
        raise input_error(f"`{name}` has shape {shape}, expected [n, channels, height, width]", hint)
    if shape[3] in (1, 3) and shape[1] not in (1, 3):
        turned = f"{name}.permute(0, 3, 1, 2)" if is_torch_tensor(x) else f"{name}.transpose(0, 3, 1, 2)"
        raise input_error(f"`{name}` has shape {shape}, which is channels last", f"use {turned}")
    if 0 in shape:
        raise input_error(f"`{name}` has shape {shape}: no images to attack")


def labels_of(y: Any, count: int, name: str) -> list[int]:
    """Return the labels as a list, after checking that there is one valid class number per image."""
    shape = [int(length) for length in y.shape] if hasattr(y, "shape") else [len(y)]
    if len(shape) != 1:
        hint = f"use {name}.argmax(1)" if len(shape) == 2 else None
        raise input_error(f"`{name}` has shape {shape}, expected one class number per image, [{count}]", hint)
    if shape[0] != count:
        raise input_error(f"`{name}` has {shape[0]} labels for {count} images")
    values = y.tolist() if hasattr(y, "tolist") else list(y)
    labels = []
    for index, value in enumerate(values):
        if isinstance(value, bool) or int(value) != value or value < 0:
            raise input_error(f"`{name}[{index}]` is {value}, expected a non-negative class number")
        labels.append(int(value))
    return labels


class TensorImages:
    """A torch tensor or numpy array of images, read batch by batch without copying it whole."""

    def __init__(self, x: Any) -> None:
        self.x = x
        self.shape = tuple(int(length) for length in x.shape[1:])

    def read(self, indices: list[int]) -> Any:
        if is_torch_tensor(self.x):
            import torch

            return crossing(self.x[torch.as_tensor(indices, device=self.x.device)])
        return crossing(self.x[indices])

    def adversarial(self) -> Any:
        """Return a copy of the images, to be filled with adversarial images."""
        return self.x.detach().clone() if is_torch_tensor(self.x) else self.x.copy()


class SpooledImages:
    """Batches of an iterator, stored in a temporary file, so that only one batch is in memory at a time.

    The file is in ``$TMPDIR`` and is deleted once its images are no longer used.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        handle, self._path = tempfile.mkstemp(prefix="advxl-images-")
        self._remove = weakref.finalize(self, _remove, self._path)
        labels: list[int] = []
        shape: tuple[int, ...] | None = None
        self.sample: Any = None
        with os.fdopen(handle, "wb") as file:
            for number, batch in enumerate(batches):
                x, y = _pair(batch, number)
                check_images(x, "x")
                if shape is None:
                    shape, self.sample = tuple(int(length) for length in x.shape[1:]), x[:1]
                elif tuple(x.shape[1:]) != shape:
                    raise input_error(
                        f"batch {number} has images of shape {list(x.shape[1:])}, but the first has {list(shape)}",
                        "resize all images to one size",
                    )
                labels += labels_of(y, len(x), "y")
                rows = crossing(x)
                file.write(memoryview(rows.numpy() if is_torch_tensor(rows) else rows).cast("B"))
        if shape is None:
            raise input_error("the iterator yielded no batches: no images to attack")
        self.shape, self.labels = shape, labels
        self.images = self._mapped(self._path, shared=False)

    def _mapped(self, path: str, shared: bool) -> Any:
        """Map the images of a file into memory, as a tensor or array like the batches."""
        shape = (len(self.labels), *self.shape)
        if not is_torch_tensor(self.sample):
            import numpy

            return numpy.memmap(path, dtype="float32", mode="r+" if shared else "c", shape=shape)
        import torch

        count = 1
        for length in shape:
            count *= length
        return torch.from_file(path, shared=shared, size=count, dtype=torch.float32).reshape(shape)

    def read(self, indices: list[int]) -> Any:
        return TensorImages(self.images).read(indices)

    def adversarial(self) -> Any:
        """Return a copy of the images in a separate temporary file, to be filled with adversarial images."""
        handle, path = tempfile.mkstemp(prefix="advxl-adversarial-")
        os.close(handle)
        shutil.copyfile(self._path, path)
        images = self._mapped(path, shared=True)
        # On Linux and macOS the mapping remains valid after the file is unlinked.
        os.unlink(path)
        return images


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass


def _pair(batch: Any, number: int) -> tuple[Any, Any]:
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        x, y = batch[0], batch[1]
        if is_torch_tensor(x) or is_array(x):
            return x, y
    raise input_error(
        f"batch {number} of the iterator is a {type(batch).__name__}, expected a pair of images and labels"
    )


def images_and_labels(x: Any, y: Any, names: tuple[str, str] = ("x_orig", "y_orig")) -> tuple[Any, list[int], Any]:
    """Return the images in the form that Rust reads, the labels, and a sample of the user's images."""
    if is_torch_tensor(x) or is_array(x):
        check_images(x, names[0])
        if y is None:
            raise input_error(f"`{names[1]}` is missing", "pass the class number of each image")
        return TensorImages(x), labels_of(y, len(x), names[1]), x
    if y is None and hasattr(x, "__iter__"):
        spooled = SpooledImages(x)
        return spooled, spooled.labels, spooled.sample
    raise input_error(
        f"`{names[0]}` is a {type(x).__name__}",
        "pass a torch tensor or numpy array with its labels, or a loader of (images, labels) alone",
    )
