"""The private extension module. Use the public API of `advxl` instead."""

import os
from typing import Any, Sequence

__version__: str

class AdvxlError(Exception):
    """Base class of advxl's exceptions."""

    message: str
    hint: str | None

class InputError(AdvxlError, ValueError):
    """Invalid input."""

class FailedError(AdvxlError):
    """The operation failed."""

class TryAgainError(AdvxlError):
    """The operation was stopped; the same call resumes it."""

class InternalError(AdvxlError):
    """A bug in advxl."""

class CrossingTensor:
    """Values that a framework can consume once with its `from_dlpack`."""

    @property
    def shape(self) -> list[int]: ...
    def __dlpack__(self, **options: Any) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

class Tape:
    """A recorded forward pass, for the backward pass."""

class Model:
    """A loaded model."""

    def __new__(
        cls,
        path: str | os.PathLike[str],
        arch: str | None,
        device: str,
        precision: str,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
    ) -> Model: ...
    @property
    def num_classes(self) -> int: ...
    @property
    def class_names(self) -> list[str]: ...
    @property
    def image_size(self) -> int: ...
    @property
    def mean(self) -> list[float]: ...
    @property
    def std(self) -> list[float]: ...
    @property
    def outputs_embeddings(self) -> bool: ...
    @property
    def num_parameters(self) -> int: ...
    @property
    def hash(self) -> str: ...
    @property
    def notes(self) -> list[str]: ...
    def logits(self, images: Any) -> CrossingTensor: ...
    def trace(self, images: Any) -> tuple[CrossingTensor, Tape]: ...
    def pull(self, tape: Tape, slopes: Any) -> CrossingTensor: ...

class Stop:
    """A stop request."""

    def __new__(cls) -> Stop: ...
    def request(self) -> None: ...
    @property
    def requested(self) -> bool: ...

def evaluate(
    model: Any,
    images: Any,
    labels: list[int],
    groups: list[list[dict[str, Any]]],
    *,
    batch: int,
    seed: int,
    stop: Stop,
    state: str | os.PathLike[str] | None = None,
    screen: Any = None,
    sink: Any = None,
    checks: bool = True,
    bound: float | None = None,
) -> str: ...
def perturb(
    model: Any,
    images: Any,
    labels: list[int],
    keys: list[int],
    attack: dict[str, Any],
    seed: int,
) -> CrossingTensor: ...
def main(arguments: list[str], command: list[str], binary: str) -> int: ...
def set_threads(count: int | None) -> None: ...
