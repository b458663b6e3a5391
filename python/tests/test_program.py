"""The command and the functions that run it. Needs neither numpy nor torch."""

import contextlib
import inspect
import io
import os
import subprocess
import sys
import tempfile
import unittest

import advxl
from support import RECIPE


def quietly(work):
    """The result of work, with its lines of progress."""
    lines = io.StringIO()
    with contextlib.redirect_stderr(lines):
        result = work()
    return result, lines.getvalue()


class Command(unittest.TestCase):
    def run_command(self, *arguments):
        command = [sys.executable, "-m", "advxl", *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    def test_it_is_the_program(self):
        done = self.run_command("--version")
        self.assertEqual(done.returncode, 0)
        self.assertEqual(done.stdout.strip(), f"advxl {advxl.__version__}")

    def test_bad_arguments_have_exit_code_2(self):
        done = self.run_command("eval", "nothing", "--data", "synthetic:4", "--eps", "0.1")
        self.assertEqual(done.returncode, 2)
        self.assertIn("error: `nothing` does not exist", done.stderr)


class Functions(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        self.recipe = os.path.join(self.folder, "tiny.toml")
        with open(self.recipe, "w", encoding="utf-8") as file:
            file.write(RECIPE)

    def test_a_recipe_is_checked_planned_trained_resumed_and_evaluated(self):
        parallel = {"shards": 2, "reduce": "exact"}
        recipe = advxl.Recipe(self.recipe, stage__pretrain__attack__steps=2, parallel=parallel)
        self.assertEqual(recipe.check()["samples"], 128)
        self.assertGreater(advxl.plan(recipe)["plan"]["parameters"], 0)
        out = os.path.join(self.folder, "run")
        # Two processes: the launcher starts Python again.
        trained, lines = quietly(lambda: advxl.train(recipe, out=out, processes=2, device="cpu"))
        self.assertEqual(trained["samples"], 128)
        self.assertIn("pretrain", lines)
        again, _ = quietly(lambda: advxl.train(recipe, out=out, device="cpu"))
        self.assertEqual(again["robust_accuracy"], trained["robust_accuracy"])
        found, _ = quietly(
            lambda: advxl.evaluate(out, "synthetic:12", attack="pgd", eps="4/255", device="cpu")
        )
        self.assertEqual(len(found.robust), 12)
        self.assertLessEqual(found.robust_accuracy, found.clean_accuracy)
        self.assertIn("robust accuracy", repr(found))
        model = advxl.load(out, device="cpu")
        self.assertEqual(model.image_size, 32)
        self.assertIn("parameters", repr(model))

    def test_all_problems_of_a_recipe_come_at_once(self):
        recipe = advxl.Recipe(self.recipe, {"nokey": 1, "stage.pretrain.attack.steps": -1})
        with self.assertRaises(advxl.InputError) as raised:
            recipe.check()
        self.assertIn("nokey", str(raised.exception))
        self.assertIn("steps = -1", str(raised.exception))

    def test_errors_have_a_message_and_a_hint(self):
        with self.assertRaises(advxl.InputError) as raised:
            advxl.load(os.path.join(self.folder, "none"))
        self.assertIn("does not exist", raised.exception.message)
        self.assertIn("model folder", raised.exception.hint)
        self.assertIsInstance(raised.exception, ValueError)
        self.assertIsInstance(raised.exception, advxl.AdvxlError)
        with self.assertRaises(advxl.InputError) as raised:
            advxl.evaluate("none", "synthetic:4")
        self.assertEqual(raised.exception.message, "--eps is missing")
        with self.assertRaisesRegex(advxl.InputError, "on a data set given by name or path"):
            advxl.evaluate("none", [1.0])


class Embeddings(unittest.TestCase):
    def test_a_model_of_embeddings_is_not_attacked_as_a_classifier(self):
        class Loaded:
            outputs_embeddings = True
            num_classes = 512

        with self.assertRaisesRegex(advxl.InputError, "512 outputs of `clip` are an embedding"):
            advxl._adapters.adapter_of(advxl.Model(Loaded(), "clip"), None)


class AutoAttackSettings(unittest.TestCase):
    def adversary(self, **settings):
        return advxl.AutoAttack(lambda x: x, **settings)

    def test_versions_are_the_published_ones(self):
        standard = self.adversary()
        self.assertEqual(standard.attacks_to_run, ["apgd-ce", "apgd-t", "fab-t", "square"])
        self.assertEqual(standard.apgd.n_restarts, 1)
        self.assertEqual(standard.apgd_targeted.n_target_classes, 9)
        l1 = self.adversary(norm="L1", eps=12)
        self.assertEqual((l1.apgd.n_restarts, l1.apgd.use_largereps), (5, True))
        self.assertEqual(l1.apgd_targeted.n_target_classes, 5)
        # Of several norms, each has its own.
        both = self.adversary(norm=["Linf", "L1"], eps=[0.03, 12])
        spec = both._specs("L1", 12, ["apgd-ce"])[0]
        self.assertEqual((spec["restarts"], spec["enlarged"]), (5, True))
        self.assertEqual(both._specs("Linf", 0.03, ["apgd-ce"])[0]["restarts"], 1)
        self.assertEqual(self.adversary(version="rand").apgd.eot_iter, 20)
        self.assertEqual(self.adversary(version="plus").fab.n_restarts, 5)

    def test_settings_that_cannot_be_are_refused(self):
        refused = [
            (dict(norm="linf"), "unknown norm 'linf'"),
            (dict(version="std"), "unknown version 'std'"),
            (dict(eps=8), "larger than the range of a pixel"),
            (dict(eps=-0.1), "expected a finite number of at least 0"),
            (dict(norm=["Linf", "L2"], eps=0.1), "2 norms and 1 epsilons"),
            (dict(is_tf_model=True), "TensorFlow"),
            (dict(attacks_to_run=["fab"]), "has no effect with version='standard'"),
        ]
        for settings, message in refused:
            with self.assertRaisesRegex(advxl.InputError, message):
                self.adversary(**settings)
        adversary = self.adversary()
        with self.assertRaisesRegex(advxl.InputError, "n_restarts = 0: expected a whole number"):
            adversary.apgd.n_restarts = 0
        with self.assertRaisesRegex(advxl.InputError, "no setting `n_restart`"):
            adversary.fab.n_restart = 2
        with self.assertRaisesRegex(advxl.InputError, "fixed at 0.8"):
            adversary.square.p_init = 0.3
        adversary.square.p_init = 0.8
        with self.assertRaisesRegex(advxl.InputError, "no result yet"):
            adversary.result

    def test_everything_public_is_documented(self):
        for name in advxl.__all__:
            public = getattr(advxl, name)
            self.assertTrue(inspect.getdoc(public), name)
            if inspect.isclass(public):
                for member, value in vars(public).items():
                    if not member.startswith("_") and (callable(value) or isinstance(value, property)):
                        self.assertTrue(inspect.getdoc(value), f"{name}.{member}")


if __name__ == "__main__":
    unittest.main()
