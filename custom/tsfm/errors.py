"""The error a user can mend, from under those that MONAI wraps around it (they name only the config entry)."""

from __future__ import annotations

import sys
from types import TracebackType


def first_cause(error: BaseException) -> BaseException:
    """The exception that the chain of ``raise ... from ...`` began with."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def name_cause_last() -> None:
    """From now on the output of an uncaught error ends with its first cause; a bundle's ``initialize`` calls this."""
    sys.excepthook = _show


def _show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.__excepthook__(kind, error, trace)
    cause = first_cause(error)
    if cause is not error:
        print(f"\nThis run stopped because of\n{type(cause).__name__}: {cause}", file=sys.stderr, flush=True)
