"""Types of command line flags."""

from __future__ import annotations

from argparse import ArgumentTypeError

from workloads.reader import LARGEST


def whole(text: str) -> int:
    """A whole number that a machine counts with. Raises `ArgumentTypeError`, which argparse prints with the flag's name."""
    try:
        value = int(text)
    except ValueError:
        value = LARGEST
    if not -LARGEST < value < LARGEST:
        raise ArgumentTypeError(f"{text!r}: must be a whole number below {LARGEST}")
    return value
