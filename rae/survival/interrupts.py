"""Ctrl-C and SIGTERM, from a process's first moment on: one line, and the exit code that a shell expects.

A run that trains has handlers of its own (:mod:`rae.survival.signals`), which save first.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from rae.adapters.composer import leave_signals_alone, silence_launcher

INTERRUPTED = "interrupted: the same command goes on where complete shards end"
"""What a conversion says."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Interruption:
    """Ends the process: by a KeyboardInterrupt, so that what is open is closed; at once if that would not end it."""

    def __init__(self, line: str, before: dict[int, Any]) -> None:
        self.line, self.before, self.owner, self.heard = line, before, os.getpid(), 0
        self.launches = self.said = False
        """Whether it is the launcher, which has ranks to wait for, that is interrupted."""

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.owner:  # a child that has no handler of its own yet
            os._exit(128 + number)
        # Inside an import, whoever imports may take it for a library that is missing; a second one is meant.
        if self.heard or _is_importing(frame):
            self.heard = self.heard or number
            self.end()
        self.heard = number
        if self.launches:
            silence_launcher(128 + number)
            raise KeyboardInterrupt
        self.watchdog = threading.Timer(_PATIENCE, self.end)
        self.watchdog.daemon = True
        self.watchdog.start()
        raise KeyboardInterrupt  # which may be lost, in a destructor, say

    def end(self) -> None:
        self.say()
        os._exit(128 + self.heard)

    def say(self) -> None:
        if os.environ.get("LOCAL_RANK", "0") == "0" and not self.said:
            self.said = True  # before it is: another signal may come in between
            os.write(2, f"{self.line}\n".encode())


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


_PATIENCE = 15.0
"""Seconds in which a process that was told to end has to have ended."""
_current: _Interruption | None = None


def heard() -> int:
    """The signal that has been heard and has not ended the process yet, or 0; whoever asks takes it over."""
    if _current is None or not _current.heard:
        return 0
    _current.watchdog.cancel()
    return _current.heard


def heed_interrupts(line: str = "interrupted") -> None:
    """From now on SIGINT and SIGTERM end the process with one line: to be called before anything heavy is imported.

    Args:
        line: what is said then.
    """
    global _current
    if threading.current_thread() is not threading.main_thread():
        return
    # What is interrupted leaves memory that Python's own tracker removes: no news for a user.
    ignored = "ignore:resource_tracker:UserWarning"
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), ignored]))
    _current = _Interruption(line, {number: signal.getsignal(number) for number in _SIGNALS})
    for number in _SIGNALS:
        signal.signal(number, _current)
    leave_signals_alone(_SIGNALS)


def heed_in_launcher() -> None:
    """Let the ``composer`` launcher end without a traceback and without a word when it is interrupted.

    Torch calls this in each process that imports it, as it would load a device's extension (entry points
    ``torch.backends``): before the launcher's own code there is no other place.
    """
    if sys.argv and sys.argv[0] and os.path.basename(sys.argv[0]) == "composer":
        heed_interrupts()
        if _current is not None:
            _current.launches = True


def run_interruptibly(main: Callable[[], None], line: str = "interrupted") -> None:
    """Run a program's main function; SIGINT and SIGTERM end it with one line, and with 130 or 143.

    Args:
        line: see :func:`heed_interrupts`, which may have been called already.
    """
    global _current
    if _current is None:
        heed_interrupts(line)
    interruption = _current or _Interruption(line, {})
    try:
        main()
    except KeyboardInterrupt:
        interruption.heard = interruption.heard or signal.SIGINT
        interruption.say()
        sys.exit(128 + interruption.heard)
    finally:
        if not interruption.heard:
            for number, handler in interruption.before.items():
                signal.signal(number, handler)
        _current = None
