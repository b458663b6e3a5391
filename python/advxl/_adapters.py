"""Models as Rust calls them: batches in, logits and input gradients out, whatever framework computes them.

An adapter has three methods, each called once for a batch and never for an image:

- ``logits(images)``: logits, without gradients;
- ``trace(images)``: logits, and a tape for ``pull``;
- ``pull(tape, slopes)``: the gradient of ``(slopes * logits).sum()`` with respect to the images, or None if there is none.

Tensors cross by DLPack as contiguous float32 in the host's memory.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any, Callable

from . import _advxl

InputError = _advxl.InputError


def error_of(kind: type[_advxl.AdvxlError], message: str, hint: str | None) -> Exception:
    """An exception of a kind, with its message and hint."""
    error = kind(message if hint is None else f"{message}\n  hint: {hint}")
    error.message = message
    error.hint = hint
    return error


def input_error(message: str, hint: str | None = None) -> Exception:
    """An ``InputError`` with its hint."""
    return error_of(InputError, message, hint)


def is_torch_tensor(value: Any) -> bool:
    """Whether this is a torch tensor, without importing torch where nobody has."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def is_array(value: Any) -> bool:
    """Whether this is a numpy array, without importing numpy where nobody has."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


class Functions:
    """A model of any framework, from two functions on numpy arrays.

    ``logits(x)`` takes images ``[batch, channels, height, width]`` in [0, 1] to logits ``[batch, classes]``.
    ``gradient(x, slopes)`` gives the gradient of ``(slopes * logits(x)).sum()`` with respect to ``x``; JAX, for example,
    computes it with ``jax.vjp(logits, x)[1](slopes)[0]``. Without it only ``square``, which needs no gradients, can attack.

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
    """A torch model behind a preprocessing step that attacks must go through.

    ``preprocess`` runs in front of the model, as a defense does: JPEG compression, quantization, purification, noise.

    ``bpda`` is what stands in for ``preprocess`` in backward passes where that has no useful gradient (backward pass
    differentiable approximation, Athalye et al. 2018): a differentiable function such as ``lambda x: x``. The forward pass
    always uses ``preprocess``.

    Random defenses: use ``AutoAttack(..., version="rand")``, or set ``apgd.eot_iter``.
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
    """torch's function classes, made once torch is there."""
    global _cached
    if _cached is None:
        import torch

        class ForwardOf(torch.autograd.Function):
            """The second argument forward, the gradient of the first backward."""

            @staticmethod
            def forward(ctx: Any, differentiated: Any, shown: Any) -> Any:
                if differentiated.shape != shown.shape:
                    raise input_error(
                        f"`bpda` gave shape {list(differentiated.shape)} and `preprocess` {list(shown.shape)}",
                        "both must give what the model takes",
                    )
                return shown.to(differentiated.dtype).clone()

            @staticmethod
            def backward(ctx: Any, slopes: Any) -> Any:
                return slopes, None

        class Loaded(torch.autograd.Function):
            """A model that the program loaded."""

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
    """A torch tensor as it crosses: contiguous float32 in the host's memory, outside autograd."""
    import torch

    return tensor.detach().to(device="cpu", dtype=torch.float32).contiguous()


def from_host(tensor: Any) -> Any:
    """The torch tensor of one that crosses."""
    from torch.utils.dlpack import from_dlpack

    return from_dlpack(tensor)


def array_to_host(array: Any) -> Any:
    """A numpy array as it crosses: contiguous float32 that may be written to, as DLPack wants."""
    import numpy

    return numpy.require(array, dtype=numpy.float32, requirements=["C", "A", "W"])


def array_from_host(tensor: Any) -> Any:
    """The numpy array of one that crosses, which may be written to."""
    import numpy

    return numpy.array(numpy.from_dlpack(tensor))


def crossing(value: Any) -> Any:
    """A torch tensor or numpy array as it crosses."""
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
                "this attack needs gradients, and `Functions` was made without `gradient`",
                "pass `gradient`, or run square alone",
            )
        x = array_from_host(images)
        return self._checked(self._logits(x), len(x)), x

    def pull(self, tape: Any, slopes: Any) -> Any:
        assert self._gradient is not None
        return array_to_host(self._gradient(tape, array_from_host(slopes)))


def check_logits_shape(shape: list[int], batch: int) -> None:
    """Logits are `[batch, classes]`."""
    if len(shape) != 2 or shape[0] != batch:
        raise input_error(
            f"the model returned shape {shape} for {batch} images",
            f"return logits of shape [{batch}, classes], one row an image",
        )


class _TorchAdapter:
    """A callable on torch tensors. Inputs get the device and the dtype of the images that the user passed."""

    def __init__(self, model: Callable[[Any], Any], device: Any, dtype: Any) -> None:
        self.model = model
        self.device = device
        self.dtype = dtype
        # The number of the GPU that images and gradients stay on, if it is one of NVIDIA's.
        self.gpu = _gpu_number(device)

    def without_gpu(self, reason: str) -> None:
        """Images and gradients cross in the host's memory: Rust cannot compute on that GPU."""
        import warnings

        self.gpu = None
        warnings.warn(f"attack steps are computed on the CPU, the model on {self.device}: {reason}", stacklevel=2)

    def _gradient(self, gradient: Any) -> Any:
        """A gradient as it crosses."""
        if self.gpu is None:
            return to_host(gradient)
        import torch

        gradient = gradient.detach().to(torch.float32).contiguous()
        # Rust's stream does not wait for torch's. This also ends the use of the images, which Rust may then overwrite.
        torch.cuda.current_stream(gradient.device).synchronize()
        return gradient

    def _images(self, images: Any) -> Any:
        import torch

        return from_host(images).to(device=self.device, dtype=self.dtype)

    def _call(self, x: Any) -> Any:
        """The model's logits, or an error that says what is wrong with them."""
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
                "return logits, not predictions: attacks need to know how sure the model is",
            )
        return logits

    def _mismatch(self, x: Any) -> str | None:
        """What to do about parameters of another dtype or on another device than the images."""
        parameters = getattr(self.model, "parameters", None)
        first = next(iter(parameters()), None) if callable(parameters) else None
        if first is None:
            return None
        if first.device != x.device:
            return (
                f"its parameters are on {first.device} and the images on {x.device}: "
                f"pass device={str(first.device)!r}, or move the model"
            )
        if first.dtype != x.dtype and first.is_floating_point():
            name = str(first.dtype).removeprefix("torch.")
            return f"its parameters are {name} and the images {str(x.dtype).removeprefix('torch.')}: pass x.to(torch.{name})"
        return None

    def logits(self, images: Any) -> Any:
        import torch

        with torch.inference_mode(False), torch.no_grad():
            return to_host(self._call(self._images(images)))

    def trace(self, images: Any) -> tuple[Any, Any]:
        import torch

        # Callers may have switched gradients off around the evaluation, as examples of AutoAttack do.
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
            # Slopes of sure answers are below what half precision holds: scaled to 1 for the way back.
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
    """What Rust calls for a model, given images as the user has them."""
    from ._model import Model

    if isinstance(model, Model):
        if model._loaded.outputs_embeddings:
            raise input_error(
                f"the {model.num_classes} outputs of `{model.path}` are an embedding, not logits of classes",
                "attack a function that classifies by them: lambda x: classify(model(x))",
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
            "the images are a numpy array and the model a plain callable: gradients cannot be followed",
            "pass torch tensors, or make the model from two functions with advxl.Functions(logits, gradient)",
        )
    return _TorchAdapter(model, _device_of(model, x, device), _dtype_of(x))


def _is_module(model: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(model, torch.nn.Module)


def _dtype_of(x: Any) -> Any:
    import torch

    return x.dtype if is_torch_tensor(x) else torch.float32


def _device_of(model: Any, x: Any, device: Any) -> Any:
    """Where the model gets its images: as the user says, else where its parameters are, else where the images are."""
    import torch

    if device is not None:
        wanted = torch.device(device)
        if wanted.type == "cuda" and not torch.cuda.is_available():
            raise input_error(
                f"device={str(device)!r}: this torch finds no CUDA GPU",
                "leave `device` out to use the device of the model",
            )
        return wanted
    if _is_module(model):
        first = next(iter(model.parameters()), None)
        if first is not None:
            if first.device.type == "meta":
                raise input_error("the model is on torch's meta device, without weights", "load its weights first")
            return first.device
    return x.device if is_torch_tensor(x) else torch.device("cpu")
