"""Adapters through which Rust calls models: batches in, logits and input gradients out, for any framework.

An adapter has three methods, each called once per batch, never per image:

- ``logits(images)`` returns the logits, without gradients;
- ``trace(images)`` returns the logits and a tape for ``pull``;
- ``pull(tape, slopes)`` returns the gradient of ``(slopes * logits).sum()`` with respect to the images, or None if
  there is none.

Tensors are exchanged through DLPack as contiguous float32, in host memory or, for images and gradients of torch models
on an NVIDIA GPU, in GPU memory.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any, Callable

from . import _advxl

InputError = _advxl.InputError


def error_of(kind: type[_advxl.AdvxlError], message: str, hint: str | None) -> Exception:
    """Create an exception of the given class with message and hint."""
    error = kind(message if hint is None else f"{message}\n  hint: {hint}")
    error.message = message
    error.hint = hint
    return error


def input_error(message: str, hint: str | None = None) -> Exception:
    """Create an ``InputError`` with message and hint."""
    return error_of(InputError, message, hint)


def is_torch_tensor(value: Any) -> bool:
    """Return whether ``value`` is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def is_array(value: Any) -> bool:
    """Return whether ``value`` is a numpy array, without importing numpy."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


class Functions:
    """A model of any framework, built from two functions on numpy arrays.

    ``logits(x)`` maps images ``[batch, channels, height, width]`` in [0, 1] to logits ``[batch, classes]``.
    ``gradient(x, slopes)`` returns the gradient of ``(slopes * logits(x)).sum()`` with respect to ``x``, which JAX
    computes as ``jax.vjp(logits, x)[1](slopes)[0]``. Without ``gradient``, only the gradient-free ``square`` attack is
    available.

    An image's logits must depend on that image alone.
    """

    def __init__(
        self,
        logits: Callable[[Any], Any],
        gradient: Callable[[Any, Any], Any] | None = None,
    ) -> None:
        self._logits = logits
        self._gradient = gradient

    def __call__(self, x: Any) -> Any:
        return self._logits(x)

    def _adapter(self, x: Any, device: Any) -> "_ArrayAdapter":
        return _ArrayAdapter(self._logits, self._gradient)


class Defense:
    """A torch model with a preprocessing defense, which attacks differentiate through.

    ``preprocess`` runs before the model: JPEG compression, quantization, purification or noise.

    ``bpda`` replaces ``preprocess`` in the backward pass if it has no useful gradient (backward pass differentiable
    approximation, Athalye et al. 2018). It is a differentiable function such as ``lambda x: x``. The forward pass
    always uses ``preprocess``.

    For randomized defenses use ``AutoAttack(..., version="rand")``, or set ``apgd.eot_iter``.
    """

    def __init__(
        self,
        model: Callable[[Any], Any],
        preprocess: Callable[[Any], Any],
        bpda: Callable[[Any], Any] | None = None,
    ) -> None:
        self.model = model
        self.preprocess = preprocess
        self.bpda = bpda

    def __call__(self, x: Any) -> Any:
        return self.model(self._in_front(x))

    def _in_front(self, x: Any) -> Any:
        if self.bpda is None:
            return self.preprocess(x)
        import torch

        with torch.no_grad():
            shown = self.preprocess(x)
        if not torch.is_grad_enabled():
            return shown
        return _torch_functions().ForwardOf.apply(self.bpda(x), shown)


_cached: Any = None


def _torch_functions() -> Any:
    """Return our torch autograd functions, which are defined on first use so that torch stays optional."""
    global _cached
    if _cached is None:
        import torch

        class ForwardOf(torch.autograd.Function):
            """Returns the second argument; in the backward pass, the gradient goes to the first."""

            @staticmethod
            def forward(ctx: Any, differentiated: Any, shown: Any) -> Any:
                if differentiated.shape != shown.shape:
                    raise input_error(
                        f"`bpda` returned shape {list(differentiated.shape)}, "
                        f"but `preprocess` returned {list(shown.shape)}",
                        "both must return the shape that the model expects",
                    )
                return shown.to(differentiated.dtype).clone()

            @staticmethod
            def backward(ctx: Any, slopes: Any) -> Any:
                return slopes, None

        class Loaded(torch.autograd.Function):
            """A model loaded by advxl."""

            @staticmethod
            def forward(ctx: Any, x: Any, model: Any) -> Any:
                source = to_host(x)
                if ctx.needs_input_grad[0]:
                    logits, ctx.tape = model.trace(source)
                else:
                    logits, ctx.tape = model.logits(source), None
                ctx.model, ctx.like = model, (x.device, x.dtype)
                return from_host(logits).to(device=x.device, dtype=x.dtype)

            @staticmethod
            def backward(ctx: Any, slopes: Any) -> Any:
                gradient = from_host(ctx.model.pull(ctx.tape, to_host(slopes)))
                device, dtype = ctx.like
                return gradient.to(device=device, dtype=dtype), None

        _cached = SimpleNamespace(ForwardOf=ForwardOf, Loaded=Loaded)
    return _cached


def to_host(tensor: Any) -> Any:
    """Convert a torch tensor for exchange: contiguous float32 in host memory, detached."""
    import torch

    return tensor.detach().to(device="cpu", dtype=torch.float32).contiguous()


def from_host(tensor: Any) -> Any:
    """Convert an exchanged tensor to a torch tensor."""
    from torch.utils.dlpack import from_dlpack

    return from_dlpack(tensor)


def array_to_host(array: Any) -> Any:
    """Convert a numpy array for exchange: contiguous, writable float32, as DLPack requires."""
    import numpy

    return numpy.require(array, dtype=numpy.float32, requirements=["C", "A", "W"])


def array_from_host(tensor: Any) -> Any:
    """Convert an exchanged tensor to a writable numpy array."""
    import numpy

    return numpy.array(numpy.from_dlpack(tensor))


def crossing(value: Any) -> Any:
    """Convert a torch tensor or numpy array for exchange."""
    return to_host(value) if is_torch_tensor(value) else array_to_host(value)


class _ArrayAdapter:
    """Functions on numpy arrays."""

    def __init__(self, logits: Callable[[Any], Any], gradient: Callable[[Any, Any], Any] | None) -> None:
        self._logits = logits
        self._gradient = gradient

    def _checked(self, logits: Any, batch: int) -> Any:
        array = array_to_host(logits)
        check_logits_shape(list(array.shape), batch)
        return array

    def logits(self, images: Any) -> Any:
        x = array_from_host(images)
        return self._checked(self._logits(x), len(x))

    def trace(self, images: Any) -> tuple[Any, Any]:
        if self._gradient is None:
            raise input_error(
                "this attack needs gradients, but `Functions` has no `gradient`",
                "pass `gradient`, or run only square",
            )
        x = array_from_host(images)
        return self._checked(self._logits(x), len(x)), x

    def pull(self, tape: Any, slopes: Any) -> Any:
        assert self._gradient is not None
        return array_to_host(self._gradient(tape, array_from_host(slopes)))


def check_logits_shape(shape: list[int], batch: int) -> None:
    """Check that logits have shape ``[batch, classes]``."""
    if len(shape) != 2 or shape[0] != batch:
        raise input_error(
            f"the model returned shape {shape} for {batch} images",
            f"return logits of shape [{batch}, classes], one row per image",
        )


class _TorchAdapter:
    """A callable on torch tensors. Inputs are converted to the given device and dtype."""

    def __init__(self, model: Callable[[Any], Any], device: Any, dtype: Any) -> None:
        self.model = model
        self.device = device
        self.dtype = dtype
        # Index of the NVIDIA GPU that holds images and gradients, or None.
        self.gpu = _gpu_number(device)

    def without_gpu(self, reason: str) -> None:
        """Exchange images and gradients through host memory, because Rust cannot compute on that GPU."""
        import warnings

        self.gpu = None
        warnings.warn(f"attack steps run on the CPU, the model on {self.device}: {reason}", stacklevel=2)

    def _gradient(self, gradient: Any) -> Any:
        """Convert a gradient for exchange."""
        if self.gpu is None:
            return to_host(gradient)
        import torch

        gradient = gradient.detach().to(torch.float32).contiguous()
        # Rust's stream does not wait for torch's. After this wait, Rust may also overwrite the images.
        torch.cuda.current_stream(gradient.device).synchronize()
        return gradient

    def _images(self, images: Any) -> Any:
        import torch

        return from_host(images).to(device=self.device, dtype=self.dtype)

    def _call(self, x: Any) -> Any:
        """Return the model's logits, or raise an error that explains why they are invalid."""
        import torch

        try:
            logits = self.model(x)
        except RuntimeError as error:
            hint = self._mismatch(x)
            if hint is None:
                raise
            raise input_error(f"the model failed on {_described(x)}: {error}", hint) from error
        if not isinstance(logits, torch.Tensor):
            raise _not_logits(logits)
        check_logits_shape(list(logits.shape), len(x))
        if not logits.is_floating_point():
            raise input_error(
                f"the model returned {logits.dtype}",
                "return logits, not predictions: attacks need the model's confidence",
            )
        return logits

    def _mismatch(self, x: Any) -> str | None:
        """Return a hint if the parameters have a different dtype or device than the images."""
        parameters = getattr(self.model, "parameters", None)
        first = next(iter(parameters()), None) if callable(parameters) else None
        if first is None:
            return None
        if first.device != x.device:
            return (
                f"the parameters are on {first.device}, but the images on {x.device}: "
                f"pass device={str(first.device)!r}, or move the model"
            )
        if first.dtype != x.dtype and first.is_floating_point():
            name = str(first.dtype).removeprefix("torch.")
            images = str(x.dtype).removeprefix("torch.")
            return f"the parameters are {name}, but the images {images}: pass x.to(torch.{name})"
        return None

    def logits(self, images: Any) -> Any:
        import torch

        with torch.inference_mode(False), torch.no_grad():
            return to_host(self._call(self._images(images)))

    def trace(self, images: Any) -> tuple[Any, Any]:
        import torch

        # Callers may have disabled gradients around the evaluation, as AutoAttack's examples do.
        with torch.inference_mode(False), torch.enable_grad():
            x = self._images(images).requires_grad_()
            logits = self._call(x)
            return to_host(logits), (x, logits)

    def pull(self, tape: Any, slopes: Any) -> Any:
        import torch

        x, logits = tape
        if not logits.requires_grad:
            return None
        rows = from_host(slopes)
        scale = None
        if logits.dtype in (torch.float16, torch.bfloat16):
            # Slopes of confident predictions underflow in half precision: scale them to 1 for the backward pass.
            scale = rows.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
            rows = rows / scale
        with torch.inference_mode(False), torch.enable_grad():
            rows = rows.to(device=logits.device, dtype=logits.dtype)
            (gradient,) = torch.autograd.grad(logits, x, rows, allow_unused=True)
        if gradient is None:
            return None
        if scale is not None:
            gradient = gradient.to(torch.float32) * scale[:, :, None, None].to(gradient.device)
        return self._gradient(gradient)


def _gpu_number(device: Any) -> int | None:
    import torch

    device = torch.device(device)
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def _described(x: Any) -> str:
    return f"a batch of shape {list(x.shape)}, {str(x.dtype).removeprefix('torch.')}, on {x.device}"


def _not_logits(returned: Any) -> Exception:
    kind = type(returned).__name__
    if hasattr(returned, "logits"):
        hint = "wrap it: AutoAttack(lambda x: model(x).logits, ...)"
    elif isinstance(returned, (tuple, list)):
        kind = f"{kind} of {len(returned)}"
        hint = "wrap it: AutoAttack(lambda x: model(x)[0], ...)"
    else:
        hint = "return a torch tensor of logits, [batch, classes]"
    return input_error(f"the model returned a {kind}, expected a tensor of logits", hint)


def adapter_of(model: Any, x: Any, device: Any = None) -> Any:
    """Return the adapter for a model, given the user's images."""
    from ._model import Model

    if isinstance(model, Model):
        if model._loaded.outputs_embeddings:
            raise input_error(
                f"the {model.num_classes} outputs of `{model.path}` are an embedding, not logits of classes",
                "attack a classifier based on them: lambda x: classify(model(x))",
            )
        return model._loaded
    own = getattr(model, "_adapter", None)
    if own is not None:
        return own(x, device)
    if not callable(model):
        raise input_error(
            f"the model is a {type(model).__name__}, expected a callable from images to logits",
            "pass a torch module, a function on torch tensors, advxl.load(...) or advxl.Functions(...)",
        )
    if is_array(x) and not _is_module(model):
        raise input_error(
            "the images are a numpy array and the model is a plain callable: gradients cannot be computed",
            "pass torch tensors, or build the model from two functions with advxl.Functions(logits, gradient)",
        )
    return _TorchAdapter(model, _device_of(model, x, device), _dtype_of(x))


def _is_module(model: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(model, torch.nn.Module)


def _dtype_of(x: Any) -> Any:
    import torch

    return x.dtype if is_torch_tensor(x) else torch.float32


def _device_of(model: Any, x: Any, device: Any) -> Any:
    """Return the device for the images: the user's choice, else that of the parameters, else that of the images."""
    import torch

    if device is not None:
        requested = torch.device(device)
        if requested.type == "cuda" and not torch.cuda.is_available():
            raise input_error(
                f"device={str(device)!r}: torch finds no CUDA GPU",
                "omit `device` to use the device of the model",
            )
        return requested
    if _is_module(model):
        first = next(iter(model.parameters()), None)
        if first is not None:
            if first.device.type == "meta":
                raise input_error("the model is on torch's meta device, without weights", "load its weights first")
            return first.device
    return x.device if is_torch_tensor(x) else torch.device("cpu")
