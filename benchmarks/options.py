"""What the command lines of benchmarks share."""

import argparse


def positive(text):
    """A whole number of at least 1, for argparse's `type`."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: give at least 1")
    return number
