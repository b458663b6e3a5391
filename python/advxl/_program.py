"""The ``advxl`` command, and Python functions that run it in a child process.

Training and evaluation on data sets run in a child process, so that several ranks or GPUs, a crash, or Ctrl-C do not
affect the interpreter.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from typing import Any, Mapping

from . import _advxl
from ._adapters import InputError, error_of, input_error
from ._result import Result


def main() -> None:
    """Run the ``advxl`` command."""
    # The program handles Ctrl-C itself.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    command = [sys.executable, "-m", "advxl"]
    sys.exit(_advxl.main(["advxl", *sys.argv[1:]], command, _advxl.__file__))


def run(*arguments: Any) -> dict[str, Any]:
    """Run ``advxl ARGUMENTS --json`` and return its result. Progress goes to ``sys.stderr``.

    Errors of the command are raised as ``InputError``, ``FailedError`` or ``TryAgainError``. On Ctrl-C the command
    saves its state and stops.
    """
    command = [sys.executable, "-m", "advxl", *(str(argument) for argument in arguments), "--json"]
    # On a terminal the program draws its own progress; elsewhere (notebooks) its lines are relayed.
    inherits = _is_terminal(sys.stderr)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=None if inherits else subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=environment,
    )
    output: list[str] = []
    last: list[str] = []
    readers = [threading.Thread(target=output.extend, args=(child.stdout,), daemon=True)]
    if child.stderr is not None:
        readers.append(threading.Thread(target=_relay, args=(child.stderr, last), daemon=True))
    for reader in readers:
        reader.start()
    interrupted = _ended(child)
    for reader in readers:
        reader.join()
    for stream in (child.stdout, child.stderr):
        if stream is not None:
            stream.close()
    if interrupted:
        raise KeyboardInterrupt
    result = _last_object(output)
    if child.returncode != 0 or not isinstance(result, dict):
        raise _error(result, child.returncode, "".join(last))
    return result


def _is_terminal(stream: Any) -> bool:
    try:
        return os.isatty(stream.fileno())
    except (AttributeError, OSError, ValueError):
        return False


def _relay(source: Any, last: list[str]) -> None:
    is_error = False
    for line in source:
        last.append(line)
        del last[:-20]
        # The error that ends the program is raised as an exception instead.
        is_error |= line.startswith("error: ")
        if not is_error:
            sys.stderr.write(line)
            sys.stderr.flush()


def _ended(child: "subprocess.Popen[str]") -> bool:
    """Wait for the child and return whether Ctrl-C ended it."""
    interrupted = False
    while True:
        try:
            child.wait()
            return interrupted
        except KeyboardInterrupt:
            # On a terminal the child receives the signal too, and a second one would prevent it from saving.
            if not interrupted and not _is_terminal(sys.stderr):
                child.send_signal(signal.SIGINT)
            elif interrupted:
                child.kill()
            interrupted = True


def _last_object(lines: list[str]) -> Any:
    for line in reversed(lines):
        try:
            return json.loads(line)
        except ValueError:
            continue
    return None


def _error(result: Any, code: int, text: str) -> Exception:
    classes: dict[int, type[_advxl.AdvxlError]] = {2: InputError, 75: _advxl.TryAgainError}
    error = result.get("error") if isinstance(result, dict) else None
    if not isinstance(error, dict):
        message = f"advxl exited with code {code}" if code > 0 else f"advxl was killed by signal {-code}"
        error = {"message": f"{message}\n{text}".strip(), "hint": None}
    return error_of(classes.get(code, _advxl.FailedError), error["message"], error["hint"])


def _value(value: Any) -> str:
    """Format a value as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_value(one) for one in value) + "]"
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_value(one)}" for key, one in value.items()) + " }"
    if isinstance(value, (int, float)):
        return repr(value)
    return json.dumps(os.fspath(value))


def _overrides(overrides: Mapping[str, Any]) -> list[str]:
    """Return ``--set`` flags. ``__`` in a keyword becomes a dot in the key: ``data__train`` is ``data.train``."""
    flags = []
    for key, value in overrides.items():
        flags += ["--set", f"{key.replace('__', '.')}={_value(value)}"]
    return flags


def _flags(options: Mapping[str, Any]) -> list[str]:
    """Return command-line flags: ``eps_curve=True`` is ``--eps-curve``, lists are comma-separated, None is omitted."""
    flags = []
    for name, value in options.items():
        flag = "--" + name.rstrip("_").replace("_", "-")
        if value is None or value is False:
            continue
        if value is True:
            flags.append(flag)
        elif isinstance(value, (list, tuple)):
            flags += [flag, ",".join(str(one) for one in value)]
        else:
            flags += [flag, str(value)]
    return flags


class Recipe:
    """A recipe, the TOML file of a complete training run, with overrides.

        recipe = advxl.Recipe("recipes/cifar10_micro.toml", data__train="cifar", stage__finetune__attack__steps=2)
        recipe.check(); recipe.plan(); recipe.train(out="runs/pgd2")

    In keyword names, ``__`` is a dot of the key.
    """

    def __init__(self, path: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None, **keywords: Any) -> None:
        self.path = os.fspath(path)
        self.overrides = {**(overrides or {}), **keywords}

    def check(self) -> dict[str, Any]:
        """Return a summary of the recipe. Raises ``InputError`` that lists all problems."""
        return run("recipe", "check", self.path, *_overrides(self.overrides))

    def plan(self, **options: Any) -> dict[str, Any]:
        """Return the estimated cost: operations, memory, hours, price. ``options`` are flags of ``advxl plan``."""
        return run("plan", self.path, *_overrides(self.overrides), *_flags(options))

    def train(self, out: str | os.PathLike[str] | None = None, **options: Any) -> dict[str, Any]:
        """Train, or resume training. ``options`` are flags of ``advxl train``, such as ``gpus=8``, ``device="cpu"`` or
        ``accept_changes=True``."""
        where = [] if out is None else ["--out", os.fspath(out)]
        return run("train", self.path, *where, *_overrides(self.overrides), *_flags(options))

    def __repr__(self) -> str:
        overrides = "".join(f", {key}={value!r}" for key, value in self.overrides.items())
        return f"Recipe({self.path!r}{overrides})"


def train(
    recipe: str | os.PathLike[str] | Recipe,
    *,
    out: str | os.PathLike[str] | None = None,
    device: str | None = None,
    processes: int | None = None,
    gpus: int | None = None,
    threads: int | None = None,
    accept_changes: bool = False,
    **overrides: Any,
) -> dict[str, Any]:
    """Train the model of a recipe. The same call resumes an interrupted run.

        advxl.train("recipes/cifar10_micro.toml", out="runs/pgd2", data__train="cifar", stage__finetune__attack__steps=2)

    ``overrides`` replace values of the recipe, with ``__`` for the dots of their keys. Returns the run folder, its
    model, the number of samples seen, and the robust accuracy of the final evaluations.
    """
    if not isinstance(recipe, Recipe):
        recipe = Recipe(recipe)
    recipe = Recipe(recipe.path, recipe.overrides, **overrides)
    options = {
        "device": device,
        "processes": processes,
        "gpus": gpus,
        "threads": threads,
        "accept_changes": accept_changes,
    }
    return recipe.train(out, **options)


def plan(recipe: str | os.PathLike[str] | Recipe, **options: Any) -> dict[str, Any]:
    """Return the estimated cost of a recipe: operations, memory, hours, price. ``options`` are flags of ``advxl plan``,
    such as ``devices=8``, ``device_tflops=400``, ``gpu="h100"``."""
    if not isinstance(recipe, Recipe):
        recipe = Recipe(recipe)
    return recipe.plan(**options)


def evaluate(model: Any, data: Any = None, labels: Any = None, **options: Any) -> Result:
    """Evaluate the robust accuracy of a model.

    A model on disk is evaluated on a data set in any supported format. ``options`` are flags of ``advxl eval``:

        advxl.evaluate("runs/demo/robust", "synthetic:200", attack="autoattack", eps="8/255")
        advxl.evaluate("vit.safetensors", "imagenet/val", arch="vit_base_patch16_224", n=1000, attack="apgd-ce,apgd-t",
                       eps="4/255")

    A callable is evaluated on tensors. ``options`` are those of ``AutoAttack``, ``bs`` and ``state_path``:

        advxl.evaluate(model, x, y, norm=["Linf", "L2"], eps=[8 / 255, 0.5])
    """
    if isinstance(model, (str, os.PathLike)):
        return _evaluate_path(model, data, labels, options)
    from .autoattack import AutoAttack

    of_run = {name: options.pop(name) for name in ("bs", "state_path") if name in options}
    adversary = AutoAttack(model, **options)
    adversary.run_standard_evaluation(data, labels, **of_run)
    return adversary.result


def _evaluate_path(model: Any, data: Any, labels: Any, options: dict[str, Any]) -> Result:
    if not isinstance(data, (str, os.PathLike)) or labels is not None:
        raise input_error(
            "a model on disk can only be evaluated on a data set given by name or path",
            "pass advxl.load(path) to evaluate it on tensors",
        )
    return Result(run("eval", os.fspath(model), "--data", os.fspath(data), *_flags(options)))
