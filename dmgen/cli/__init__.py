"""The command line."""

from dmgen.cli.app import main

__all__ = ["main"]
