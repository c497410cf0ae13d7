"""The screen of a run shows what a user needs; everything, and that, is in run.log."""

import logging
import os
import subprocess
import sys

import pytest
from conftest import environment
from tsfm.console import LogFile

RUN = """
import logging, os, sys, warnings
logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
library = logging.getLogger("a.library")
library.propagate = False
library.addHandler(logging.StreamHandler(sys.stdout))
from tqdm import tqdm
from tsfm.console import FOR_THE_LOG, quiet
from tsfm.errors import CaseWarning
folder = sys.argv[1]
quiet(folder)
logging.getLogger("tsfm.training.curve").info("epoch 1/2: loss 0.5")
logging.getLogger("tsfm.network.cpu").info("a processor's defect is mended", extra=FOR_THE_LOG)
if "make" in sys.argv:
    os.mkdir(folder)
library.info("settings: 1")
logging.getLogger("ignite").warning("deprecated")
warnings.warn("tilted gantry", CaseWarning)
warnings.warn("old numpy", FutureWarning)
for _ in tqdm(range(2), desc="training"):
    pass
logging.getLogger("tsfm.inference").error("case_1: empty file")
library.error("out of memory")
library.error("Engine run is terminating due to exception: full disk.")
print("liver 3 ml")
"""


@pytest.fixture
def run(tmp_path):
    def start(*words, **more):
        settings = {**environment(), "PYTHONWARNINGS": "default", **more}
        command = [sys.executable, "-c", RUN, str(tmp_path / "out"), *words]
        done = subprocess.run(command, env=settings, capture_output=True, encoding="utf-8", check=True)
        return done.stdout, done.stderr, tmp_path / "out" / "run.log"

    return start


def test_the_screen_shows_what_a_user_needs_and_the_log_everything(run):
    out, error, log = run("make")
    assert out.splitlines() == [
        "epoch 1/2: loss 0.5", "Warning: tilted gantry", "Error: case_1: empty file", "Error: out of memory", "liver 3 ml",
    ]  # fmt: skip
    assert error == ""
    text = log.read_text()
    assert all(
        word in text
        for word in ("out make", "epoch 1/2", "settings: 1", "deprecated", "old numpy", "tilted", "defect", "full disk")
    )
    assert "WARNING ignite: deprecated" in text and "training:" not in text


def test_a_name_in_another_encoding_stops_no_log(tmp_path):
    log = LogFile(tmp_path)
    log.handle(logging.LogRecord("tsfm", logging.INFO, "", 0, os.fsdecode(b"m\xfcller: done"), None, None))
    assert (tmp_path / "run.log").read_text().endswith("m\\udcfcller: done\n")


def test_a_run_that_makes_no_folder_leaves_no_log_and_other_processes_say_only_warnings(run):
    assert not run()[2].exists()
    out, _, log = run("make", RANK="1")
    assert "epoch" not in out and "tilted gantry" in out and os.listdir(log.parent) == []


def test_a_second_run_in_the_process_logs_in_its_own_folder(tmp_path, monkeypatch):
    code = RUN.replace(
        "print(", "quiet(folder + '/second'); os.mkdir(folder + '/second'); library.info('again'); print("
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out"), "make"]
    subprocess.run(command, env=environment(), capture_output=True, check=True)
    first, second = (tmp_path / "out" / name for name in ("run.log", "second/run.log"))
    assert "again" not in first.read_text() and "again" in second.read_text() and "epoch" not in second.read_text()
