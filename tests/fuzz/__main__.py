"""``python -m tests.fuzz``: see :mod:`tests.fuzz.searching`, which child processes can import."""

import sys

from tests.fuzz.searching import main

sys.exit(main())
