"""Points and spans in training time: one way to write them, wherever a time is taken.

``8ep``, ``1000ba``, ``512000sp`` (samples), ``0.5dur`` (a share of the run), and, between two events, ``600sec``. A
number alone counts epochs. Composer's own grammar takes one in quotes for seconds, and has units that nothing counts.
"""

import math
import re
from typing import Annotated, Any

from rae.config.values import Checked

LASTING = ("ep", "ba", "sp")
"""Units in which a run's length is told."""
POINT = (*LASTING, "dur")
"""Units of a point in a run."""
SPAN = (*POINT, "sec")
"""Units of the time between two events."""
_WRITTEN = re.compile(r"(?P<value>-?\d+(\.\d*)?(e[+-]?\d+)?)(?P<unit>|ep|ba|sp|dur|sec|tok|iter)")


def parse_time(value: Any, units: tuple[str, ...] = POINT, least: float = 0.0) -> str:
    """A time as it is written in configurations, checked and in one form: ``2``, ``"2"`` and ``2ep`` are ``2ep``.

    Args:
        units: those that can be counted where it stands.
        least: the smallest value; one that is no whole number is for ``dur`` alone.

    Raises:
        ValueError: it is no time, or of another unit.
    """
    told = f"write it in {', '.join(units)}"
    text = str(value).strip().lower() if isinstance(value, int | float | str) and not isinstance(value, bool) else ""
    found = _WRITTEN.fullmatch(text)
    if not found:
        raise ValueError(f"{value!r} is not a time such as '8ep', '1000ba'; {told}")
    number, unit = float(found["value"]), found["unit"] or "ep"
    if unit not in units:
        raise ValueError(f"{value!r}: {unit} is not counted here; {told}")
    if unit == "dur":
        if not least <= number <= 1:
            raise ValueError(f"{value!r}: a share of the run is between {least:g} and 1")
        return f"{number:g}dur"
    if not number.is_integer():
        raise ValueError(f"{value!r}: there are whole {unit} only; {told}")
    if number < least:
        raise ValueError(f"{value!r} must be more than 0")
    return f"{int(number)}{unit}"


def read_time(time: str) -> tuple[float, str]:
    """Value and unit of a time that :func:`parse_time` has written."""
    found = _WRITTEN.fullmatch(time)
    assert found is not None, time
    return float(found["value"]), found["unit"]


def in_steps(
    time: str, steps_per_epoch: int | None, batch_size: int | None = None, end: int | None = None
) -> int | None:
    """How many steps are finished at a time; None where its unit does not tell.

    Args:
        end: steps of the whole run, of which ``dur`` is a share.
    """
    value, unit = read_time(parse_time(time, SPAN))
    if unit == "sp" and batch_size is not None:
        return math.ceil(value / batch_size)
    length = {"ba": 1, "ep": steps_per_epoch, "dur": end}.get(unit)
    return None if length is None else math.ceil(value * length)


TimeString = Annotated[str, Checked(parse_time, before=True), "time"]
"""Annotation of a plugin argument that is a point in training time; ``0ep`` is its beginning."""
Interval = Annotated[str, Checked(lambda value: parse_time(value, SPAN, 1e-9), before=True), "time"]
"""Annotation of a plugin argument that is the time between two events."""
StepTime = Annotated[str, Checked(lambda value: parse_time(value, ("ep", "ba")), before=True), "time"]
"""Annotation of a schedule's argument, which counts steps."""
