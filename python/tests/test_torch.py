"""Attacks on torch models."""

import contextlib
import io
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import textwrap
import unittest

import advxl
from support import needs_torch, numpy, torch


def small_cnn(classes=6):
    """A network with random weights; what it says of images are their labels."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, 2, 1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 16, 3, 2, 1),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(16 * 3 * 3, classes),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model.eval()


def images_of(model, count=24):
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(count, 3, 12, 12, generator=generator)
    with torch.no_grad():
        return x, model(x.to(next(model.parameters()).dtype)).argmax(1)


def adversary(model, eps=0.02, attacks=("apgd-ce", "apgd-t", "fab-t", "square"), norm="Linf", **settings):
    made = advxl.AutoAttack(
        model, norm=norm, eps=eps, version="custom", attacks_to_run=list(attacks), **{"verbose": False, **settings}
    )
    made.apgd.n_iter, made.apgd.n_restarts, made.apgd_targeted.n_iter = 10, 1, 10
    made.fab.n_iter, made.square.n_queries = 10, 50
    return made


@needs_torch
class Evaluations(unittest.TestCase):
    def setUp(self):
        self.model = small_cnn()
        self.x, self.y = images_of(self.model)

    def test_what_is_returned_is_what_the_model_was_judged_by(self):
        for norm, eps in [("Linf", 0.02), ("L2", 0.2), ("L1", 1.5)]:
            made = adversary(self.model, eps, norm=norm)
            x_adv, y_adv = made.run_standard_evaluation(self.x, self.y, bs=7, return_labels=True)
            robust = torch.tensor(made.result.robust)
            self.assertTrue(0 < robust.sum() < len(robust), norm)
            with torch.no_grad():
                self.assertTrue((self.model(x_adv).argmax(1) == y_adv).all())
            self.assertTrue(((y_adv == self.y) == robust).all())
            moved = (x_adv - self.x).flatten(1)
            length = {"Linf": moved.abs().amax(1), "L2": moved.norm(dim=1), "L1": moved.abs().sum(1)}[norm]
            self.assertLessEqual(length.max().item(), eps + 1e-5)
            self.assertTrue(0 <= x_adv.min() and x_adv.max() <= 1)

    def test_it_works_whatever_gradients_are_switched_to(self):
        expected = adversary(self.model).run_standard_evaluation(self.x, self.y)
        with torch.no_grad():
            found = adversary(self.model).run_standard_evaluation(self.x, self.y)
        self.assertTrue(torch.equal(found, expected))
        with torch.inference_mode():
            found = adversary(self.model).run_standard_evaluation(self.x, self.y)
        self.assertTrue((found == expected).all())
        self.assertTrue(all(parameter.grad is None for parameter in self.model.parameters()))

    def test_pyautoattacks_names_are_understood(self):
        expected = adversary(self.model, attacks=["apgd-ce"]).run_standard_evaluation(self.x, self.y)
        made = advxl.AutoAttack(self.model, eps=0.02, version="custom", attacks=["apgd-ce"], verbose=False)
        made.apgd.n_iter, made.apgd.n_restarts = 10, 1
        self.assertTrue(torch.equal(made.run_standard_evaluation(self.x, self.y, batch_size=5), expected))
        found = made.run_standard_evaluation_individual(self.x, self.y, batch_size=5)
        self.assertTrue(torch.equal(found["apgd-ce"], expected))

    def test_inputs_are_left_as_they_were(self):
        x = self.x.clone()
        adversary(self.model).run_standard_evaluation(self.x, self.y)
        self.assertTrue(torch.equal(x, self.x))

    def test_other_precisions(self):
        for dtype in (torch.float64, torch.bfloat16):
            model = small_cnn().to(dtype)
            x = self.x.to(dtype)
            with torch.no_grad():
                y = model(x).argmax(1)
            made = adversary(model, attacks=["apgd-ce"])
            x_adv = made.run_standard_evaluation(x, y)
            self.assertEqual(x_adv.dtype, dtype)
            with torch.no_grad():
                right = model(x_adv).argmax(1) == y
            self.assertTrue((right == torch.tensor(made.result.robust)).all())
            self.assertLess(right.sum(), len(y))

    def test_loaders_give_what_tensors_give(self):
        expected = adversary(self.model).run_standard_evaluation(self.x, self.y)
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(self.x, self.y), batch_size=5)
        made = adversary(self.model)
        self.assertTrue(torch.equal(made.run_standard_evaluation(loader), expected))
        once = ((x, y) for x, y in loader)
        self.assertTrue(torch.equal(made.run_standard_evaluation(once), expected))
        with self.assertRaisesRegex(advxl.InputError, "yielded no batches"):
            made.run_standard_evaluation(iter([]))

    def test_each_attack_by_itself(self):
        made = adversary(self.model, attacks=["apgd-ce", "square"])
        found = made.run_standard_evaluation_individual(self.x, self.y)
        self.assertEqual(list(found), ["apgd-ce", "square"])
        alone = adversary(self.model, attacks=["square"])
        self.assertTrue(torch.equal(found["square"], alone.run_standard_evaluation(self.x, self.y)))
        self.assertEqual(made.results["square"].robust, alone.result.robust)
        self.assertEqual(made.clean_accuracy(self.x, self.y), 1.0)

    def test_lines_are_those_of_autoattack(self):
        with tempfile.TemporaryDirectory() as folder:
            log = os.path.join(folder, "log.txt")
            made = adversary(self.model, attacks=["apgd-ce"], log_path=log)
            made.run_standard_evaluation(self.x, self.y, bs=12)
            with open(log, encoding="utf-8") as file:
                text = file.read()
        self.assertIn("using custom version including apgd-ce.", text)
        self.assertIn("initial accuracy: 100.00%", text)
        self.assertRegex(text, r"apgd-ce - 1/2 - \d+ out of 12 successfully perturbed")
        self.assertRegex(text, r"robust accuracy after APGD-CE: [\d.]+% \(total time [\d.]+ s\)")
        self.assertRegex(text, r"max Linf perturbation: 0.0\d+, nan in tensor: 0, max: [\d.]+, min: [\d.]+")
        self.assertRegex(text, r"robust accuracy: [\d.]+%")

    def test_ctrl_c_saves_and_stops(self):
        script = """
            import os, signal, sys
            sys.path.insert(0, {tests!r})
            import advxl, test_torch
            # A shell that starts the tests in the background makes them ignore it.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            model = test_torch.small_cnn()
            x, y = test_torch.images_of(model)
            calls = [0]
            def interrupting(x):
                calls[0] += 1
                if calls[0] == 60 and {interrupt}:
                    os.kill(os.getpid(), signal.SIGINT)
                return model(x)
            made = test_torch.adversary(interrupting, attacks=["apgd-ce", "apgd-t"])
            made.run_standard_evaluation(x, y, bs=24, state_path={state!r})
            print(made.result.robust)
        """
        with tempfile.TemporaryDirectory() as folder:
            state = os.path.join(folder, "state")

            def run(interrupt):
                text = textwrap.dedent(script).format(
                    tests=os.path.dirname(os.path.abspath(__file__)), state=state, interrupt=interrupt
                )
                return subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)

            stopped = run(True)
            self.assertIn("KeyboardInterrupt", stopped.stderr)
            self.assertEqual(stopped.stdout, "")
            resumed = run(False)
            self.assertEqual(resumed.returncode, 0, resumed.stderr)
        made = adversary(self.model, attacks=["apgd-ce", "apgd-t"])
        made.run_standard_evaluation(self.x, self.y, bs=24)
        self.assertEqual(resumed.stdout.strip(), str(made.result.robust))


@needs_torch
class Messages(unittest.TestCase):
    def setUp(self):
        self.model = small_cnn()
        self.x, self.y = images_of(self.model, 4)

    def refused(self, model, message, x=None, **settings):
        with self.assertRaisesRegex(advxl.InputError, message):
            adversary(model, **settings).run_standard_evaluation(self.x if x is None else x, self.y)

    def test_a_model_that_does_not_return_logits(self):
        model = self.model
        self.refused(lambda x: (model(x), x), r"a tuple of 2[\s\S]*model\(x\)\[0\]")
        self.refused(lambda x: None, "a NoneType")
        self.refused(lambda x: model(x).argmax(1), r"shape \[4\] for 4 images")
        self.refused(lambda x: model(x).round().long(), "int64")
        self.refused(lambda x: model(x)[:, :1], "1 class")
        self.refused("resnet50", "the model is a str")

        class Output:
            def __init__(self, logits):
                self.logits = logits

        self.refused(lambda x: Output(model(x)), r"a Output[\s\S]*\.logits")

    def test_a_model_of_another_dtype_or_device(self):
        self.refused(small_cnn().double(), r"float32[\s\S]*pass x.to\(torch.float64\)")
        self.refused(small_cnn().to("meta"), "meta")
        if not torch.cuda.is_available():
            self.refused(self.model, "finds no CUDA GPU", device="cuda")

    def test_images_that_are_none(self):
        self.refused(self.model, r"uint8[\s\S]*x_orig.float\(\) / 255", (self.x * 255).byte())
        self.refused(self.model, r"channels last[\s\S]*permute", self.x.permute(0, 2, 3, 1))

    def test_an_exception_of_the_model_arrives_as_it_is(self):
        calls = []

        def model(x):
            calls.append(x)
            if len(calls) > 8:
                raise LookupError("of my own")
            return self.model(x)

        with self.assertRaisesRegex(LookupError, "of my own"):
            adversary(model).run_standard_evaluation(self.x, self.y)

    def test_signs_that_numbers_mislead(self):
        def flags(model, **settings):
            made = adversary(model, attacks=["apgd-ce"], **settings)
            made.run_standard_evaluation(self.x, self.y)
            return [flag["check"] for flag in made.result.flags]

        self.assertEqual(flags(self.model), [])
        self.assertIn("probabilities", flags(lambda x: self.model(x).softmax(1)))
        self.assertIn("zero_gradients", flags(lambda x: self.model(x.detach())))
        self.assertIn("randomised", flags(lambda x: self.model(x + 0.1 * torch.rand_like(x))))


@needs_torch
class Defenses(unittest.TestCase):
    def setUp(self):
        self.model = small_cnn()
        self.x, _ = images_of(self.model)

    def test_bpda_sees_through_quantization(self):
        def rounded(x):
            return (x * 15).round() / 15

        hidden = advxl.Defense(self.model, preprocess=rounded)
        open_ = advxl.Defense(self.model, preprocess=rounded, bpda=lambda x: x)
        with torch.no_grad():
            y = hidden(self.x).argmax(1)
            self.assertTrue(torch.equal(open_(self.x), hidden(self.x)))
        accuracy = {}
        for name, model in {"hidden": hidden, "open": open_}.items():
            made = adversary(model, 0.05, attacks=["apgd-ce"])
            made.run_standard_evaluation(self.x, y)
            accuracy[name] = made.result.robust_accuracy
        self.assertLess(accuracy["open"], accuracy["hidden"])
        with self.assertRaisesRegex(advxl.InputError, "`bpda` returned shape"):
            wrong = advxl.Defense(self.model, preprocess=rounded, bpda=lambda x: x[:, :1])
            adversary(wrong, attacks=["apgd-ce"]).run_standard_evaluation(self.x, y)

    def test_random_models_get_mean_gradients(self):
        calls = [0]

        def noisy(x):
            calls[0] += len(x)
            return self.model(x + 0.01 * torch.rand_like(x))

        y = self.model(self.x).argmax(1)
        made = advxl.AutoAttack(noisy, eps=0.02, version="rand", verbose=False)
        made.attacks_to_run = ["apgd-ce"]
        made.apgd.n_iter = 2
        made.run_standard_evaluation(self.x[:2], y[:2])
        stage = made.result["stages"][1]
        self.assertEqual(stage["settings"]["averages"], 20)
        self.assertNotIn("randomised", [flag["check"] for flag in made.result.flags])


@needs_torch
class Functions(unittest.TestCase):
    def test_pgd_is_an_ascent_inside_the_ball(self):
        model = small_cnn()
        x, y = images_of(model)
        loss = torch.nn.functional.cross_entropy
        for norm, eps in [("Linf", 0.05), ("L2", 0.5), ("L1", 3.0)]:
            found = advxl.pgd(model, x, y, eps=eps, norm=norm, n_iter=5)
            with torch.no_grad():
                self.assertGreater(loss(model(found), y), loss(model(x), y))
        with self.assertRaisesRegex(advxl.InputError, "3 keys for 24 images"):
            advxl.pgd(model, x, y, eps=0.1, keys=[1, 2, 3])

    def test_benchmark_reads_cifar(self):
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10)).eval()
        with tempfile.TemporaryDirectory() as folder:
            os.mkdir(os.path.join(folder, "cifar-10-batches-py"))
            pixels = numpy.random.default_rng(0).integers(0, 256, (12, 3072), dtype="uint8")
            path = os.path.join(folder, "cifar-10-batches-py", "test_batch")
            with open(path, "wb") as file:
                pickle.dump({b"data": pixels, b"labels": [0] * 12}, file)
            here = os.getcwd()
            os.chdir(folder)
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    clean, robust = advxl.benchmark(
                        model, n_examples=8, threat_model="L2", eps=0.1, version="rand", data_dir=folder,
                        to_disk=True, model_name="mine",
                    )
                self.assertTrue(os.path.isfile("model_info/cifar10/L2/mine.json"))
            finally:
                os.chdir(here)
            self.assertLessEqual(robust, clean)
            self.assertEqual(len(advxl.benchmark.result.robust), 8)
            with self.assertRaisesRegex(advxl.InputError, "n_examples=13"):
                advxl.benchmark(model, n_examples=13, data_dir=folder)
            with self.assertRaisesRegex(advxl.InputError, "`cifar-100-python/test` not found"):
                advxl.benchmark(model, dataset="cifar100", data_dir=folder)
            with open(path, "wb") as file:
                file.write(b"cos\nsystem\n(S'true'\ntR.")
            with self.assertRaisesRegex(advxl.InputError, "tries to call os.system"):
                advxl.benchmark(model, n_examples=8, data_dir=folder)

    def test_a_loaded_model_passes_gradients_on(self):
        from support import RECIPE

        with tempfile.TemporaryDirectory() as folder:
            recipe = os.path.join(folder, "tiny.toml")
            with open(recipe, "w", encoding="utf-8") as file:
                file.write(RECIPE)
            run = os.path.join(folder, "run")
            with contextlib.redirect_stderr(io.StringIO()):
                advxl.train(recipe, out=run, device="cpu")
            model = advxl.load(run, device="cpu")
            x = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
            x.requires_grad_()
            outputs = model(x)
            slopes = torch.zeros_like(outputs)
            slopes[:, 2] = 1.5
            (outputs * slopes).sum().backward()
            expected = model.input_gradient(x.detach(), slopes)
            self.assertTrue(torch.equal(x.grad, expected))
            array = model(x.detach().numpy())
            self.assertTrue(torch.equal(torch.from_numpy(array), outputs.detach()))
            # Inside a torch model, it is attacked like any other.
            wrapped = lambda x: model(x) * 1.0  # noqa: E731
            y = outputs.argmax(1)
            a, b = adversary(wrapped, 0.002), adversary(model, 0.002)
            one = a.run_standard_evaluation(x.detach(), y)
            other = b.run_standard_evaluation(x.detach(), y)
            self.assertTrue(torch.equal(one, other))


if __name__ == "__main__":
    unittest.main()
