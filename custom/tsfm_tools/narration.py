"""A long job's console: what runs, a bar, a result. All that libraries print goes to a log file."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

from tsfm.console import CLEAR


class Narrator:
    """Tells numbered steps on the screen; within `quiet`, output goes to the log, but bars to a terminal too.

    Args:
        log_path: the log file; more is appended to one that is there.
    """

    encoding = "utf-8"

    def __init__(self, log_path: str | Path) -> None:
        Path(log_path).parent.mkdir(parents=True, exist_ok=True)
        self.log = open(log_path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (logging may write to it until the end)
        self.screen, self.started, self.steps = sys.stdout, time.perf_counter(), 0
        self.bars = self.screen.isatty()
        self.screen.write(f"Warnings and details: {log_path}\n")

    def step(self, title: str, command: str) -> None:
        """Announce a step, with the command that does the same."""
        self.steps += 1
        self.say(f"\n[{time.perf_counter() - self.started:3.0f} s] {self.steps}. {title}", indent="")
        self.say(f"$ {command}")

    def say(self, text: str, indent: str = "  ") -> None:
        """Lines of text to screen and log."""
        text = "\n".join(indent + line for line in text.split("\n")) + "\n"
        self.screen.write((CLEAR if self.bars else "") + text)
        self.screen.flush()
        self.log.write(text)

    def end(self, text: str) -> None:
        """The last words, with the time that all took."""
        self.say(f"\nDone in {time.perf_counter() - self.started:.0f} s. {text}", indent="")

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Send what is printed, logged and warned of within the block to the log."""
        loggers = [logging.root, *map(logging.getLogger, list(logging.root.manager.loggerDict))]
        for handler in [handler for logger in loggers for handler in logger.handlers]:  # these took their stream before
            if isinstance(handler, logging.StreamHandler) and handler.stream in (self.screen, sys.stdout, sys.stderr):
                handler.setStream(self)
        with redirect_stdout(self), redirect_stderr(self):
            yield

    def write(self, text: str) -> int:
        """What libraries print: a bar (it begins by going back in its line) to a terminal, everything else to the log."""
        if text.startswith("\r"):
            if self.bars:
                self.screen.write(CLEAR + "  " + text[1:])
                self.screen.flush()
        else:
            self.log.write(text)
        return len(text)

    def flush(self) -> None:
        """As a text stream."""
        self.screen.flush()

    def isatty(self) -> bool:
        """No: colors and cursor movements do not belong in a log."""
        return False
