"""The benchmarks fit the code as it is: each script starts, and this project's side of those with a peer runs on little."""

from __future__ import annotations

import importlib
import itertools
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(p for p in ROOT.glob("benchmarks/**/*.py") if "ArgumentParser(" in p.read_text("utf-8"))


@pytest.fixture
def module(monkeypatch):
    """A script, by its name, as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_every_script_says_how_it_is_called(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    monkeypatch.syspath_prepend(str(script.parent))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0 and "usage:" in capsys.readouterr().out


def test_the_loader_of_load_augment_draws_its_batches(module, tmp_path):
    script = module("load_augment")
    script.prepare_tsfm(str(tmp_path), (24, 40, 40))
    for batch in itertools.islice(script.batches_tsfm(str(tmp_path), (16, 24, 24)), 2):
        assert batch["image"].shape == (script.BATCH, 1, 16, 24, 24)
        assert batch["image"].isfinite().all()


def test_the_peak_of_a_side_is_its_own_and_not_that_of_the_script_that_starts_it(module):
    sides = module("sides")
    before = sides.forget_peak()
    held = bytearray(2**28)
    assert sides.peak_gib() - before > 0.2
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import sides"]
    assert sides.answer(*command[:2], f"{command[2]}; print(sides.peak_gib())") < 0.1
    assert sides.peak_gib_of(command) < 0.1 and len(held) == 2**28


def test_sides_answer_in_turn_until_nobody_asks_any_more(module):
    sides = module("sides")
    start = f"import itertools, sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import sides; "
    calls = {n: [sys.executable, "-c", f"{start}sides.serve(itertools.count({n}).__next__)"] for n in (1, 5)}
    assert sides.in_turn(calls, 3) == {1: [1, 2, 3], 5: [5, 6, 7]}
