"""AutoAttack with the interface of the ``autoattack`` package (Croce and Hein 2020).

    from advxl import AutoAttack    # was: from autoattack import AutoAttack

    adversary = AutoAttack(model, norm="Linf", eps=8 / 255, version="standard")
    x_adv = adversary.run_standard_evaluation(x_test, y_test, bs=100, state_path="evaluation.state")
    print(adversary.result)
"""

from __future__ import annotations

import os
import time
from typing import Any, Callable, Sequence

from . import _advxl
from ._adapters import adapter_of, array_from_host, from_host, input_error, is_torch_tensor
from ._inputs import images_and_labels
from ._result import Result
from ._screen import Screen, stoppable

NORMS = {"Linf": "linf", "L2": "l2", "L1": "l1"}
VERSIONS = {
    "standard": ["apgd-ce", "apgd-t", "fab-t", "square"],
    "plus": ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"],
    "rand": ["apgd-ce", "apgd-dlr"],
    "fast": ["apgd-ce", "apgd-t", "fab-t", "square"],
}
# Versions whose attacks have AutoAttack's own settings for L1.
STANDARD = ("standard", "fast")
KNOWN = ["pgd", "apgd-ce", "apgd-dlr", "apgd-t", "malt", "pma", "fab", "fab-t", "square"]


class _Settings:
    """Settings of an attack. Settings of the ``autoattack`` package that are fixed here accept no other value."""

    _name = ""
    _settable: dict[str, Any] = {}
    _fixed: dict[str, Any] = {}
    # Accepted but not used: internals of the `autoattack` package, or set by AutoAttack itself.
    _ignored = ("verbose", "seed", "loss", "device", "norm", "targeted", "model")

    def __init__(self, **values: Any) -> None:
        for name, value in {**self._settable, **self._fixed, **values}.items():
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._settable:
            kind = type(self._settable[name])
            is_bool = isinstance(value, bool)
            if is_bool != (kind is bool) or not isinstance(value, kind) or (not is_bool and value < 1):
                expected = "True or False" if kind is bool else "a whole number of at least 1"
                raise input_error(f"{self._name}.{name} = {value!r}: expected {expected}")
        elif name in self._fixed:
            if value != self._fixed[name]:
                raise input_error(f"{self._name}.{name} is fixed at {self._fixed[name]!r}, got {value!r}")
        elif name not in self._ignored:
            settable = ", ".join(self._settable)
            raise input_error(f"{self._name} has no setting `{name}`", f"use any of {settable}")
        object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={getattr(self, name)!r}" for name in self._settable)
        return f"{self._name}({values})"


class _Apgd(_Settings):
    """APGD on cross entropy, on the DLR loss and on the margin of probabilities (pma)."""

    n_iter: int
    """Steps per run."""
    n_restarts: int
    """Number of random starts."""
    eot_iter: int
    """Number of gradients to average, for randomized defenses."""
    use_largereps: bool
    """Whether to start with three times epsilon, then twice, as AutoAttack does in L1."""

    _name = "apgd"
    _settable = {"n_iter": 100, "n_restarts": 5, "eot_iter": 1, "use_largereps": False}
    _fixed = {"rho": 0.75, "use_rs": True}


class _ApgdTargeted(_Settings):
    """APGD on the targeted DLR loss (apgd-t, malt)."""

    n_iter: int
    """Steps per run."""
    n_restarts: int
    """Number of random starts per target."""
    n_target_classes: int
    """Number of target classes, tried in turn."""
    eot_iter: int
    """Number of gradients to average, for randomized defenses."""
    use_largereps: bool
    """Whether to start with three times epsilon, then twice, as AutoAttack does in L1."""

    _name = "apgd_targeted"
    _settable = {"n_iter": 100, "n_restarts": 1, "n_target_classes": 9, "eot_iter": 1, "use_largereps": False}
    _fixed = {"rho": 0.75, "use_rs": True}


class _Fab(_Settings):
    """FAB, untargeted (fab) and targeted (fab-t, one start per target)."""

    n_iter: int
    """Steps per run."""
    n_restarts: int
    """Number of starts of fab."""
    n_target_classes: int
    """Number of target classes of fab-t, tried in turn."""

    _name = "fab"
    _settable = {"n_iter": 100, "n_restarts": 5, "n_target_classes": 9}
    _fixed = {"alpha_max": 0.1, "eta": 1.05, "beta": 0.9}


class _Square(_Settings):
    """Square attack."""

    n_queries: int
    """Number of queries after the first one."""

    _name = "square"
    _settable = {"n_queries": 5000}
    _fixed = {"p_init": 0.8, "n_restarts": 1, "resc_schedule": False}


class AutoAttack:
    """AutoAttack: robust accuracy under an ensemble of attacks.

    Each attack runs on the images that survived the previous ones. Rust controls steps, restarts, targets and random
    numbers; the model and its gradients stay in its framework.

    Parameters:

    - ``model``: any callable from images ``[n, channels, height, width]`` in [0, 1] to logits ``[n, classes]``: a torch
      module in evaluation mode, a function on torch tensors, ``advxl.load(...)``, ``advxl.Functions(...)`` or
      ``advxl.Defense(...)``. Normalize inside the model. An image's logits must depend on that image alone.
    - ``norm``: ``"Linf"``, ``"L2"`` or ``"L1"``, or a list of them, evaluated in turn and combined in their union.
    - ``eps``: largest perturbation in the norm, for pixels in [0, 1]: a number or a string such as ``"8/255"``. With
      several norms, one for each.
    - ``seed``: random seed. Random numbers are keyed by image, independent of the batch. None means 0, so that results
      are reproducible.
    - ``verbose``: print log lines to standard output, in the format of the ``autoattack`` package.
    - ``attacks_to_run``: with ``version="custom"``, any of apgd-ce, apgd-dlr, apgd-t, malt, pma, fab, fab-t, square, pgd.
    - ``version``: ``"standard"``, ``"plus"``, ``"rand"`` (randomized defenses), ``"custom"`` or ``"fast"``, which runs fab-t
      and square on a random sample of the images that survive apgd-t. ``result["bound"]`` then states how much lower the
      standard version would be at most.
    - ``device``: device of the images passed to the model. None means the device of its parameters, else of the images.
    - ``log_path``: file to which log lines are appended.
    - ``attacks``: alias of ``attacks_to_run``, as in ``pyautoattack``.
    - ``bound``: with ``version="fast"``, the bound to reach if no sampled image is fooled, in percentage points (0.4).

    Attributes that can be set before a run: ``attacks_to_run``; ``apgd`` (``n_iter``, ``n_restarts``, ``eot_iter``,
    ``use_largereps``), ``apgd_targeted`` (these and ``n_target_classes``), ``fab`` (``n_iter``, ``n_restarts``,
    ``n_target_classes``), ``square`` (``n_queries``). After a run, ``result`` holds the results.
    """

    def __init__(
        self,
        model: Callable[[Any], Any],
        norm: str | Sequence[str] = "Linf",
        eps: float | str | Sequence[float | str] = 0.3,
        seed: int | None = None,
        verbose: bool = True,
        attacks_to_run: Sequence[str] = (),
        version: str = "standard",
        is_tf_model: bool = False,
        device: Any = None,
        log_path: str | os.PathLike[str] | None = None,
        *,
        attacks: Sequence[str] | None = None,
        bound: float | None = None,
    ) -> None:
        attacks_to_run = attacks_to_run if attacks is None else attacks
        if is_tf_model:
            raise input_error(
                "is_tf_model=True: TensorFlow models are not supported directly",
                "build the model from two functions on numpy arrays with advxl.Functions(logits, gradient)",
            )
        self.norms = [norm] if isinstance(norm, str) else list(norm)
        self.epsilons: list[float | str] = [eps] if isinstance(eps, (str, float, int)) else list(eps)
        for name in self.norms:
            if name not in NORMS:
                raise input_error(f"unknown norm {name!r}", f"use any of {', '.join(NORMS)}")
        if len(self.norms) != len(self.epsilons) or not self.norms:
            raise input_error(f"got {len(self.norms)} norms and {len(self.epsilons)} epsilons", "pass one epsilon per norm")
        for name, size in zip(self.norms, self.epsilons):
            _check_epsilon(name, size)
        if len(set(self.norms)) < len(self.norms):
            raise input_error(f"duplicate norm in {', '.join(self.norms)}")
        if version in VERSIONS and len(attacks_to_run):
            raise input_error(
                f"attacks_to_run has no effect with version={version!r}", "use version='custom'"
            )
        if bound is not None and version != "fast":
            raise input_error(f"bound has no effect with version={version!r}", "use version='fast'")
        if bound is not None and not 0 < bound <= 100:
            raise input_error(f"bound={bound!r}: expected percentage points above 0 and at most 100")
        self.model = model
        self.bound = 0.4 if bound is None else float(bound)
        self.seed = seed
        self.verbose = verbose
        self.device = device
        self.log_path = log_path
        self.attacks_to_run = list(attacks_to_run)
        self.apgd = _Apgd()
        self.apgd_targeted = _ApgdTargeted()
        self.fab = _Fab()
        self.square = _Square()
        self._result: Result | None = None
        self.version = version
        if version != "custom":
            self.set_version(version)

    @property
    def norm(self) -> Any:
        """The norm, or the list of norms."""
        return self.norms[0] if len(self.norms) == 1 else self.norms

    @property
    def epsilon(self) -> Any:
        """Epsilon, or the list of epsilons."""
        return self.epsilons[0] if len(self.epsilons) == 1 else self.epsilons

    @property
    def result(self) -> Result:
        """Results of the last run: accuracies with intervals, flags, and verdict, distance and margin of each image."""
        if self._result is None:
            raise input_error("no result yet", "call run_standard_evaluation first")
        return self._result

    def set_version(self, version: str = "standard") -> None:
        """Set the attacks and their settings to those of a version."""
        if version not in VERSIONS:
            raise input_error(f"unknown version {version!r}", "use standard, plus, rand, fast or custom")
        self.version = version
        self.attacks_to_run = list(VERSIONS[version])
        self.apgd = _Apgd(n_restarts=5 if version == "plus" else 1, eot_iter=20 if version == "rand" else 1)
        self.apgd_targeted = _ApgdTargeted()
        self.fab = _Fab(n_restarts=5 if version == "plus" else 1)
        self.square = _Square()
        if version in STANDARD and self.norms == ["L1"]:
            self.apgd = _Apgd(n_restarts=5, use_largereps=True)
            self.apgd_targeted = _ApgdTargeted(n_target_classes=5, use_largereps=True)

    def get_seed(self) -> int:
        """Return the random seed."""
        return 0 if self.seed is None else int(self.seed)

    def _specs(self, norm: str, eps: float | str, attacks: Sequence[str]) -> list[dict[str, Any]]:
        """Return the settings of the attacks in a norm, in the format of the Rust module."""
        apgd, targeted, fab = self.apgd, self.apgd_targeted, self.fab
        if self.version in STANDARD and norm == "L1" and len(self.norms) > 1:
            # Use AutoAttack's settings for L1 unless the user changed them.
            apgd = _Apgd(**{**_values(apgd), "n_restarts": 5, "use_largereps": True}) if _is_standard(apgd) else apgd
            if _is_standard(targeted):
                targeted = _ApgdTargeted(n_target_classes=5, use_largereps=True)
        specs = []
        for name in attacks:
            spec: dict[str, Any] = {"name": name, "norm": NORMS[norm], "eps": str(eps)}
            if name in ("apgd-ce", "apgd-dlr", "pma"):
                spec.update(steps=apgd.n_iter, restarts=apgd.n_restarts, averages=apgd.eot_iter, enlarged=apgd.use_largereps)
            elif name in ("apgd-t", "malt"):
                spec.update(
                    steps=targeted.n_iter,
                    restarts=targeted.n_restarts,
                    targets=targeted.n_target_classes,
                    averages=targeted.eot_iter,
                    enlarged=targeted.use_largereps,
                )
            elif name == "fab":
                spec.update(steps=fab.n_iter, restarts=fab.n_restarts)
            elif name == "fab-t":
                spec.update(steps=fab.n_iter, restarts=1, targets=fab.n_target_classes)
            elif name == "square":
                spec.update(queries=self.square.n_queries)
            elif name not in KNOWN:
                raise input_error(f"attacks_to_run: unknown attack {name!r}", f"use any of {', '.join(KNOWN)}")
            specs.append(spec)
        return specs

    def run_standard_evaluation(
        self,
        x_orig: Any,
        y_orig: Any = None,
        bs: int = 250,
        return_labels: bool = False,
        state_path: str | os.PathLike[str] | None = None,
        *,
        batch_size: int | None = None,
    ) -> Any:
        """Run the attacks in order, each on the images that survived the previous ones.

        ``x_orig`` ``[n, channels, height, width]`` in [0, 1] and ``y_orig`` ``[n]`` are torch tensors or numpy arrays.
        Alternatively, ``x_orig`` alone is a DataLoader or another iterator of ``(images, labels)``, which is stored in
        a temporary file. ``bs`` (``batch_size`` in ``pyautoattack``) is the batch size, which does not affect verdicts.

        Returns the final images: adversarial where the model was fooled, else clean. With ``return_labels``, also
        returns their predicted classes (-1 where a logit is not finite). With several norms, returns a dictionary by
        norm. ``result`` has everything else.

        With ``state_path``, progress is saved there (and in ``state_path.images``) after every batch. The same call
        resumes after Ctrl-C or a kill, with the same result; a finished evaluation returns immediately.
        """
        bs = bs if batch_size is None else batch_size
        return self._run(x_orig, y_orig, self.attacks_to_run, bs, return_labels, state_path, self.verbose)

    def _run(
        self,
        x_orig: Any,
        y_orig: Any,
        attacks: Sequence[str],
        bs: int,
        return_labels: bool,
        state_path: Any,
        verbose: bool,
    ) -> Any:
        if not attacks:
            raise input_error("attacks_to_run is empty", f"use any of {', '.join(KNOWN)}")
        is_fast = self.version == "fast"
        if is_fast and list(attacks) != VERSIONS["fast"]:
            raise input_error(
                f"version='fast' runs {', '.join(VERSIONS['fast'])}, got {', '.join(attacks)}", "use version='custom'"
            )
        if int(bs) < 1:
            raise input_error(f"bs={bs}: must be at least 1")
        images, labels, sample = images_and_labels(x_orig, y_orig)
        adapter = adapter_of(self.model, sample, self.device)
        groups = [self._specs(norm, eps, attacks) for norm, eps in zip(self.norms, self.epsilons)]
        adversarial = [images.adversarial() for _ in groups]

        def sink(group: int, indices: list[int], found: Any) -> None:
            _put(adversarial[group], indices, found)

        screen = Screen(verbose, self.log_path)
        screen.line(f"using {self.version} version including {', '.join(attacks)}.")
        if getattr(self.model, "training", False):
            screen.line(
                "warning: the model is in training mode: dropout and batch statistics make verdicts random; "
                "call model.eval()"
            )
        _use_threads()
        try:
            with stoppable() as stop:
                found = _advxl.evaluate(
                    adapter,
                    images,
                    labels,
                    groups,
                    batch=int(bs),
                    seed=self.get_seed(),
                    stop=stop,
                    state=None if state_path is None else os.fspath(state_path),
                    screen=screen,
                    sink=sink,
                    bound=self.bound if is_fast else None,
                )
        except KeyboardInterrupt:
            if state_path is not None:
                screen.line(f"stopped: the same call resumes from `{os.fspath(state_path)}`")
            raise
        finally:
            screen.close()
        self._result = _parsed(found)
        returned = []
        for x_adv, one in zip(adversarial, self._result.evaluations):
            if return_labels:
                returned.append((x_adv, _classes(one["predicted"], y_orig)))
            else:
                returned.append(x_adv)
        return returned[0] if len(returned) == 1 else dict(zip(self.norms, returned))

    def run_standard_evaluation_individual(
        self,
        x_orig: Any,
        y_orig: Any = None,
        bs: int = 250,
        return_labels: bool = False,
        *,
        batch_size: int | None = None,
    ) -> dict[str, Any]:
        """Run each attack separately on all correctly classified images. Returns a dictionary from attack name to the
        return value of ``run_standard_evaluation``. ``results`` has the result of each attack."""
        bs = bs if batch_size is None else batch_size
        if self.version == "fast":
            raise input_error(
                "version='fast' runs fab-t and square on what the other attacks leave", "use version='standard'"
            )
        screen = Screen(self.verbose, self.log_path)
        screen.line(f"using {self.version} version including {', '.join(self.attacks_to_run)}.")
        found, self.results = {}, {}
        if y_orig is None and not hasattr(x_orig, "shape"):
            # Iterate once instead of once per attack.
            images, y_orig, _ = images_and_labels(x_orig, None)
            x_orig = images.images
        for name in self.attacks_to_run:
            begun = time.time()
            found[name] = self._run(x_orig, y_orig, [name], bs, return_labels, None, False)
            self.results[name] = self.result
            space = "\t \t" if name == "fab" else "\t"
            screen.line(
                f"robust accuracy by {name.upper()} {space} {self.result.robust_accuracy:.2%} "
                f"\t (time attack: {time.time() - begun:.1f} s)"
            )
        return found

    def clean_accuracy(self, x_orig: Any, y_orig: Any = None, bs: int = 250) -> float:
        """Return the share of clean images that are classified correctly."""
        images, labels, sample = images_and_labels(x_orig, y_orig)
        _use_threads()
        with stoppable() as stop:
            found = _advxl.evaluate(
                adapter_of(self.model, sample, self.device),
                images,
                labels,
                [[]],
                batch=int(bs),
                seed=self.get_seed(),
                stop=stop,
                checks=False,
            )
        accuracy = _parsed(found).clean_accuracy
        if self.verbose:
            print(f"clean accuracy: {accuracy:.2%}")
        return accuracy

    def cheap(self) -> None:
        """Use the cheaper settings of the ``autoattack`` package: fewer steps, targets and queries."""
        self.apgd = _Apgd(**{**_values(self.apgd), "n_iter": 50, "n_restarts": 1})
        self.fab = _Fab(**{**_values(self.fab), "n_restarts": 1, "n_iter": 50})
        self.square = _Square(n_queries=1000)
        self.apgd_targeted = _ApgdTargeted(**{**_values(self.apgd_targeted), "n_restarts": 1, "n_target_classes": 3})


def _check_epsilon(norm: str, eps: float | str) -> None:
    """Check a numeric epsilon. Strings are checked when they are parsed."""
    if not isinstance(eps, str) and not 0 <= eps < float("inf"):
        raise input_error(f"eps={eps!r}: expected a finite number of at least 0")
    if norm == "Linf" and not isinstance(eps, str) and eps > 1:
        raise input_error(f"eps={eps!r} is larger than the range of a pixel", "pixels are in [0, 1]: use 8 / 255, not 8")


def _values(settings: _Settings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in settings._settable}


def _is_standard(settings: _Settings) -> bool:
    """Return whether the settings are those of ``set_version("standard")``."""
    standard = {**settings._settable, **({"n_restarts": 1} if isinstance(settings, _Apgd) else {})}
    return _values(settings) == standard


def _parsed(found: str) -> Result:
    import json

    return Result(json.loads(found))


def _put(images: Any, indices: list[int], found: Any) -> None:
    """Write adversarial images at their indices."""
    if is_torch_tensor(images):
        import torch

        images[torch.as_tensor(indices, device=images.device)] = from_host(found).to(images)
        return
    images[indices] = array_from_host(found).astype(images.dtype)


def _classes(predicted: list[int | None], like: Any) -> Any:
    """Return predictions in the same type as the labels."""
    classes = [-1 if one is None else one for one in predicted]
    if like is None or is_torch_tensor(like):
        import torch

        if like is None:
            return torch.tensor(classes)
        return torch.tensor(classes, device=like.device, dtype=like.dtype)
    import numpy

    return numpy.asarray(classes, dtype=getattr(like, "dtype", None))


_threads_started = False


def _use_threads() -> None:
    """Start Rust's thread pool, once."""
    global _threads_started
    if not _threads_started:
        _advxl.set_threads(None)
        _threads_started = True
