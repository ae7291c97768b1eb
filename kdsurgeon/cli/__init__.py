"""The command line: the only place where strings become objects and text is printed."""

from kdsurgeon.cli.app import main

__all__ = ["main"]
