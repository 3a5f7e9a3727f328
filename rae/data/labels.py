"""Labels as people have them, to numbers and names of classes."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from rae.config.errors import UserError

MOST = 2**16
"""Classes: a list of their names and counts is to stay small."""


class Classes:
    """Classes by the labels that a source holds: truth values, numbers, text. None, NaN, '' and −1 are no label.

    Whole numbers from 0 are class numbers already, unless they are too large; then, as other values, they are numbered
    in their order. −1 is a class beside other negative numbers.

    Args:
        values: every distinct label, of all splits, so that they agree.
        what: where they are, for messages.
        remedy: what a message ends with.

    Raises:
        UserError: labels that are no single values, or too many.
    """

    def __init__(self, values: Iterable[Any], what: str, remedy: str):
        try:
            found = {_plain(value) for value in values} - {None}
        except TypeError as error:
            raise UserError(f"{what} holds several labels an image; {remedy}") from error
        if len(found) > MOST:
            raise UserError(f"{what} holds {len(found):,} different values, too many for classes; {remedy}")
        self.numbers: dict[Any, int] | None = None
        whole = all(type(value) is int for value in found)
        if whole and min(found, default=0) >= -1:
            found -= {-1}
        if found and not whole and found.issubset((False, True)):
            found = {False, True}
        if whole and min(found, default=-1) >= 0 and max(found) < MOST:
            self.names = [str(number) for number in range(max(found) + 1)]
        else:
            one_kind = all(isinstance(value, int | float) for value in found) or all(type(v) is str for v in found)
            ordered = sorted(found, key=None if one_kind else str)
            self.numbers, self.names = {value: i for i, value in enumerate(ordered)}, list(map(str, ordered))

    def number(self, value: Any) -> int:
        """A label's class, or −1 for none."""
        value = _plain(value)
        if self.numbers is not None:
            return self.numbers.get(value, -1)
        return value if value is not None and 0 <= value < len(self.names) else -1


def _plain(value: Any) -> Any:
    """One form for each label (bool, int, float, str); None for no label."""
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, list | tuple | dict | set | np.ndarray):
        raise TypeError(type(value).__name__)
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return int(value) if value.is_integer() else value
    if isinstance(value, bytes):
        value = value.decode(errors="backslashreplace")
    return value if value is None or isinstance(value, bool | int) else str(value) or None
