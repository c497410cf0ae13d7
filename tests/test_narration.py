"""The demo's console: its own lines on the screen, what libraries say in the log, bars on a terminal."""

import logging
import sys

from tqdm import tqdm
from tsfm.console import CLEAR
from tsfm_tools.narration import Narrator


def run(tmp_path, capsys, monkeypatch, terminal):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    early = logging.StreamHandler(sys.stdout)
    monkeypatch.setattr(logging.getLogger("of a library"), "handlers", [early])
    screen = Narrator(tmp_path / "out/demo.log")
    screen.step("Train", "python -m train")
    with screen.quiet():
        print("settings: 1")
        print("deprecated", file=sys.stderr)
        logging.StreamHandler(sys.stdout).emit(logging.makeLogRecord({"msg": "epoch 1"}))
        early.emit(logging.makeLogRecord({"msg": "input summary"}))
        for _ in tqdm(range(2), desc="training", mininterval=0):
            pass
    screen.say("Dice 0.9")
    screen.end("Look at page.png")
    return capsys.readouterr(), (tmp_path / "out/demo.log").read_text()


def test_the_screen_shows_steps_and_results_and_the_log_everything_else(tmp_path, capsys, monkeypatch):
    (shown, errors), log = run(tmp_path, capsys, monkeypatch, terminal=False)
    assert errors == "" and CLEAR not in shown
    lines = [line for line in shown.splitlines() if line]
    assert lines[1].endswith("1. Train") and lines[2:4] == ["  $ python -m train", "  Dice 0.9"]
    assert lines[-1].startswith("Done in") and len(lines) == 5
    assert all(text in log for text in ("settings: 1", "deprecated", "epoch 1", "input summary", "Dice 0.9"))


def test_a_terminal_shows_the_bar_too(tmp_path, capsys, monkeypatch):
    (shown, _), log = run(tmp_path, capsys, monkeypatch, terminal=True)
    assert "training: 100%" in shown and "training" not in log
