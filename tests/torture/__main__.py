"""``python -m tests.torture``: see :mod:`tests.torture.parts`, which child processes can import."""

import sys

from tests.torture.parts import main

if __name__ == "__main__":  # a child that multiprocessing spawns imports this module, too
    sys.exit(main())
