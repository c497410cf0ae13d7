"""What a user can mend, said plainly: errors from under those that MONAI wraps around them, and interrupted runs."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Mapping
from types import FrameType, TracebackType
from typing import Any

from .options import check_options

OWN_MODULE = __package__

ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


class CaseError(ValueError):
    """A case that cannot be used; the message names the file, what was found, what was expected and what to do."""


class CaseWarning(UserWarning):
    """A case that is used although something about it looks wrong."""


class Stopped(KeyboardInterrupt):
    """A signal that asks the process to end; it goes up as an interrupt does, through everything that cleans up."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two records of settings, for a message: ``epochs: was 1, is 2``; empty where nothing does."""
    pairs = {key: (before.get(key), now.get(key)) for key in sorted({*before, *now})}
    return "; ".join(f"{key}: was {old}, is {new}" for key, (old, new) in pairs.items() if old != new)


def first_cause(error: BaseException) -> BaseException:
    """The exception under the RuntimeErrors that MONAI wraps around those of components and transforms."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def name_cause_last() -> None:
    """A bundle's ``initialize`` calls this: refuse mistyped options, and end the output of any error with its cause.

    Raises:
        OptionError: an option of ``python -m monai.bundle run``, or an id of an overlay, that the config files lack.
    """
    end_plainly()
    check_options(sys.argv)


def end_plainly() -> None:
    """End the output of any error with its cause; let SIGTERM and SIGHUP end this process as an interrupt does.

    Handlers that someone else set (a server's, nohup's) stay; processes that are forked from this one end at once.
    """
    sys.excepthook = _show
    if threading.current_thread() is not threading.main_thread():
        return
    owner = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        raise Stopped(number)

    for number in ENDING:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, stop)


def _show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    cause = first_cause(error)
    if isinstance(cause, KeyboardInterrupt):
        by = f" by {signal.Signals(cause.number).name}" if isinstance(cause, Stopped) else ""
        print(
            f"\nInterrupted{by}. What was finished is kept. The same command goes on after the last epoch, fold or run that was "
            "finished; inference does with --existing skip.",
            file=sys.stderr,
            flush=True,
        )
        if isinstance(cause, Stopped):
            sys.exit(128 + cause.number)  # as a shell counts; for SIGINT Python itself does so
        return
    in_own_words = _is_said_here(cause) or type(cause).__module__.split(".")[0] == OWN_MODULE
    if not in_own_words:  # else the way to it says nothing
        sys.__excepthook__(kind, error, trace)
    if in_own_words or cause is not error:
        print(f"\nThis run stopped because of\n{type(cause).__name__}: {cause}", file=sys.stderr, flush=True)


def _is_said_here(error: BaseException) -> bool:
    """Whether an OSError was raised by this package in words of its own: it has no number of the system's."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__"))
    return (
        isinstance(error, OSError)
        and error.errno is None
        and place.split(".")[0] in (OWN_MODULE, f"{OWN_MODULE}_tools")
    )
