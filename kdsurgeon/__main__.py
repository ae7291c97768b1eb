"""``python -m kdsurgeon`` and the ``kdsurgeon`` command."""

import signal
import sys


def run() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing to clean up yet: just end
    from kdsurgeon.cli import main

    signal.signal(signal.SIGINT, before)
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    run()
