"""The training command without its pictures: python benchmarks/bare.py TRAINING FLAGS."""

import sys

from common import ssd


def draw_nothing(*values: object, **options: object) -> None:
    """Stand in for a function that draws or saves a figure."""


def main() -> int:
    """Train without pictures; returns the exit code."""
    for name in ("plot_augmentations", "plot_losses", "plot_predictions", "save_figure"):
        getattr(ssd, name)  # a name that is no more must not pass unseen
        setattr(ssd, name, draw_nothing)
    return ssd.main()


if __name__ == "__main__":
    sys.exit(main())
