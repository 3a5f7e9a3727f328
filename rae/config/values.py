"""Values of numbers that plugins take: annotations for their signatures, checked before anything is built."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any


@dataclass(frozen=True)
class Checked:
    """A part of an ``Annotated`` type: a function of the value, which may raise a ValueError.

    Pydantic is asked for only when something is checked, so that what has such types needs no pydantic.

    Args:
        function: the value -> the value to be used.
        before: whether it comes before the type itself is checked.
    """

    function: Callable[[Any], Any]
    before: bool = False

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        """How pydantic checks it."""
        from pydantic_core import core_schema

        if self.before:
            return core_schema.no_info_before_validator_function(self.function, handler(source))
        return core_schema.no_info_after_validator_function(self.function, handler(source))


def _that(test: Callable[[Any], bool], told: str) -> Checked:
    def check(value: Any) -> Any:
        if not (math.isfinite(value) and test(value)):
            raise ValueError(f"must be {told}, not {value}")
        return value

    return Checked(check)


def _above_zero(value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{value} must be above 0; leave the entry out to turn it off")
    return value


Finite = Annotated[float, _that(lambda value: True, "a finite number"), "float"]
Positive = Annotated[float, _that(lambda value: value > 0, "above 0"), "float > 0"]
Threshold = Annotated[float, Checked(_above_zero), "float > 0"]
"""Of what a number turns on: 0 would be taken for off."""
NotNegative = Annotated[float, _that(lambda value: value >= 0, "0 or more"), "float >= 0"]
Decay = Annotated[float, _that(lambda value: 0 <= value < 1, "in [0, 1)"), "float in [0, 1)"]
Share = Annotated[float, _that(lambda value: 0 < value <= 1, "in (0, 1]"), "float in (0, 1]"]
Count = Annotated[int, _that(lambda value: value >= 1, "1 or more"), "int >= 1"]
Index = Annotated[int, _that(lambda value: value >= 0, "0 or more"), "int >= 0"]
