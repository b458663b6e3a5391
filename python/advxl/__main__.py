"""Runs the ``advxl`` command as ``python -m advxl``."""

from ._program import main

if __name__ == "__main__":
    main()
