"""Streaming 0.13.0, beside other launches on one machine."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def agreeing(of_local_leader: Callable[[Any], Any]) -> Iterator[None]:
    """Inside this context the ranks of a machine number their shared memory as their leader does.

    In Streaming 0.13.0 every rank looks for the first free number by itself. Another launch that ends just then is seen
    by some of them and not by others, which then look for what nobody has registered.

    Args:
        of_local_leader: gives the leader's value to all of them; a collective call.
    """
    from streaming.base.shared import prefix

    look = prefix._check_and_find_retrying

    def agreed(*args: Any, **kwargs: Any) -> int:
        number, fault = 0, ""
        try:
            number = look(*args, **kwargs)
        except ValueError as error:
            fault = str(error)
        number, fault = of_local_leader((number, fault))
        if fault:
            raise ValueError(fault)
        return number

    prefix._check_and_find_retrying = agreed
    try:
        yield
    finally:
        prefix._check_and_find_retrying = look
