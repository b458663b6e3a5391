"""The notebooks of examples/ run from top to bottom."""

import contextlib
import glob
import io
import json
import os
import unittest

from support import ROOT, needs_torch


@needs_torch
class Notebooks(unittest.TestCase):
    def test_every_cell_runs(self):
        notebooks = sorted(glob.glob(os.path.join(ROOT, "examples", "*.ipynb")))
        self.assertTrue(notebooks)
        for path in notebooks:
            with open(path, encoding="utf-8") as file:
                cells = json.load(file)["cells"]
            names = {"__name__": "__main__"}
            for number, cell in enumerate(cells):
                if cell["cell_type"] != "code":
                    continue
                self.assertEqual(cell["outputs"], [], "notebooks are kept without outputs")
                code = compile("".join(cell["source"]), f"{path}, cell {number}", "exec")
                with contextlib.redirect_stdout(io.StringIO()):
                    exec(code, names)


if __name__ == "__main__":
    unittest.main()
