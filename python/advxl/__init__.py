"""Train and evaluate adversarially robust vision models.

AutoAttack on any torch model, with the interface of the ``autoattack`` package:

    from advxl import AutoAttack

    adversary = AutoAttack(model, norm="Linf", eps=8 / 255)
    x_adv = adversary.run_standard_evaluation(x_test, y_test, bs=100, state_path="evaluation.state")

- attacks: ``AutoAttack``, ``benchmark``, ``pgd``, ``apgd``, ``fab``, ``square``
- models: ``load``, ``Functions`` (any framework), ``Defense`` (preprocessing, BPDA)
- training and evaluation runs: ``train``, ``evaluate``, ``plan``, ``Recipe``
- exceptions: ``InputError``, ``FailedError``, ``TryAgainError``, ``InternalError``, all subclasses of ``AdvxlError``

torch and numpy are optional and only imported if the caller uses them.
"""

from __future__ import annotations

from ._advxl import AdvxlError, FailedError, InputError, InternalError, TryAgainError, __version__
from ._adapters import Defense, Functions
from ._model import Model, load
from ._program import Recipe, evaluate, plan, train
from ._result import Result
from .attacks import apgd, fab, pgd, square
from .autoattack import AutoAttack
from .robustbench import benchmark

__all__ = [
    "AdvxlError",
    "AutoAttack",
    "Defense",
    "FailedError",
    "Functions",
    "InputError",
    "InternalError",
    "Model",
    "Recipe",
    "Result",
    "TryAgainError",
    "__version__",
    "apgd",
    "benchmark",
    "evaluate",
    "fab",
    "load",
    "pgd",
    "plan",
    "square",
    "train",
]
