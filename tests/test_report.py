"""Tables against numbers worked out by hand or printed in the paper; pictures against where things must appear."""

import csv
import json
import statistics

import matplotlib.image
import nibabel as nib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from tsfm.__main__ import evaluate
from tsfm.evaluation import overlays
from tsfm.evaluation import pages as report
from tsfm.evaluation.evaluation import evaluate_folder
from tsfm.evaluation.tables import load_rows, markdown_scores, summarize, table1
from tsfm.labels import LabelTable
from tsfm_tools.paper import tables
from tsfm_tools.paper.grid_files import Grid

TARGETS = {"liver": {}, "liver_tumor": {"inside": "liver"}, "kidney": {}, "kidney_tumor": {"inside": "kidney"}}
DATASETS = [
    {"name": "lits", "labels": {"1": "liver", "2": "liver_tumor"}, "ignore": [7]},
    {"name": "kits", "labels": {"1": "kidney", "2": "kidney_tumor"}},
]


@pytest.fixture(scope="module")
def table():
    return LabelTable(TARGETS, DATASETS)


def row(dataset, case, target, dice, **more):
    entry = {"dataset": dataset, "case": case, "target": target, "dice": dice, "nsd": dice, "tolerance_mm": 2.0}
    entry |= {"status": "ok" if dice is not None else "empty_truth", "volume_predicted_ml": 4.0, "volume_true_ml": 5.0}
    return {**entry, "lesions": [], **more}


def cells(markdown):
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if "---" not in line
    ]


def test_empty_truth_is_counted_apart_and_never_enters_a_mean():
    counts = {"lesions_true": 0, "lesions_found": 0, "lesions_missed": 0, "lesions_false": 3}
    hit = {"lesions_true": 4, "lesions_found": 3, "lesions_missed": 1, "lesions_false": 1}
    rows = [
        row("lits", "a", "liver_tumor", 0.5, **hit),
        row("lits", "b", "liver_tumor", 0.9, **hit),
        row("lits", "c", "liver_tumor", None, **counts),
        row("kits", "d", "kidney_tumor", None, volume_predicted_ml=0.0),
    ]
    summary = summarize(rows)
    tumor = summary["datasets"]["lits"]["liver_tumor"]
    assert (tumor["cases"], tumor["empty_truth"], tumor["empty_truth_predicted_ml"]) == (2, 1, 4.0)
    assert tumor["dice"]["mean"] == pytest.approx(0.7)
    assert tumor["dice"]["sd"] == pytest.approx(statistics.stdev([0.5, 0.9]))
    assert tumor["lesions"] == {
        "true": 8, "found": 6, "missed": 2, "false": 5, "sensitivity": 0.75, "false_per_case": pytest.approx(5 / 3)
    }  # fmt: skip
    assert summary["mean"]["dice"] == pytest.approx(0.7)
    assert summary["datasets"]["kits"]["kidney_tumor"]["dice"] is None
    assert summary["datasets"]["kits"]["kidney_tumor"]["empty_truth_clean"] == 1
    assert summary["cases"] == 4
    last = cells(markdown_scores(summary))[-1]
    assert last[:5] == ["kits: kidney_tumor", "0", "1", "-", "-"]


def test_targets_painted_where_there_are_none_are_counted_with_their_volumes():
    volumes = (0.0, 2.0, 0.0, 6.0, 0.0)
    rows = [row("flare", f"c{i}", "tumor", None, volume_predicted_ml=volume) for i, volume in enumerate(volumes)]
    rows += [row("flare", "sick", "tumor", 0.5)]
    summary = summarize(rows)
    found = summary["datasets"]["flare"]["tumor"]["false_positives"]
    assert (found["cases"], found["share"]) == (2, pytest.approx(0.4))
    assert (found["ml"]["median"], found["ml"]["max"]) == (4.0, 6.0)
    assert cells(markdown_scores(summary))[-1][-1] == "2/5 = 40% (4, 6)"
    everyone_sick = summarize([row("lits", "a", "tumor", 0.5)])
    assert everyone_sick["datasets"]["lits"]["tumor"]["false_positives"] == {"cases": 0, "share": None, "ml": None}
    assert cells(markdown_scores(everyone_sick))[-1][-1] == "-"


def test_table1_lists_data_sets_with_lesions_and_averages_over_the_lesions_alone():
    """The paper's own TSFM line: its tumor columns must give its .7106 (liver, kidney, pancreas and vessel left out)."""
    paper = {
        ("Liver", "liver"): 0.9619, ("Liver", "liver_tumor"): 0.6209, ("Lung", "lung_tumor"): 0.6391,
        ("Pancreas", "pancreas"): 0.8071, ("Pancreas", "pancreas_tumor"): 0.6535, ("HepaticVessel", "vessel"): 0.6426,
        ("HepaticVessel", "liver_tumor"): 0.7462, ("Colon", "colon_tumor"): 0.6620, ("KiTS2021", "kidney"): 0.9650,
        ("KiTS2021", "kidney_tumor"): 0.8608, ("Breast", "breast_tumor"): 0.7923, ("AMOS22", "spleen"): 0.95,
    }  # fmt: skip
    rows = [row(dataset, "c", target, dice) for (dataset, target), dice in paper.items()]
    lesions = {target for _, target in paper if target.endswith("tumor")}
    header, line = cells(table1(summarize(rows), lesions))
    assert line[0] == "TSFM" and header[-1] == "mean Dice for tumor"
    assert float(line[-1]) == pytest.approx(0.7106, abs=1e-4)
    assert "Liver: liver" in header and "AMOS22: spleen" not in header
    assert cells(table1(summarize(rows[-1:]), []))[0] == ["", "AMOS22: spleen", "mean Dice"]


def transfer():
    """A grid of two methods and a reference of another length, and three seeds of each but of the reference."""
    rows = [
        {"id": name, "name": name, "bundle": "b", "datasets": ["kits19"], "epochs": [10, 100], "seeds": [0, 1, 2]}
        for name in ("pretrained", "scratch")
    ]
    rows.append(
        {**rows[0], "id": "nnunet", "name": "nnU-Net", "epochs": [1000], "seeds": [0], "paper": {"kits19": [0.8454]}}
    )
    columns = [
        {"name": "kits19", "block": "kits19", "dataset": "kits19", "epochs": [10, 100, 1000], "targets": ["tumor"]}
    ]
    grid = {"title": "Transfer", "datasets": {"kits19": {"name": "kits19"}}, "columns": columns, "rows": rows}
    return Grid(grid, "bundles")


def results():
    entries = [
        {
            "row": name,
            "dataset": "kits19",
            "epochs": epochs,
            "seed": seed,
            "scores": {"kits19": {"tumor": base + seed / 100}},
        }
        for name, base in (("pretrained", 0.7), ("scratch", 0.2))
        for epochs in (100, 10)
        for seed in range(3)
    ]
    nnunet = {"row": "nnunet", "dataset": "kits19", "epochs": 1000, "seed": 0, "scores": {"kits19": {"tumor": 0.8}}}
    return [*entries, nnunet]


def test_table2_has_the_papers_shape_with_mean_and_spread_over_seeds(tmp_path):
    text = tables.write_tables(transfer(), results(), {}, tmp_path / "new", "table2")
    lines = [line for line in cells(text) if len(line) > 1]
    assert lines[0] == ["kits19", "10 epochs", "100 epochs", "1000 epochs", "paper"]
    assert lines[1] == ["pretrained", *["0.7100 ± 0.0100"] * 2, "-", "-"]
    assert lines[2][0] == "scratch"
    assert lines[3] == ["nnU-Net", "-", "-", "0.8000", "0.8454"]
    assert (tmp_path / "new/table2.md").read_text().strip() == text
    rows = load_rows(tmp_path / "new/table2.csv")
    assert [(row["row"], row["epochs"], row["seed"], row["dice"]) for row in rows] == [
        (result["row"], result["epochs"], result["seed"], result["scores"]["kits19"]["tumor"]) for result in results()
    ]
    tables.transfer_png(transfer(), results(), tmp_path / "table2.png")
    assert matplotlib.image.imread(tmp_path / "table2.png").std() > 0


def test_an_unfinished_grid_shows_what_there_is():
    some = [entry for entry in results() if entry["epochs"] == 10 and entry["seed"] == 0]
    lines = cells(tables.table(transfer(), [*some, {**some[0], "epochs": 100, "scores": {"kits19": {}}}], {}))
    assert ["pretrained", "0.7000", "not run", "-", "-"] in lines


def test_truth_is_painted_with_the_innermost_annotated_target(table):
    codes = np.array([0, 1, 2, 3])  # background, liver, tumor, ignored
    assert overlays.truth_map(codes, table, "lits").tolist() == [0, 1, 2, 0]
    assert overlays.truth_map(codes[:3], table, "kits").tolist() == [0, 3, 4]


def test_every_target_has_a_color_of_its_own_and_lesions_are_warm():
    organs = LabelTable({f"organ_{i}": {} for i in range(22)} | {"a_tumor": {}, "cyst": {"inside": "organ_0"}}, [])
    colors = overlays.colors_of(organs)
    assert len(set(colors.values())) == 24
    for value in (23, 24):
        red, _, blue = to_rgb(colors[value])
        assert red == 1 and blue < red


def body_with_marks(axcodes, spacing_spl=(4.0, 1.0, 2.0)):
    """A CT-like body with a mark on the patient's left front; the arrays stored with the given axes, and the affine."""
    shape = (10, 60, 40)
    image, truth = np.full(shape, -1000, np.float32), np.zeros(shape, np.uint8)
    image[:, 5:55, 4:36] = 40
    truth[3:6, 10:20, 26:34] = 1  # P small is anterior, L large is left
    start = nib.orientations.axcodes2ornt("SPL")
    turn = nib.orientations.ornt_transform(start, nib.orientations.axcodes2ornt(axcodes))
    s, p, l_ = spacing_spl
    affine = np.array([[0, 0, -l_, 40], [0, -p, 0, 30], [s, 0, 0, -20], [0, 0, 0, 1.0]])
    stored = [nib.orientations.apply_orientation(array, turn) for array in (image, truth)]
    return (*stored, affine @ nib.orientations.inv_ornt_aff(turn, shape))


@pytest.mark.parametrize("axcodes", ["SPL", "RAS", "LPS", "PIR", "ASL"])
def test_pictures_are_radiological_whatever_the_files_axes(axcodes, table, tmp_path):
    image, truth, affine = body_with_marks(axcodes)
    assert nib.aff2axcodes(affine) == tuple(axcodes)
    case = {"image": image, "truth": truth, "prediction": truth * 0, "affine": affine, "title": "cost $\\x$ of a case"}
    path = overlays.page_png(tmp_path / "x.png", [case], table)
    pixels = matplotlib.image.imread(path)[..., :3]
    width = pixels.shape[1] // 3
    blue = np.abs(pixels - to_rgb(overlays.colors_of(table)[1])).sum(-1) < 0.15
    rows, cols = np.nonzero(blue[: int(0.9 * len(blue)), width : 2 * width])
    assert len(rows) and not blue[: int(0.9 * len(blue)), 2 * width :].any()
    body = np.nonzero((np.ptp(pixels, axis=-1) < 0.02) & (np.abs(pixels[..., 0] - 0.5) < 0.02))
    top, bottom = np.percentile(body[0], (1, 99))
    assert cols.min() > 0.6 * width  # the patient's left is on the right
    assert rows.max() < (top + bottom) / 2  # and the front on top
    # the mark is 10 mm by 16 mm
    assert np.ptp(rows) / np.ptp(cols) == pytest.approx(10 / 16, abs=0.08)


def test_the_slice_shown_holds_what_matters(table):
    image, truth = np.zeros((40, 8, 8)), np.zeros((40, 8, 8), np.uint8)
    truth[2:20, 1:7, 1:7] = 1
    truth[11, 3, 3] = 2
    prediction = np.zeros_like(truth)
    prediction[37] = 3
    panels = {"image": image, "truth": truth, "prediction": prediction, "spacing": np.array([5.0, 1, 1])}
    assert overlays.informative_slice(panels) == 11
    assert overlays.informative_slice(panels, {1: 0, 2: 0, 3: 1}) == 37
    empty = {**panels, "truth": truth * 0, "prediction": truth * 0}
    assert overlays.informative_slice(empty) == 20


def test_best_median_and_worst_are_chosen_by_mean_dice():
    rows = [row("lits", str(n), target, dice - n / 10) for n in range(5) for target, dice in (("a", 0.9), ("b", 0.5))]
    chosen = report.choose_cases(rows)
    assert {name: entry["case"] for name, entry in chosen.items()} == {"best": "0", "median": "2", "worst": "4"}
    assert chosen["median"]["dice"] == pytest.approx(0.5)
    assert set(report.choose_cases(rows[:2])) == {"best"}
    assert report.choose_cases([row("lits", "x", "a", None)]) == {}


def evaluated_folder(table, tmp_path):
    """Three cases, the later the worse; label maps, scores and pool items."""
    items = []
    for number in range(3):
        image, truth, affine = body_with_marks("LPS")
        item = {"case": f"c{number}", "dataset": "lits"}
        for name, array in (("image", image), ("label", truth), ("out", np.roll(truth, 3 * number, axis=1))):
            path = tmp_path / name / f"c{number}.nii.gz"
            path.parent.mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(array, affine), path)
            item[name] = str(path)
        items.append(item)
    evaluate_folder(tmp_path / "out", items, table, tmp_path / "out")
    return items


def test_the_page_of_an_evaluated_folder_shows_three_cases(table, tmp_path):
    items = evaluated_folder(table, tmp_path)
    path = report.folder_page(tmp_path / "page.png", tmp_path / "out" / "cases.csv", tmp_path / "out", items, table)
    image, truth, affine = body_with_marks("LPS")
    case = {"image": image, "truth": truth, "prediction": truth, "affine": affine}
    one = overlays.page_png(tmp_path / "one.png", [case], table)
    assert matplotlib.image.imread(path).shape[0] > 2 * matplotlib.image.imread(one).shape[0]
    report.CasePage(str(tmp_path / "out"), items, table)(None)
    assert (tmp_path / "out" / "page.png").read_bytes() == path.read_bytes()
    assert (tmp_path / "out" / "targets.png").stat().st_size > 5000


def test_maps_in_raw_ids_give_the_same_page_and_other_values_none(table, tmp_path, caplog):
    items, out = evaluated_folder(table, tmp_path), tmp_path / "out"
    odd = LabelTable(TARGETS, [*DATASETS, {"name": "odd", "labels": {"300": table.names[0]}}])
    report.CasePage(str(out), items, odd)(None)
    pages = [(out / name).read_bytes() for name in ("page.png", "targets.png")]
    for path in out.glob("*.nii.gz"):
        plain = nib.load(path)
        nib.save(nib.Nifti1Image(np.asarray(plain.dataobj).astype(np.int16) * 300, plain.affine), path)
    report.CasePage(str(out), items, odd, raw_ids="odd")(None)
    assert [(out / name).read_bytes() for name in ("page.png", "targets.png")] == pages and not caplog.text
    report.CasePage(str(out), items, odd)(None)
    assert "holds values from 0 to 300" in caplog.text
    assert not list(out.glob("*.png")), "an earlier evaluation's pictures would be taken for this one's"
    report.CasePage(str(out), items, odd, raw_ids="odd", save="probabilities")(None)
    assert not list(out.glob("*.png")), "nor are its label maps this one's"


def test_the_worst_case_of_each_target_is_shown_with_that_target_alone():
    rows = [
        row("lits", case, target, dice)
        for case, a, b in (("x", 0.4, 0.9), ("y", 0.7, 0.2))
        for target, dice in (("a", a), ("b", b))
    ]
    worst = report.worst_cases([*rows, row("lits", "z", "c", None)])
    assert {target: (entry["case"], entry["dice"]) for target, entry in worst.items()} == {
        "a": ("x", 0.4),
        "b": ("y", 0.2),
    }


def test_the_command_that_scores_a_folder_draws_the_page_too(table, tmp_path, capsys):
    evaluated_folder(table, tmp_path)
    (tmp_path / "pool.json").write_text(json.dumps(table.to_dict()))
    folders = {
        "predictions": "out",
        "labels": "label",
        "images": "image",
        "pool_file": "pool.json",
        "output_dir": "scores",
    }
    evaluate(**{key: str(tmp_path / name) for key, name in folders.items()}, dataset="lits")
    assert (tmp_path / "scores/page.png").stat().st_size > 5000 and (tmp_path / "scores/scores.md").is_file()
    for path in (tmp_path / "label").iterdir():
        nib.save(nib.Nifti1Image(np.zeros((40, 60, 10), np.uint8), nib.load(path).affine), path)
    capsys.readouterr()
    evaluate(**{key: str(tmp_path / name) for key, name in folders.items()}, dataset="lits")
    printed = capsys.readouterr()
    assert "No page of pictures: no case has a Dice" in printed.err and "lits: liver" in printed.out
    assert not (tmp_path / "scores/page.png").exists()


def test_an_image_that_names_no_modality_is_ct_where_it_holds_air_or_fat():
    ramp = np.linspace(0, 1000, 1000).reshape(10, 10, 10)
    assert overlays._window(ramp - 1000, {}) == overlays.CT_WINDOW_HU == overlays._window(ramp, {"modality": "CT"})
    assert overlays._window(ramp, {}) == pytest.approx((11, 995), abs=2)


def test_a_page_that_cannot_be_drawn_is_only_reported(table, tmp_path, caplog):
    report.CasePage(str(tmp_path), [], table)(None)
    assert "No page of pictures" in caplog.text


def test_arrays_that_do_not_fit_are_an_error(table, tmp_path):
    image, truth, affine = body_with_marks("LPS")
    case = {"image": image, "truth": truth[:-1], "prediction": truth, "affine": affine}
    with pytest.raises(ValueError, match="truth has shape"):
        overlays.page_png(tmp_path / "no.png", [case], table)


def test_training_curves_come_from_the_runs_csv(tmp_path):
    with open(tmp_path / "curve.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", "lr", "loss", "val_dice", "ema", "dice_liver"])
        writer.writerows([[1, 0.1, 1.5, "", "", ""], [2, 0.1, 1.0, 0.4, 0.4, 0.4], [3, 0.1, 0.8, 0.5, 0.41, 0.5]])
    pixels = matplotlib.image.imread(report.curve_png(tmp_path / "curve.csv", tmp_path / "curve.png"))
    assert all(half.std() > 0.05 for half in np.split(pixels[:, : pixels.shape[1] // 2 * 2, :3], 2, axis=1))
