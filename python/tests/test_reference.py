"""Verdicts and passes compared with pyautoattack, where it is installed (`scripts/test python --with-torch`)."""

import unittest

import advxl
from support import needs_torch, torch
from test_torch import images_of, small_cnn

try:
    import pyautoattack
except ImportError:
    pyautoattack = None


@needs_torch
@unittest.skipUnless(pyautoattack, "pyautoattack is not installed")
class Reference(unittest.TestCase):
    def test_verdicts_are_those_of_pyautoattack_with_no_more_passes(self):
        model = small_cnn(10)
        x, y = images_of(model, 40)
        for norm, eps in [("Linf", 0.02), ("L2", 0.2), ("L1", 1.5)]:
            passes = {}

            def counted(x):
                logits = model(x)
                passes["forward"] = passes.get("forward", 0) + len(x)
                passes["backward"] = passes.get("backward", 0) + len(x) * logits.requires_grad
                return logits

            ours = advxl.AutoAttack(counted, norm=norm, eps=eps, verbose=False)
            theirs = pyautoattack.AutoAttack(counted, norm=norm, eps=eps, seed=0)
            for adversary in (ours, theirs):
                adversary.apgd.n_iter = adversary.apgd_targeted.n_iter = adversary.fab.n_iter = 20
                adversary.square.n_queries = 200
                if norm != "Linf":
                    # Of images this small, the reference's square makes none in other norms.
                    adversary.attacks_to_run = ["apgd-ce", "apgd-t", "fab-t"]
            x_adv = ours.run_standard_evaluation(x, y, bs=20)
            of_ours = dict(passes)
            passes.clear()
            theirs_adv, _ = theirs.run_standard_evaluation(x, y, batch_size=20)
            with torch.no_grad():
                robust, expected = (model(found).argmax(1) == y for found in (x_adv, theirs_adv))
            self.assertTrue(0 < robust.sum() < 40, norm)
            # Random starts decide about an image at the edge.
            self.assertLessEqual((robust != expected).sum().item(), 1, norm)
            for kind in ("forward", "backward"):
                self.assertLessEqual(of_ours[kind], 1.05 * passes[kind], f"{norm} {kind}")


if __name__ == "__main__":
    unittest.main()
