"""Images that stay on a GPU, on the GPU in software: its memory is the host's, which a stand-in for torch reads.

Needs numpy and a C++ compiler, which the software GPU builds its kernels with.
"""

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import unittest

from support import linear_functions, linear_images, needs_numpy, numpy


class Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("dimensions", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    ]


NAME = b"dltensor"
api = ctypes.pythonapi
api.PyCapsule_GetPointer.restype = ctypes.c_void_p
api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
api.PyCapsule_New.restype = ctypes.py_object
api.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


def array_of(crossing):
    """A copy of what lies in the memory of the software GPU."""
    assert crossing.__dlpack_device__() == (2, 0), crossing.__dlpack_device__()
    capsule = crossing.__dlpack__()
    tensor = Tensor.from_address(api.PyCapsule_GetPointer(capsule, NAME))
    shape = [tensor.shape[i] for i in range(tensor.dimensions)]
    count = int(numpy.prod(shape))
    values = (ctypes.c_float * count).from_address(tensor.data + tensor.byte_offset)
    return numpy.ctypeslib.as_array(values).reshape(shape).copy()


class OnGpu:
    """An array that says it lies on the GPU."""

    def __init__(self, array):
        self.array = numpy.ascontiguousarray(array, dtype="float32")
        self.shape = (ctypes.c_int64 * array.ndim)(*array.shape)
        self.tensor = Tensor(
            data=self.array.ctypes.data,
            device=(ctypes.c_int32 * 2)(2, 0),
            dimensions=array.ndim,
            code=2,
            bits=32,
            lanes=1,
            shape=self.shape,
        )

    def __dlpack__(self):
        return api.PyCapsule_New(ctypes.addressof(self.tensor), NAME, None)


class Adapter:
    """The linear model, as the adapter of a torch model on a GPU would be."""

    def __init__(self, gpu):
        self.gpu = gpu
        self.reason = None
        self.calls = 0
        self._logits, self._gradient, _ = linear_functions()

    def without_gpu(self, reason):
        self.gpu, self.reason = None, reason

    def _images(self, images):
        self.calls += 1
        return array_of(images) if self.gpu is not None else numpy.array(numpy.from_dlpack(images))

    def logits(self, images):
        return self._logits(self._images(images))

    def trace(self, images):
        x = self._images(images)
        return self._logits(x), x

    def pull(self, tape, slopes):
        gradient = self._gradient(tape, numpy.array(numpy.from_dlpack(slopes)))
        return OnGpu(gradient) if self.gpu is not None else numpy.ascontiguousarray(gradient)


def evaluation(gpu):
    """Verdicts and adversarial images of three attacks in three norms."""
    import advxl

    adapter = Adapter(gpu)
    model = advxl.Functions(None)
    model._adapter = lambda x, device: adapter
    x, y = linear_images(16)
    found = {}
    for norm, eps in [("Linf", 0.04), ("L2", 0.3), ("L1", 0.8)]:
        made = advxl.AutoAttack(
            model, norm=norm, eps=eps, verbose=False, version="custom", attacks_to_run=["apgd-ce", "fab-t", "square"]
        )
        made.apgd.n_iter, made.apgd.n_restarts, made.fab.n_iter, made.square.n_queries = 8, 1, 8, 20
        x_adv = made.run_standard_evaluation(x, y, bs=5)
        found[norm] = (made.result.robust, x_adv)
    assert adapter.gpu == gpu or adapter.reason, "no reason was reported"
    return found, adapter


@needs_numpy
class SoftwareGpu(unittest.TestCase):
    @unittest.skipUnless(shutil.which("c++"), "there is no C++ compiler")
    def test_images_that_stay_on_the_gpu_get_the_verdicts_of_the_cpu(self):
        script = """
            import sys
            sys.path.insert(0, {tests!r})
            import numpy, test_gpu
            on_gpu, adapter = test_gpu.evaluation(0)
            assert adapter.gpu == 0, adapter.reason
            on_cpu, _ = test_gpu.evaluation(None)
            for norm in on_cpu:
                assert on_gpu[norm][0] == on_cpu[norm][0], norm
                assert 0 < sum(on_cpu[norm][0]) < 16, norm
                numpy.testing.assert_allclose(on_gpu[norm][1], on_cpu[norm][1], atol=1e-5, err_msg=norm)
            print("equal")
        """
        text = textwrap.dedent(script).format(tests=os.path.dirname(os.path.abspath(__file__)))
        environment = {**os.environ, "ADVXL_CUDA_SOFTWARE": tempfile.gettempdir()}
        done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, env=environment)
        self.assertEqual(done.stdout.strip(), "equal", done.stderr)

    def test_without_a_gpu_images_cross_in_the_hosts_memory(self):
        # A number that no machine has.
        found, adapter = evaluation(977)
        self.assertIn("977", adapter.reason)
        self.assertEqual(found["Linf"][0], evaluation(None)[0]["Linf"][0])


if __name__ == "__main__":
    unittest.main()
