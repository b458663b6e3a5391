"""``benchmark`` with the interface of RobustBench, on the CIFAR test sets."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any, Callable, Sequence

from ._adapters import input_error
from .autoattack import AutoAttack

# Data sets of RobustBench's leaderboards: (folder, file, key of the labels) of torchvision's downloads.
_CIFAR = {
    "cifar10": ("cifar-10-batches-py", "test_batch", b"labels"),
    "cifar100": ("cifar-100-python", "test", b"fine_labels"),
}
_EPS = {"Linf": 8 / 255, "L2": 0.5}


def benchmark(
    model: Callable[[Any], Any] | Sequence[Callable[[Any], Any]],
    n_examples: int = 10_000,
    dataset: Any = "cifar10",
    threat_model: Any = "Linf",
    to_disk: bool = False,
    model_name: str | None = None,
    data_dir: str = "./data",
    corruptions: Sequence[str] | None = None,
    device: Any = None,
    batch_size: int = 32,
    eps: float | None = None,
    log_path: str | None = None,
    preprocessing: Any = None,
    version: str = "standard",
    aa_state_path: Any = None,
) -> tuple[float, float]:
    """Return clean and robust accuracy on the first ``n_examples`` test images, like RobustBench's ``benchmark``.

    ``dataset`` is ``"cifar10"`` or ``"cifar100"``, read from torchvision's download in ``data_dir`` (nothing is
    downloaded here). ``threat_model`` is ``"Linf"`` (``eps`` defaults to 8/255) or ``"L2"`` (0.5). ``to_disk`` writes
    ``model_info/DATASET/THREAT/MODEL_NAME.json``. ``benchmark.result`` has the details of the last evaluation.
    """
    if isinstance(model, Sequence):
        raise input_error("`model` is a list", "call benchmark once for each model")
    name, threat = _word(dataset), _word(threat_model)
    if name not in _CIFAR:
        raise input_error(
            f"unsupported dataset {name!r}",
            "use cifar10 or cifar100; for ImageNet: advxl.evaluate(path, 'imagenet/val', ...), or AutoAttack on tensors",
        )
    if threat not in _EPS or corruptions is not None:
        raise input_error(f"unsupported threat model {threat!r}", f"use one of {', '.join(_EPS)}")
    if preprocessing is not None:
        raise input_error("`preprocessing` has no effect on CIFAR images", "omit it; put a defense's steps into the model")
    if to_disk and version == "fast":
        raise input_error("to_disk=True with version='fast': leaderboards list the standard version", "use version='standard'")
    if to_disk and model_name is None:
        raise input_error("to_disk=True requires `model_name`")
    import torch

    images, labels = _test_images(name, Path(data_dir).expanduser(), n_examples)
    x = torch.from_numpy(images)
    adversary = AutoAttack(
        model,
        norm=threat,
        eps=_EPS[threat] if eps is None else eps,
        version=version,
        device=device,
        log_path=log_path,
    )
    adversary.run_standard_evaluation(x, torch.tensor(labels), bs=batch_size, state_path=aa_state_path)
    found = adversary.result
    benchmark.result = found  # type: ignore[attr-defined]
    if to_disk:
        folder = Path("model_info") / name / threat
        folder.mkdir(parents=True, exist_ok=True)
        info = {
            "dataset": name,
            "eps": found["epsilon"],
            "clean_acc": round(100 * found.clean_accuracy, 4),
            "autoattack_acc": round(100 * found.robust_accuracy, 4),
        }
        (folder / f"{model_name}.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    return found.clean_accuracy, found.robust_accuracy


def _word(value: Any) -> str:
    """Return a string, or the value of one of RobustBench's enums."""
    return str(getattr(value, "value", value))


class _ArraysOnly(pickle.Unpickler):
    """Unpickler for arrays and plain values, which rejects all other classes and functions."""

    _allowed = {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed:
            raise pickle.UnpicklingError(f"it tries to call {module}.{name}")
        return super().find_class(module, name)


def _test_images(name: str, folder: Path, count: int) -> tuple[Any, list[int]]:
    """Return the first test images, ``[count, 3, 32, 32]`` in [0, 1], and their labels."""
    import numpy

    where, file, key = _CIFAR[name]
    path = next((p for p in (folder / where / file, folder / file) if p.is_file()), None)
    if path is None:
        raise input_error(
            f"`{where}/{file}` not found in `{folder}`",
            f"download it with torchvision.datasets.{name.upper()}(root={os.fspath(folder)!r}, download=True)",
        )
    try:
        with open(path, "rb") as source:
            found = _ArraysOnly(source, encoding="bytes").load()
        pixels, labels = found[b"data"], [int(label) for label in found[key]]
    except (pickle.UnpicklingError, KeyError, EOFError, TypeError) as error:
        raise input_error(f"`{path}` is not the {name} test set: {error}", "download it again") from error
    if not 1 <= count <= len(labels):
        raise input_error(f"n_examples={count}: `{path}` has {len(labels)} images", "use a number in that range")
    images = pixels[:count].reshape(count, 3, 32, 32).astype(numpy.float32) / numpy.float32(255)
    return images, labels[:count]
