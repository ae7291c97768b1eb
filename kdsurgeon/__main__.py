"""``python -m kdsurgeon`` and the ``kdsurgeon`` command."""

import sys

from kdsurgeon.cli import main


def run() -> None:
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    run()
