"""The paper's tables as grids: what they declare, what runs, what is marked, and one row of each table for real, tiny."""

import copy
import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from tsfm.network.networks import STUNet
from tsfm.network.prompted import SAMMed3D
from tsfm.options import OptionError
from tsfm.schema import FileError, read_json
from tsfm.training.checkpoint import save_weights
from tsfm.training.weight_files import CheckpointError
from tsfm_tools.paper import commands, grids
from tsfm_tools.paper.grid_files import Grid
from tsfm_tools.paper.tables import figures, is_scored, table
from tsfm_tools.phantoms import layouts as phantoms

TABLES = ("table1", "table2", "table3")
FILES = Path(commands.__file__).parent
TARGETS = ("liver", "liver_tumor", "lung_tumor", "pancreas", "pancreas_tumor", "hepatic_vessel", "colon_tumor", "kidney",
           "kidney_tumor", "breast_tumor", "spleen", "whole_tumor", "tumor_core", "enhancing_tumor")  # fmt: skip


def content(name):
    return read_json(FILES / f"{name}.json")


def cells(text):
    """Row name -> cells, of all blocks of a Markdown table one after the other."""
    found = {}
    for line in text.splitlines():
        if line.startswith("| ") and "---" not in line:
            name, *rest = (cell.strip() for cell in line.strip("|").split("|"))
            found.setdefault(name, []).extend(rest)
    return found


@pytest.fixture
def stubbed(monkeypatch, tmp_path):
    """(calls, data folder, output folder): runs leave what a bundle leaves, and nothing is trained."""
    calls = []

    def run_bundle(bundle, configs, **options):
        calls.append((Path(options["output_dir"]), list(configs), options))
        folder = Path(options["output_dir"])
        folder.mkdir(parents=True, exist_ok=True)
        if configs[0] == "train.json":
            (folder / "model.pt").write_text("weights")
            return
        declared = Path(bundle) / "configs" / ("pool.json" if Path(bundle).name == "tsfm_pretrain" else configs[-1])
        pool = options.get("pool_file") or read_json(declared).get("pool_file") or read_json(declared)
        names = [entry["name"] for entry in pool["datasets"]]
        scores = {name: {target: {"dice": {"mean": 0.5}} for target in TARGETS} for name in names}
        (folder / "summary.json").write_text(json.dumps({"datasets": scores}))

    def prompted_scores(weights, pool, **chosen):
        calls.append((Path(weights), [], chosen))
        return {name: dict.fromkeys(TARGETS, 0.75) for name in pool.entries}

    monkeypatch.setattr(grids, "run_bundle", run_bundle)
    monkeypatch.setattr(grids, "prompted_scores", prompted_scores)
    monkeypatch.setattr(grids, "write_stunet", lambda path, target: target)
    monkeypatch.setattr(grids, "pretrained_description", lambda path: {})
    monkeypatch.setattr(grids, "find_spec", lambda name: name)
    data = tmp_path / "data"
    for name in TABLES:
        grid = Grid(content(name), ROOT / "bundles")
        for key, entry in grid.datasets.items():
            for part in (grid.pools[key] or {"datasets": [{"folder": "."}]})["datasets"]:
                (data / entry.get("folder", ".") / part["folder"]).mkdir(parents=True, exist_ok=True)
    for weights in ("stunet_h", "sam_med3d"):
        (tmp_path / weights).touch()
    return calls, data, tmp_path / "out"


def run(name, data, out, **options):
    return getattr(commands, name)(str(data), str(out), bundles_dir=str(ROOT / "bundles"), **options)


# ---- what is declared -------------------------------------------------------------------------------------------------


def test_the_papers_means_are_those_of_its_tumor_columns():
    for row in (row for row in content("table1")["rows"] if "paper" in row):
        tumors = [figure for name, figure in row["paper"].items() if name.endswith(": tumor")]
        assert len(tumors) == 7
        assert np.mean(tumors) == pytest.approx(row["paper"]["mean Dice for tumor"], abs=1.1e-4)


def test_table_3_begins_with_table_2_at_100_epochs():
    pretrained = {row["id"]: row for row in content("table2")["rows"]}["tsfm-pretrained"]
    first = content("table3")["rows"][0]
    assert first["id"] == pretrained["id"] and first["weights"] == pretrained["weights"]
    assert first["paper"] == {name: figures[-1] for name, figures in pretrained["paper"].items()}


def test_what_the_notes_say_of_the_papers_claims_follows_from_its_figures():
    one = {row["id"]: row.get("paper") for row in content("table1")["rows"]}
    assert one["tsfm"]["mean Dice for tumor"] - one["nnunet"]["mean Dice for tumor"] == pytest.approx(0.0454)
    behind = [name for name in one["tsfm"] if one["tsfm"][name] < one["nnunet"][name]]
    assert behind == ["Liver: liver", "Pancreas: pancreas", "KiTS2021: kidney", "KiTS2021: tumor"]
    two = {row["id"]: row.get("paper") for row in content("table2")["rows"]}
    ours, theirs = two["tsfm-pretrained"], {name: figures[0] for name, figures in two["nnunet"].items()}
    assert np.mean([ours[name][3] - theirs[name] for name in ours]) == pytest.approx(0.0056, abs=5e-5)
    assert [name for name in ours if ours[name][2] < theirs[name]] == ["BraTS2020", "KiTS2019"]
    for name in TABLES:
        shown = table(Grid(content(name), ROOT / "bundles"), [], {})
        assert all(f"- {note}" in shown for note in content(name)["notes"])


# ---- what runs ----------------------------------------------------------------------------------------------------------


def test_every_row_runs_once_and_fills_its_cells(stubbed, tmp_path):
    calls, data, out = stubbed
    texts = {
        "table1": run("table1", data, out, weights={name: str(tmp_path / name) for name in ("sam_med3d", "stunet_h")}),
        "table2": run("table2", data, out, weights={"stunet_h": str(tmp_path / "stunet_h")}),
        "table3": run("table3", data, out),
    }
    assert not [name for name, text in texts.items() if "not run" in text.lower()]
    trained = [folder.name for folder, configs, _ in calls if configs[:1] == ["train.json"]]
    assert len(trained) == len(set(trained)) == (7 + 7 + 1 + 1) + 3 * (4 * 4 + 1) + 3 * 2 + 2
    assert trained.count("tsfm-pool-1000epochs-seed0") == 1, "the pretraining serves all three tables"
    one = next(options for folder, _, options in calls if folder.name == "nnunet-msd_liver-1000epochs-seed0")
    assert one["pool_file"]["targets"].keys() == {"liver", "liver_tumor"} and one["epochs"] == 1000
    two = next(options for folder, _, options in calls if folder.name == "tsfm-pancreas-kits2019-100epochs-seed0")
    assert two["pretrained"] == str(out / "cells/tsfm-msd_pancreas-1000epochs-seed0/model.pt")
    assert cells(texts["table1"])["TSFM on the pool"][:4] == ["0.5000", "0.9619", "0.5000", "0.6209"]
    assert cells(texts["table1"])["SAM-Med3D (prompted with ground-truth clicks)"][-2:] == ["0.7500", "0.5030"]
    assert cells(texts["table2"])["nnU-Net"][:10] == ["-"] * 8 + ["0.5000", "0.5553"]
    count = len(calls)
    assert run("table3", data, out) == texts["table3"] and len(calls) == count, "what is done is not run again"
    assert run("table3", data, out, run=False) == texts["table3"]
    rows = list(csv.DictReader((out / "table3.csv").open()))
    assert {row["row"] for row in rows} == {"tsfm-pretrained", "tsfm-amos22", "tsfm-pancreas"}
    assert (out / "table2.png").stat().st_size > 5000


def test_a_folder_of_tables_may_be_moved(stubbed):
    calls, data, out = stubbed
    text = run("table3", data, out)
    count = len(calls)
    out.rename(out.with_name("elsewhere"))
    assert run("table3", data, out.with_name("elsewhere")) == text and len(calls) == count


def test_one_number_of_epochs_one_seed_and_one_overlay_need_no_list(stubbed, tmp_path, monkeypatch):
    calls, data, out = stubbed
    monkeypatch.chdir(ROOT / "bundles/tsfm_finetune")
    grid = {"epochs": 3, "seeds": 1, "overlays": "kits2019.json", "bundle_dir": "."}
    commands.transfer_table(str(tmp_path / "stunet_h"), str(data / "kits19/data"), str(out), **grid)
    trained = {folder.name: configs for folder, configs, _ in calls if configs[0] == "train.json"}
    configs = ["train.json", "kits2019.json"]
    assert trained == {"pretrained-3epochs-seed1": configs, "scratch-3epochs-seed1": configs}


def test_runs_have_the_pool_file_of_their_data_set(stubbed):
    _, data, out = stubbed
    grid = content("table1")
    grid["datasets"]["pool"]["pool_file"] = "tsfm_pretrain/configs/demo_pool.json"
    grid["rows"], grid["columns"] = [row for row in grid["rows"] if row["id"] == "tsfm"], grid["columns"][:1]
    del grid["rows"][0]["paper"]
    runner = grids.GridRunner(Grid(grid, ROOT / "bundles"), data, out, settings={"datasets": ["msd_liver"]})
    options = runner._options(runner.runs[0])
    assert options["pool_file"] == read_json(ROOT / "bundles/tsfm_pretrain/configs/demo_pool.json")
    assert set(options) & set(grids.EVALUATED) == {"pool_file", "datasets"}


def test_a_table_of_published_weights_alone_takes_their_options(stubbed, tmp_path):
    calls, data, out = stubbed
    grid = content("table1")
    grid["rows"] = [row for row in grid["rows"] if row["id"] == "sam_med3d"]
    (tmp_path / "mine.json").write_text(json.dumps(grid))
    weights = {"sam_med3d": str(tmp_path / "sam_med3d")}
    run("table1", data, out, grid=str(tmp_path / "mine.json"), weights=weights, device="cpu", fold=1)
    assert [chosen for *_, chosen in calls] == [{"seed": 0, "device": "cpu", "fold": 1}] * 7


def test_seeds_show_their_spread_and_an_interrupted_table_shows_what_there_is(stubbed, tmp_path, monkeypatch):
    _, data, out = stubbed
    grid = content("table3")
    grid["rows"] = grid["rows"][:1]
    grid["rows"][0]["seeds"] = [0, 1]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(grid))
    done = grids.run_bundle

    def until(bundle, configs, **options):
        if "kits2019" in options["output_dir"]:
            raise KeyboardInterrupt
        done(bundle, configs, **options)

    monkeypatch.setattr(grids, "run_bundle", until)
    with pytest.raises(KeyboardInterrupt):
        run("table3", data, out, grid=str(path))
    assert cells((out / "table3.md").read_text())["the pool"] == [
        *("0.5000 ± 0.0000", "0.5571", "not run", "0.8503", "not run", "0.9437")
    ]


def test_scores_of_a_pool_fill_the_columns_of_their_own_data_sets_only():
    grid = Grid(content("table1"), ROOT / "bundles")
    row = next(row for row in grid.rows if row["id"] == "tsfm")
    of_one = {"row": "tsfm", "dataset": "pool", "epochs": 1000, "seed": 0}
    of_one["scores"] = {"msd_liver": {"liver": 0.95, "liver_tumor": 0.61}}
    filled = {column.name: figures(grid, row, column, [of_one]) for column in grid.columns}
    assert {name: found for name, found in filled.items() if found} == {
        "Liver: liver": {0: 0.95}, "Liver: tumor": {0: 0.61}
    }  # fmt: skip
    grid = Grid(content("table2"), ROOT / "bundles")
    alone = {
        "row": "nnunet",
        "dataset": "kits2019",
        "epochs": 1000,
        "seed": 0,
        "scores": {"data": {"kidney_tumor": 0.5}},
    }
    row = next(row for row in grid.rows if row["id"] == "nnunet")
    shown = {column.name for column in grid.columns if figures(grid, row, column, [alone])}
    assert shown == {"KiTS2019"}, "whatever the folder calls it"
    assert [is_scored(grid, row, column, [alone]) for column in grid.columns if column.epochs == 1000] == [
        False,
        True,
        False,
    ]


def test_a_mean_after_so_many_epochs_is_over_figures_after_as_many():
    grid = content("table2")
    names = [column["name"] for column in grid["columns"]]
    grid["columns"].append({"name": "mean", "block": "mean", "mean_of": names, "epochs": [10, 20, 30]})
    grid = Grid(grid, ROOT / "bundles")
    row = {"row": "nnunet", "seed": 0}
    results = [
        {**row, "dataset": dataset, "epochs": epochs, "scores": {"data": dict.fromkeys(TARGETS, epochs / 100)}}
        for dataset in ("brats2020", "kits2019", "abdomenct1k")
        for epochs in (10, 20)
    ]
    found = {c.epochs: figures(grid, {"id": "nnunet"}, c, results) for c in grid.columns if c.name == "mean"}
    assert found == {10: {0: pytest.approx(0.1)}, 20: {0: pytest.approx(0.2)}, 30: {}}


# ---- what is marked -----------------------------------------------------------------------------------------------------


def test_rows_without_package_data_or_weights_are_marked_with_the_reason_and_the_others_run(stubbed, monkeypatch):
    _, data, out = stubbed
    monkeypatch.setattr(grids, "find_spec", lambda name: None if name == "dynamic_network_architectures" else name)
    os.rmdir(data / "kits19/data")
    text = run("table2", data, out)
    table = cells(text)
    assert table["nnU-Net"][8:10] == ["not run", "0.5553"] and table["STU-Net-H, pretrained"][0] == "not run"
    assert table["TSFM, pretrained"][0] == "0.5000" and table["TSFM, pretrained"][10] == "not run"
    assert "pip install --no-deps dynamic-network-architectures" in text
    assert f"Not run, no data ({data / 'kits19/data'}): TSFM, pretrained on KiTS2019, TSFM, from scratch" in text
    assert "no weights 'stunet_h' (huge_ep4k.model; --weights" in text


# ---- what is refused, before anything runs ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"learning_rat": 0.1}, OptionError, "learning_rate"),
        ({"iterations_per_epoch": 0}, OptionError, "iterations_per_epoch"),
        ({"epochs": 3}, OptionError, "--epochs: the grid"),
        ({"store_dir": "x"}, OptionError, "--store_dir: the grid"),
        ({"weights": "x.pt"}, OptionError, "--weights is 'x.pt'"),
        ({"overlays": ["gone.json"]}, FileError, "gone.json"),
        ({"overlays": "gone.json"}, FileError, "gone.json"),
        ({"weights": {"pol": "x.pt"}}, FileError, "did you mean 'pool'"),
        ({"weights": {"pool": "x.pt"}}, CheckpointError, "x.pt do not exist"),
        ({"weights": {"pool": "a#b.pt"}}, OptionError, "a#b.pt' has a #"),
        ({"bundles_dir": "/nowhere"}, FileError, "pool.json does not exist"),
        ({"grid": "/nowhere/table.json"}, FileError, "does not exist"),
    ],
)
def test_a_mistake_is_named_before_any_run(options, kind, message, tmp_path, monkeypatch):
    monkeypatch.setattr(grids, "run_bundle", None)
    given = {"bundles_dir": str(ROOT / "bundles"), **options}
    with pytest.raises(kind) as caught:
        commands.table2(str(tmp_path), str(tmp_path / "out"), **given)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda grid: grid["rows"][0].update(datasets=["kits2091"]), "did you mean 'kits2019'"),
        (lambda grid: grid["rows"][0].update(weights="amos"), "'amos', which is declared nowhere"),
        (lambda grid: grid["rows"][0]["paper"].update(Brats=0.5), "names the column 'Brats'"),
        (lambda grid: grid["rows"][0].pop("epochs"), "lacks a 'bundle' or its 'epochs'"),
        (lambda grid: grid["rows"][0].update(epoch=3), "'epoch' (did you mean 'epochs'?)"),
        (lambda grid: grid["rows"].append(grid["rows"][0]), "there twice"),
        (lambda grid: grid["columns"].append({"name": "mean", "mean_of": ["KiTS2019", "mean"]}), "a mean of itself"),
        (lambda grid: grid["rows"].append({"id": "x", "name": "x", "zero_shot": True, "datasets": ["pool"]}), "'file'"),
        (lambda grid: grid["datasets"]["amos22"].update(only=["amos"]), "['amos'], which"),
    ],
)
def test_a_grid_that_contradicts_itself_is_refused(change, message):
    grid = copy.deepcopy(content("table3"))
    change(grid)
    with pytest.raises(FileError) as caught:
        Grid(grid, ROOT / "bundles")
    assert message in str(caught.value)


# ---- for real, on phantoms ------------------------------------------------------------------------------------------------

SHORT = {"iterations_per_epoch": 2, "val_iterations": 1, "num_workers": 0, "device": "cpu", "checkpointing": False}
TINY_ROWS = {
    "tsfm": {key: value for key, value in TINY.items() if key.startswith(("network_def#", "patch_size", "spacing_mm"))},
    "nnunet": {"patch_size": [16, 32, 32], "spacing_mm": [8.0] * 3, "network_def#features": [4, 8, 8, 8], "batch_size": 2},
    "swinunetr": {"patch_size": [32, 32, 64], "spacing_mm": [10.0] * 3, "network_def#feature_size": 12, "batch_size": 2},
    "nnunet_pool": {"patch_size": [16, 32, 32], "spacing_mm": [8.0] * 3, "network_def#features": [4, 8, 8, 8]},
    "stunet-scratch": {"network_size": "stunet_s", "patch_size": [32, 32, 64], "spacing_mm": [10.0] * 3, "batch_size": 2},
    "stunet-pretrained": {"patch_size": [32, 32, 64], "spacing_mm": [10.0] * 3, "batch_size": 2},
}  # fmt: skip


def tiny_grid(name, folder, rows=None, datasets=None):
    """The grid file with few epochs per run, tiny networks, and of the rows those named, on `datasets`."""
    grid = content(name)
    grid["rows"] = [row for row in grid["rows"] if rows is None or row["id"] in rows]
    for row in grid["rows"]:
        row["datasets"] = datasets or row["datasets"]
    lengths = {epochs: number for number, epochs in enumerate((10, 20, 50, 100, 1000), 1)}
    for column in grid["columns"]:
        column |= {"epochs": [lengths[epochs] for epochs in column["epochs"]]} if "epochs" in column else {}
    for row in [*grid["rows"], *(entry["row"] for entry in grid["weights"].values() if "row" in entry)]:
        if "epochs" in row:
            row["epochs"] = (
                [lengths[epochs] for epochs in row["epochs"]] if name == "table2" else [1] * len(row["epochs"])
            )
        row["options"] = {**row.get("options", {}), **TINY_ROWS.get(row["id"], {})}
    path = folder / f"{name}.json"
    path.write_text(json.dumps(grid))
    return str(path)


def small_sam(folder):
    network = SAMMed3D(img_size=(32, 32, 32), width=48, depth=2, num_heads=2, global_layers=(1,))
    save_weights(network, folder / "sam_med3d.pt")
    return {"sam_med3d": str(folder / "sam_med3d.pt")}


def small_stunet(folder):
    network = STUNet(1, 105, features=[4, 8, 8, 8, 8, 8], depths_down=[1] * 6)
    state = {key.removeprefix("net."): value for key, value in network.state_dict().items() if key.startswith("net.")}
    torch.save({"state_dict": state}, folder / "small_ep4k.model")
    return {"stunet_h": str(folder / "small_ep4k.model")}


def test_rows_run_for_real(phantom_pool, tmp_path):
    pytest.importorskip("dynamic_network_architectures")
    pytest.importorskip("medim")
    grid = tiny_grid("table1", tmp_path, ("nnunet", "sam_med3d"), ["msd_liver"])
    text = run("table1", phantom_pool, tmp_path / "out", grid=grid, weights=small_sam(tmp_path), **SHORT)
    table = cells(text)
    assert "Not run" not in text and table["nnU-Net"][4] == "-"
    assert 0 <= float(table["nnU-Net"][0]) <= 1 and table["nnU-Net"][1] == "0.9621"
    assert 0 <= float(table["SAM-Med3D (prompted with ground-truth clicks)"][2]) <= 1


@pytest.mark.skipif(os.environ.get("TSFM_DOCS") != "all", reason="minutes: part of make test-docs")
@pytest.mark.parametrize("name", TABLES)
def test_every_row_of_every_table_runs_on_phantoms(name, tmp_path):
    data = tmp_path / "data"
    phantoms.write_all_ten(str(data), 5, (32, 48, 48))
    phantoms.write_brats2020(str(data / "MICCAI_BraTS2020_TrainingData"), 5)
    phantoms.write_kits19(str(data / "kits19/data"), 5)
    phantoms.write_abdomenct1k(str(data / "AbdomenCT-1K"), 5)
    weights = small_sam(tmp_path) if name == "table1" else {}
    if name != "table3":
        weights |= small_stunet(tmp_path)
    text = run(name, data, tmp_path / "out", grid=tiny_grid(name, tmp_path), weights=weights, **SHORT)
    assert "not run" not in text.lower(), text
