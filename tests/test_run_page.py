"""A run on one page: what is in its files is on the page, the page needs no other file, and nothing in it is taken for HTML."""

import csv
import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from tsfm.__main__ import page
from tsfm.evaluation.run_page import RunPage, run_page
from tsfm.training.curve import write_csv


class Reader(HTMLParser):
    """Texts, tags and addresses of a page."""

    def __init__(self, path):
        super().__init__()
        self.text, self.tags, self.sources = "", [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data + " "


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "output"
    folder.mkdir()
    rows = [
        {"epoch": n, "loss": 1 / n, "val_mean_dice": n / 10, "ema": n / 10, "dice_liver": n / 10} for n in (1, 2, 3)
    ]
    write_csv(str(folder / "curve.csv"), rows)
    command = ["/x/monai/bundle/__main__.py", "run", "--config_file", "['a b.json']", "--epochs", "3"]
    pool = {"datasets": {"own": {"cases": 7, "annotated": ["liver", "<b>tumor</b>"]}}}
    record = {
        "command": command,
        "folder": "/data",
        "started": "2026-01-01",
        "pool": pool,
        "versions": {"torch": "2.13"},
    }
    (folder / "run.json").write_text(json.dumps(record))
    plan = {
        "patch_size": [96, 96, 96],
        "spacing_mm": [2.5, 0.84765625, 0.84765625],
        "parameters": 16_543_210,
        "note": None,
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "model.pt").write_bytes(b"weights")
    return folder


@pytest.fixture
def evaluation(tmp_path):
    folder = tmp_path / "evaluation"
    folder.mkdir()
    entry = {"cases": 2, "dice": {"mean": 0.75}, "nsd": None, "lesions": {"found": 3, "true": 4, "false": 1}}
    summary = {"cases": 2, "datasets": {"own": {"liver": entry}}, "protocol": {"mirrored along": "no axis"}}
    (folder / "summary.json").write_text(json.dumps(summary))
    with open(folder / "cases.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ("case", "dataset", "target", "dice", "volume_predicted_ml", "volume_true_ml"))
        writer.writeheader()
        writer.writerows({"case": f"case {n}", "dataset": "own", "target": "liver", "dice": n / 10} for n in (9, 4, 6))
    return folder


def test_the_page_of_a_run_shows_its_files_and_needs_none(run):
    found = Reader(run_page(run))
    assert all(source.startswith("data:image/png;base64,") for source in found.sources) and len(found.sources) == 1
    assert "3 epochs, last loss 0.333; Dice on patches of held-out cases (moving average) at best 0.300" in found.text
    text = re.sub(r"\s+", " ", found.text)
    assert "patch size [96, 96, 96] spacing mm [2.5, 0.8477, 0.8477] parameters 16.5 million" in text
    assert "cd /data && python -m monai.bundle run --config_file '['\"'\"'a b.json'\"'\"']' --epochs 3" in found.text
    assert "<b>tumor</b>" in found.text and "b" not in found.tags


def test_an_evaluation_joins_the_page_of_the_run_whose_weights_it_used(run, evaluation, tmp_path):
    shutil.copy(run / "model.pt", tmp_path / "published.pt")
    RunPage(str(run), str(evaluation), str(tmp_path / "published.pt"))(None)
    found = Reader(run / "index.html")
    assert "3 epochs" in found.text and "3 of 4, 1 false" in found.text and "mirrored along: no axis" in found.text
    worst = found.text[found.text.index("Worst cases") :]
    assert worst.index("case 4") < worst.index("case 6") < worst.index("case 9")
    (tmp_path / "published.pt").write_bytes(b"others!")
    RunPage(str(run), str(evaluation), str(tmp_path / "published.pt"))(None)
    assert "3 epochs" not in Reader(evaluation / "index.html").text


def test_the_command_draws_it_again_and_says_when_there_is_nothing(run, evaluation, tmp_path, capsys):
    page(str(run), str(evaluation), str(tmp_path / "again.html"))
    assert capsys.readouterr().out.strip() == str(tmp_path / "again.html")
    assert "3 epochs" in Reader(tmp_path / "again.html").text
    with pytest.raises(FileNotFoundError, match="expected the curve"):
        run_page(tmp_path)
    (run / "curve.csv").write_text("epoch,loss\n")
    (evaluation / "summary.json").write_text('{"mean": 1}')  # nnU-Net's has this name too
    assert "Curves" not in Reader(run_page(run, evaluation)).text
    (evaluation / "summary.json").write_text('{"datas')
    with pytest.raises(ValueError, match=r"summary\.json is not valid JSON"):
        run_page(run, evaluation)
