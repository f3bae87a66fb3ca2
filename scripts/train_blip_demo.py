"""Trains the two BLIP demos on the CPU in minutes, offline, and measures the files that it writes."""

import sys

from demo.blip import RECIPE
from demo.training import run_recipe


def main(arguments: list[str] | None = None) -> int:
    """Trains and measures, or measures only; returns 1 when a demo misses its accuracy or its size."""
    return run_recipe(RECIPE, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
