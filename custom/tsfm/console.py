"""The screen of a run: what runs, a bar, results, and warnings that a user can act on. All else that is said, by libraries
above all, goes to ``run.log`` in the run's folder."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import time
import warnings
from typing import Any, TextIO

CLEAR = "\r\x1b[K"  # to the start of the line, and delete it: a bar may stand there

OWN = ("tsfm", "tsfm_tools")
"""Loggers, and modules of warnings' classes, whose words are for the screen."""

LOG = "run.log"

ENDINGS = ("Engine run is terminating due to exception", "Current run is terminating due to exception")
"""How ignite begins its word about an exception, which the process ends with anyway."""

FOR_THE_LOG = {"for_the_log": True}
"""``extra`` of a record of this package about which a user can do nothing: it goes to the log alone."""


def quiet(output_dir: str | os.PathLike) -> None:
    """A bundle's ``initialize`` calls this: the screen for people, ``run.log`` in `output_dir` for everything.

    Of several processes (torchrun) the first alone writes and says more than warnings. The log is written as soon as
    something else has made the folder, so that a run that is refused leaves none. Called again, it begins another log.
    """
    first = int(os.environ.get("RANK", 0)) == 0
    log = LogFile(output_dir)
    root = logging.getLogger()
    loggers = [logging.getLogger(name) for name in list(root.manager.loggerDict)]
    speaking = [one for one in loggers if one.handlers and not one.propagate]
    if not any(_is_screen(handler) for handler in root.handlers):
        root.addHandler(logging.lastResort)
    for logger in [root, *speaking]:
        for handler in list(logger.handlers):
            if isinstance(handler, LogFile):
                handler.flush()
                logger.removeHandler(handler)
            elif _is_screen(handler) and handler.formatter is not SCREEN:
                handler.setFormatter(SCREEN)
                handler.addFilter(is_for_the_screen if first else is_warning)
        if first:
            logger.addHandler(log)
    for name in ("run", *OWN):
        if logging.getLogger(name).level == logging.NOTSET:
            logging.getLogger(name).setLevel(logging.INFO)
    warnings.showwarning = _log_warning
    if sys.stderr is sys.__stderr__ and not sys.stderr.isatty():
        sys.stderr = WithoutBars(sys.stderr)
    logging.getLogger("run").info("%s\n%s", time.strftime("%Y-%m-%d %H:%M:%S %z"), shlex.join(sys.argv))


def is_for_the_screen(record: logging.LogRecord) -> bool:
    """Whether a record is one of this package's, and not for the log alone, or says that something failed."""
    own = record.name.split(".")[0] in OWN and not getattr(record, "for_the_log", False)
    return own or (record.levelno >= logging.ERROR and not record.getMessage().startswith(ENDINGS))


def is_warning(record: logging.LogRecord) -> bool:
    """The same for processes other than the first, which repeat what the first one tells."""
    return is_for_the_screen(record) and record.levelno >= logging.WARNING


class Plain(logging.Formatter):
    """Messages without time and origin; what is more than information says so."""

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.capitalize()}: " if record.levelno >= logging.WARNING else ""
        bar = CLEAR if sys.stdout.isatty() or sys.stderr.isatty() else ""
        return f"{bar}{level}{super().format(record)}"


SCREEN = Plain()


class LogFile(logging.Handler):
    """Appends records to ``run.log`` in a folder, once that is there; a disk that is full spoils nothing.

    The file is open only while a record is written: it may be moved or removed, and processes that are forked share it.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        super().__init__()
        self.folder, self.waiting = os.path.abspath(folder), []
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record, and write all that were kept if the folder is there."""
        self.waiting.append(self.format(record) + "\n")
        self.flush()

    def flush(self) -> None:
        """The same, at the end of the process too."""
        if not self.waiting or not os.path.isdir(self.folder):
            return
        try:
            with open(os.path.join(self.folder, LOG), "a", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(self.waiting)
            self.waiting.clear()
        except OSError:
            pass


class WithoutBars:
    """A stream that leaves out progress bars, which begin by going back in their line: they fill the files of batch jobs."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.is_after_bar = stream, False

    def write(self, text: str) -> int:
        """As a text stream; the line break after a bar is left out with it."""
        self.is_after_bar = text.startswith("\r") or (self.is_after_bar and not text.strip())
        return len(text) if self.is_after_bar else self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _is_screen(handler: logging.Handler) -> bool:
    """Whether a handler writes to the terminal (or to what stands in its place), and is nobody's special one."""
    return handler is logging.lastResort or (
        type(handler) is logging.StreamHandler
        and handler.stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    )


def _log_warning(message: Any, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
    own = category.__module__.split(".")[0] in OWN
    text = str(message) if own else warnings.formatwarning(message, category, filename, lineno).rstrip()
    logging.getLogger(category.__module__ if own else "py.warnings").warning("%s", text)
