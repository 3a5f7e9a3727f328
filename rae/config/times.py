"""Points and spans in training time, as Composer writes them: 8ep, 1000ba, 0.5dur."""

import math
from typing import Annotated, Any

from pydantic import BeforeValidator


def parse_time(value: Any) -> str:
    """Check a Composer time string (``8ep``, ``1000ba``, ``0.5dur``).

    Raises:
        ValueError: not a time string.
    """
    from composer import Time

    try:
        Time.from_timestring(value)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{value!r} is not a time such as '8ep', '1000ba' or '0.5dur'") from error
    return value


def in_steps(
    time: str, steps_per_epoch: int | None, batch_size: int | None = None, end: int | None = None
) -> int | None:
    """How many steps are finished at a Composer time string; None where its unit does not tell.

    Args:
        end: steps of the whole run, of which ``dur`` is a share.
    """
    from composer import Time

    parsed = Time.from_timestring(time)
    value, unit = parsed.value, parsed.unit.value
    if unit == "sp" and batch_size is not None:
        return math.ceil(value / batch_size)
    length = {"ba": 1, "ep": steps_per_epoch, "dur": end}.get(unit)
    return None if length is None else math.ceil(value * length)


TimeString = Annotated[str, BeforeValidator(parse_time), "time"]
"""Annotation of a plugin argument that is a point or span in training time."""
