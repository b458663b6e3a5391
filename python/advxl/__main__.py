"""``python -m advxl`` is the command ``advxl``."""

from ._program import main

if __name__ == "__main__":
    main()
