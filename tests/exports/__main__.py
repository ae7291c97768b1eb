"""``python -m tests.exports``: see :mod:`tests.exports.searching`."""

import sys

from tests.exports.searching import main

sys.exit(main())
