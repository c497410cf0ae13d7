"""The benchmarks fit the code as it is: each script starts, and this project's side of those with a peer runs on little."""

from __future__ import annotations

import importlib.util
import itertools
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(p for p in ROOT.glob("benchmarks/**/*.py") if "ArgumentParser(" in p.read_text("utf-8"))


def module(name: str):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"benchmarks/{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_every_script_says_how_it_is_called(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    monkeypatch.syspath_prepend(str(script.parent))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0 and "usage:" in capsys.readouterr().out


def test_the_loader_of_load_augment_draws_its_batches(tmp_path):
    script = module("load_augment")
    script.prepare_tsfm(str(tmp_path), (24, 40, 40))
    for batch in itertools.islice(script.batches_tsfm(str(tmp_path), (16, 24, 24)), 2):
        assert batch["image"].shape == (script.BATCH, 1, 16, 24, 24)
        assert batch["image"].isfinite().all()
