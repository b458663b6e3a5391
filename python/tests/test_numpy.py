"""Attacks on functions of numpy arrays, held to answers known on paper."""

import contextlib
import io
import os
import tempfile
import unittest

import advxl
from support import RECIPE, linear_functions, linear_images, linear_margins, needs_numpy, numpy


def adversary(model, norm="Linf", eps=0.04, attacks=("apgd-ce", "fab-t", "square"), **settings):
    made = advxl.AutoAttack(
        model, norm=norm, eps=eps, verbose=False, version="custom", attacks_to_run=list(attacks), **settings
    )
    made.apgd.n_iter, made.apgd.n_restarts, made.fab.n_iter, made.square.n_queries = 20, 1, 20, 100
    return made


@needs_numpy
class LinearModel(unittest.TestCase):
    def setUp(self):
        logits, gradient, _ = linear_functions()
        self.model = advxl.Functions(logits, gradient)
        self.x, self.y = linear_images(60)

    def test_exactly_the_images_near_another_class_fall(self):
        for norm in ["Linf", "L2"]:
            margins = linear_margins(self.x, self.y, norm)
            eps = float(numpy.median(margins))
            # What a rounding decides is left out.
            sure = numpy.abs(margins - eps) > 0.02 * eps
            self.assertGreater((margins[sure] > eps).sum(), 5)
            self.assertGreater((margins[sure] < eps).sum(), 5)
            found = adversary(self.model, norm, eps)
            x_adv, y_adv = found.run_standard_evaluation(self.x, self.y, bs=7, return_labels=True)
            robust = numpy.array(found.result.robust)
            self.assertTrue((robust == (margins > eps))[sure].all(), norm)
            # What was returned is what the model was judged by.
            logits, _, _ = linear_functions()
            self.assertTrue((logits(x_adv).argmax(1) == y_adv).all())
            self.assertTrue(((y_adv == self.y) == robust).all())
            moved = (x_adv - self.x).reshape(len(self.x), -1)
            length = numpy.abs(moved).max(1) if norm == "Linf" else numpy.sqrt((moved**2).sum(1))
            self.assertLessEqual(length.max(), eps + 1e-6)
            self.assertTrue((length[robust] == 0).all())

    def test_the_batch_size_changes_no_bit(self):
        whole = adversary(self.model).run_standard_evaluation(self.x, self.y, bs=60)
        for bs in (1, 7):
            part = adversary(self.model).run_standard_evaluation(self.x, self.y, bs=bs)
            self.assertTrue((part == whole).all(), bs)

    def test_an_evaluation_that_was_killed_resumes_to_the_same_bits(self):
        whole = adversary(self.model)
        expected = whole.run_standard_evaluation(self.x, self.y, bs=13)
        logits, gradient, _ = linear_functions()
        with tempfile.TemporaryDirectory() as folder:
            state = os.path.join(folder, "state")
            stops = 0
            for limit in range(20, 5000, 45):
                calls = [0]

                def failing(x):
                    calls[0] += 1
                    if calls[0] > limit:
                        raise OSError("the power is out")
                    return logits(x)

                resumed = adversary(advxl.Functions(failing, gradient))
                try:
                    found = resumed.run_standard_evaluation(self.x, self.y, bs=13, state_path=state)
                    break
                except OSError:
                    stops += 1
            self.assertGreater(stops, 1)
            self.assertTrue((found == expected).all())
            without_time = lambda result: [  # noqa: E731
                {key: value for key, value in stage.items() if key != "seconds"} for stage in result["stages"]
            ]
            self.assertEqual(without_time(resumed.result), without_time(whole.result))
            # A finished one returns at once, with everything.
            again = adversary(self.model)
            self.assertTrue((again.run_standard_evaluation(self.x, self.y, bs=13, state_path=state) == expected).all())

            other = adversary(advxl.Functions(lambda x: 2 * logits(x) + 1, gradient))
            with self.assertRaisesRegex(advxl.InputError, "was saved with a different model"):
                other.run_standard_evaluation(self.x, self.y, bs=13, state_path=state)
            with self.assertRaisesRegex(advxl.InputError, "belongs to a different evaluation"):
                again.run_standard_evaluation(self.x[1:], self.y[1:], bs=13, state_path=state)
            with open(state, "w", encoding="utf-8") as file:
                file.write("{}")
            with self.assertRaisesRegex(advxl.InputError, "is not an evaluation state file"):
                again.run_standard_evaluation(self.x, self.y, bs=13, state_path=state)
            with open(state, encoding="utf-8") as file:
                self.assertEqual(file.read(), "{}")

    def test_a_state_file_that_cannot_be_written_or_is_in_use_is_refused_at_once(self):
        logits, gradient, _ = linear_functions()
        calls = []

        def counted(x):
            calls.append(len(x))
            return logits(x)

        with tempfile.TemporaryDirectory() as folder:
            state = os.path.join(folder, "none", "state")
            with self.assertRaisesRegex(advxl.InputError, "cannot write"):
                adversary(advxl.Functions(counted, gradient)).run_standard_evaluation(self.x, self.y, state_path=state)
            self.assertEqual(calls, [])
            state = os.path.join(folder, "state")

            def again(x):
                with self.assertRaisesRegex(advxl.InputError, "is in use by another process"):
                    adversary(self.model).run_standard_evaluation(self.x, self.y, state_path=state)
                calls.append("refused")
                raise OSError("enough")

            with self.assertRaisesRegex(OSError, "enough"):
                adversary(advxl.Functions(again, gradient), attacks=["square"]).run_standard_evaluation(
                    self.x, self.y, state_path=state
                )
        self.assertIn("refused", calls)

    def test_several_norms_and_their_union(self):
        both = adversary(self.model, ["Linf", "L2"], [0.04, 0.3])
        found = both.run_standard_evaluation(self.x, self.y)
        self.assertEqual(list(found), ["Linf", "L2"])
        one, two = both.result.evaluations
        union = [a and b for a, b in zip(one.robust, two.robust)]
        self.assertEqual(both.result.robust, union)
        self.assertAlmostEqual(both.result.robust_accuracy, sum(union) / 60)
        alone = adversary(self.model, "L2", 0.3)
        self.assertTrue((alone.run_standard_evaluation(self.x, self.y) == found["L2"]).all())

    def test_the_fast_version_bounds_what_it_misses(self):
        def run(version, **settings):
            made = advxl.AutoAttack(self.model, eps=0.04, verbose=False, version=version, **settings)
            made.apgd.n_iter = made.apgd_targeted.n_iter = made.fab.n_iter = 20
            made.square.n_queries = 100
            made.run_standard_evaluation(self.x, self.y, bs=7)
            return made

        fast, standard = run("fast", bound=8).result, run("standard").result
        bound = fast["bound"]
        self.assertTrue(0 < bound["sampled"] < bound["of"])
        self.assertEqual(bound["of"], fast["stages"][2]["robust_count"])
        for one, other in zip(fast["stages"][:3], standard["stages"]):
            self.assertEqual({**one, "seconds": 0}, {**other, "seconds": 0})
        self.assertLessEqual(100 * (fast.robust_accuracy - standard.robust_accuracy), bound["points"] + 1e-9)
        self.assertIn("autoattack fast: the full standard version would be at most", repr(fast))
        self.assertNotIn("bound", standard)
        for settings in ({"version": "standard", "bound": 1}, {"version": "fast", "bound": 0}):
            with self.assertRaises(advxl.InputError):
                advxl.AutoAttack(self.model, **settings)
        custom = advxl.AutoAttack(self.model, eps=0.04, verbose=False, version="fast")
        custom.attacks_to_run = ["apgd-ce"]
        with self.assertRaises(advxl.InputError):
            custom.run_standard_evaluation(self.x, self.y)
        with self.assertRaises(advxl.InputError):
            run("fast").run_standard_evaluation_individual(self.x, self.y)

    def test_malt_and_pma(self):
        for name in ("malt", "pma"):
            found = advxl.AutoAttack(
                self.model, eps=0.04, verbose=False, version="custom", attacks_to_run=[name]
            )
            found.apgd.n_iter = found.apgd_targeted.n_iter = 20
            found.apgd.n_restarts = 1
            found.run_standard_evaluation(self.x, self.y)
            margins = linear_margins(self.x, self.y, "Linf")
            sure = numpy.abs(margins - 0.04) > 0.02 * 0.04
            robust = numpy.array(found.result.robust)
            self.assertTrue((robust == (margins > 0.04))[sure].all(), name)

    def test_two_classes_are_attacked_too(self):
        logits, gradient, weights = linear_functions()
        two = advxl.Functions(
            lambda x: logits(x)[:, :2],
            lambda x, slopes: gradient(x, numpy.pad(slopes, ((0, 0), (0, 2)))),
        )
        y = logits(self.x)[:, :2].argmax(1)
        difference = numpy.abs(weights[:, 0] - weights[:, 1]).sum()
        margins = numpy.abs(logits(self.x)[:, 0] - logits(self.x)[:, 1]) / difference
        found = adversary(two, eps=0.04, attacks=["apgd-t"])
        found.run_standard_evaluation(self.x, y)
        sure = numpy.abs(margins - 0.04) > 8e-4
        self.assertTrue((numpy.array(found.result.robust) == (margins > 0.04))[sure].all())
        self.assertIn("few_classes", [flag["check"] for flag in found.result.flags])

    def test_an_iterator_of_batches_gives_what_arrays_give(self):
        whole = adversary(self.model).run_standard_evaluation(self.x, self.y)
        batches = ((self.x[at : at + 9], self.y[at : at + 9]) for at in range(0, 60, 9))
        self.assertTrue((adversary(self.model).run_standard_evaluation(batches) == whole).all())
        with self.assertRaisesRegex(advxl.InputError, "batch 0 of the iterator is a int"):
            adversary(self.model).run_standard_evaluation([1, 2])

    def test_single_attacks(self):
        margins = linear_margins(self.x, self.y, "Linf")
        falls = margins < 0.9 * 0.04
        logits, _, _ = linear_functions()
        settings = dict(eps=0.04, n_iter=20)
        for name, x_adv in {
            "pgd": advxl.pgd(self.model, self.x, self.y, **settings),
            "apgd": advxl.apgd(self.model, self.x, self.y, **settings),
            "fab": advxl.fab(self.model, self.x, self.y, **settings),
        }.items():
            self.assertTrue((logits(x_adv).argmax(1) != self.y)[falls].all(), name)
            self.assertLessEqual(numpy.abs(x_adv - self.x).max(), 0.04 + 1e-6)
        start = dict(eps=0.04, n_iter=1, step_size=1e-9)
        one = advxl.pgd(self.model, self.x, self.y, **start)
        other = advxl.pgd(self.model, self.x, self.y, keys=range(60, 120), **start)
        self.assertFalse((one == other).all(), "another key, another start")
        with self.assertRaisesRegex(advxl.InputError, "unknown loss 'l2'"):
            advxl.apgd(self.model, self.x, self.y, eps=0.01, loss="l2")

    def test_without_gradients_only_square_runs(self):
        blind = advxl.Functions(self.model)
        found = advxl.square(blind, self.x, self.y, eps=0.1, n_queries=50)
        self.assertGreater(numpy.abs(found - self.x).max(), 0.09)
        with self.assertRaisesRegex(advxl.InputError, "needs gradients"):
            advxl.apgd(blind, self.x, self.y, eps=0.05)


@needs_numpy
class Inputs(unittest.TestCase):
    def test_what_cannot_be_attacked_is_named(self):
        logits, gradient, _ = linear_functions()
        model = advxl.Functions(logits, gradient)
        x, y = linear_images(4)
        refused = [
            ((x * 255).astype("uint8"), y, "uint8, expected floating-point"),
            (x * 255, y, "outside \\[0, 1\\]"),
            (x.transpose(0, 2, 3, 1), y, "channels last"),
            (x[0], y[:1], "expected \\[n, channels, height, width\\]"),
            (x, y[:3], "3 labels for 4 images"),
            (x, numpy.eye(4)[y], "expected one class number per image"),
            (x, y - 9, "expected a non-negative class number"),
            (x, y + 4, "is out of range: the model has 4 classes"),
            (x[:0], y[:0], "no images to attack"),
            (x * numpy.nan, y, "pixel value of NaN"),
            (x, None, "`y_orig` is missing"),
        ]
        for images, labels, message in refused:
            with self.assertRaisesRegex(advxl.InputError, message):
                adversary(model).run_standard_evaluation(images, labels)
        with self.assertRaisesRegex(advxl.InputError, "returned shape \\[4\\] for 4 images"):
            adversary(advxl.Functions(lambda x: logits(x)[:, 0], gradient)).run_standard_evaluation(x, y)

    def test_an_exception_of_the_model_arrives_as_it_is(self):
        x, y = linear_images(4)

        def model(x):
            raise LookupError("of my own")

        with self.assertRaisesRegex(LookupError, "of my own"):
            adversary(advxl.Functions(model)).run_standard_evaluation(x, y)


@needs_numpy
class LoadedModel(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        recipe = os.path.join(cls.folder.name, "tiny.toml")
        with open(recipe, "w", encoding="utf-8") as file:
            file.write(RECIPE)
        cls.trained = os.path.join(cls.folder.name, "run")
        with contextlib.redirect_stderr(io.StringIO()):
            advxl.train(recipe, out=cls.trained, device="cpu")
        cls.model = advxl.load(cls.trained, device="cpu")
        cls.x = numpy.random.default_rng(1).uniform(0.2, 0.8, (5, 3, 32, 32)).astype("float32")

    @classmethod
    def tearDownClass(cls):
        cls.folder.cleanup()

    def test_the_gradient_is_the_slope_of_the_outputs(self):
        slopes = numpy.zeros((5, self.model.num_classes), dtype="float32")
        slopes[:, 1] = 1
        gradient = self.model.input_gradient(self.x, slopes)
        direction = numpy.random.default_rng(2).standard_normal(self.x.shape).astype("float32")
        step = 1e-2
        ahead, behind = self.model(self.x + step * direction), self.model(self.x - step * direction)
        measured = (ahead - behind)[:, 1] / (2 * step)
        known = (gradient * direction).sum((1, 2, 3))
        numpy.testing.assert_allclose(measured, known, rtol=2e-2, atol=2e-3)

    def test_it_is_attacked_as_its_two_functions_are(self):
        y = self.model(self.x).argmax(1)
        functions = advxl.Functions(self.model, self.model.input_gradient)
        of_model = adversary(self.model, eps=0.002)
        of_functions = adversary(functions, eps=0.002)
        a = of_model.run_standard_evaluation(self.x, y)
        b = of_functions.run_standard_evaluation(self.x, y)
        self.assertTrue((a == b).all())
        self.assertEqual(of_model.result.robust, of_functions.result.robust)

    def test_images_that_it_does_not_take_are_refused(self):
        for x, message in [
            (self.x[:, :, :30, :30], "patch"),
            (self.x[:, :1], r"expected \[batch, 3, size, size\]"),
            (self.x[0], "4 dimensions, got 3"),
        ]:
            with self.assertRaisesRegex(advxl.InputError, message):
                self.model(x)


if __name__ == "__main__":
    unittest.main()
