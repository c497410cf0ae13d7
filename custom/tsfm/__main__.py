"""The command line, ``python -m tsfm COMMAND``: what is not a bundle run. ``python -m tsfm COMMAND --help`` explains one."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import entry_points
from inspect import signature
from pathlib import Path
from typing import Any

import fire
from fire.decorators import SetParseFns
from fire.docstrings import parse

from .schema import nearest


def pool(
    pool_file: str,
    dataset_dir: str = ".",
    datasets: Sequence[str] | None = None,
    fold: int | str | None = None,
    output_file: str | None = None,
) -> None:
    """Print what a pool file finds below `dataset_dir`: data sets, cases, modalities, labels, targets, shares, missing.

    Args:
        pool_file: the JSON that declares data sets, as the pretraining bundle's configs/pool.json does the paper's ten.
        dataset_dir: folder that holds the data sets' folders.
        datasets: only these.
        fold: also print how many cases of each data set train and validate in this fold.
        output_file: also write the summary as JSON.
    """
    from .cases.pool import DatasetPool
    from .files import write_json

    found = DatasetPool(pool_file, dataset_dir, datasets, allow_missing=True)
    print(found.describe())
    if fold is not None:
        train, val = found.split(fold)
        for name in found.scan[0]:
            counts = [sum(item["dataset"] == name for item in part) for part in (train, val)]
            print(f"fold {fold}, {name}: {counts[0]} training and {counts[1]} validation cases")
    if output_file:
        write_json(output_file, found.summary())


def describe(checkpoint: str) -> None:
    """Print what travels with a weight file: network, targets, preparation, patch, what it was trained on."""
    import json

    from .names import counted
    from .training.checkpoint import read_description

    description = read_description(checkpoint)
    if cases := description.get("trained_cases"):
        description["trained_cases"] = counted(len(cases), "case")
    print(json.dumps(description, indent=4))


def evaluate(
    predictions: str,
    labels: str,
    pool_file: str,
    output_dir: str,
    dataset: str | None = None,
    tolerances_mm: float | dict[str, float] | None = None,
    images: str | None = None,
    raw_ids: str | None = None,
) -> None:
    """Score a folder of label maps against the truth: Dice, surface Dice and lesions over annotated targets only.

    Args:
        predictions: folder of label maps with values 1..N.
        labels: folder of label files of the same names.
        pool_file: the pool file, or ``dataset.json`` (MSD, nnU-Net), that says what the labels' ids mean.
        output_dir: for cases.csv, lesions.csv, summary.json and scores.md.
        dataset: the data set of the labels, where the pool file declares several.
        tolerances_mm: of the surface Dice, one number or target -> number.
        images: folder of NIfTI images of the same names; with it, page.png shows the best, median and worst case.
        raw_ids: the data set in whose own ids the predictions are (``brats2020`` for 1, 2, 4), in place of 1..N.
    """
    from .cases.dataset_folder import label_table
    from .evaluation.evaluation import evaluate_folder
    from .evaluation.label_maps import match_predictions
    from .evaluation.pages import folder_page

    shown = match_predictions(images, labels, dataset, "image") if images else []
    table = label_table(pool_file)
    evaluate_folder(predictions, labels, table, output_dir, dataset, tolerances_mm, raw_ids)
    page, rows = Path(output_dir, "page.png"), Path(output_dir, "cases.csv")
    page.unlink(missing_ok=True)  # an earlier evaluation's would be taken for this one's
    if shown:
        items = [
            {key: pair[key] for key in ("case", "dataset", "label")} | {"image": pair["prediction"]} for pair in shown
        ]
        try:
            folder_page(page, rows, predictions, items, table, dataset, raw_ids=raw_ids)
        except (ValueError, OSError) as error:
            print(f"No page of pictures: {error}", file=sys.stderr)
    with open(os.path.join(output_dir, "scores.md"), encoding="utf-8") as file:
        print(file.read())


def postprocessing(predictions: str, labels: str, pool_file: str, output_file: str, dataset: str | None = None) -> None:
    """Find nnU-Net's post-processing (keep largest components where that helps) on predictions of cross-validation.

    Give the file to inference with ``--postprocessing_plan``.

    Args:
        predictions: folder of label maps, as evaluate.json leaves them (values 1..N in the targets' order).
        labels: folder of label files of the same names.
        pool_file: the pool file, or ``dataset.json`` (MSD, nnU-Net), that says what the labels' ids mean.
        output_file: where the plan goes (JSON).
        dataset: the data set of the labels, where the pool file declares several.
    """
    from .cases.dataset_folder import label_table
    from .evaluation.label_maps import match_predictions
    from .evaluation.postprocessing_plan import determine
    from .files import check_writable, write_json
    from .names import counted

    check_writable(os.path.dirname(os.path.abspath(output_file)), "--output_file")
    table = label_table(pool_file)
    pairs = match_predictions(predictions, labels, dataset)
    plan = determine(pairs, table)
    write_json(output_file, plan)
    print(f"{counted(len(plan['steps']), 'step')}, written to {output_file}")


def curve(curve_file: str, output_file: str) -> None:
    """Draw loss and Dice over the epochs of a run.

    Args:
        curve_file: the run's curve.csv.
        output_file: the picture (PNG).
    """
    from .evaluation.pages import curve_png

    curve_png(curve_file, output_file)
    print(output_file)


def page(run_dir: str | None = None, evaluation_dir: str | None = None, output_file: str | None = None) -> None:
    """Draw the page of a run again: curves, plan, scores, pictures, worst cases, command, all in one index.html.

    Args:
        run_dir: the output_dir of the training.
        evaluation_dir: the output_dir of an evaluation of its weights.
        output_file: by default index.html in `run_dir`, or else in `evaluation_dir`.
    """
    from .evaluation.run_page import run_page

    print(run_page(run_dir, evaluation_dir, output_file))


COMMANDS = {function.__name__: function for function in (pool, describe, evaluate, postprocessing, curve, page)}


def commands() -> dict[str, Callable[[], Callable[..., Any]]]:
    """Name -> what loads the function: the package's own, and those that installed packages add (``tsfm.commands``).

    They are loaded one by one: most import torch, which takes a second.
    """
    added = {entry.name: entry.load for entry in entry_points(group="tsfm.commands")}
    return added | {name: partial(COMMANDS.get, name) for name in COMMANDS} | {"plan": _plan}


def _plan() -> Callable[..., Any]:
    from .planning.forecast import plan

    return plan


def _wrong(function: Callable[..., Any], words: Sequence[str]) -> str:
    """What no option of a command is, which fire would say after its work, or what it cannot do without and is not given:
    ``needs --name (what it is)``; nothing where the words ask for help."""
    flags = [word for word in words if word.startswith("-") and not word[1:2].isdigit()]
    if any(flag in ("--", "--help") or not flag.startswith("--") for flag in flags):
        return ""
    given = [flag[2:].split("=")[0].replace("-", "_") for flag in flags]
    known = signature(function).parameters
    if all(one.kind is not one.VAR_KEYWORD for one in known.values()):
        for name in given:
            if not {name, name.removeprefix("no")} & known.keys():
                return f"has no option --{name}{nearest(name, known)}"
    before = zip(["", *words], words, strict=False)
    plain = [word for last, word in before if word not in flags and (last not in flags or "=" in last)]
    required = [name for name, one in known.items() if one.default is one.empty and one.kind < 2 and name not in given]
    about = {one.name: (one.description or "").rstrip(".") for one in parse(function.__doc__ or "").args or ()}
    missing = [f"--{name} ({about.get(name, name)})" for name in required[len(plain) :]]
    return f"needs {' and '.join(missing)}" if missing else ""


def _as_said(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same command, whose texts stay texts: fire would make "LiTS, KiTS19" a tuple, and 2024 a number."""
    read = {"str": str, "str | None": lambda text: None if text == "None" else text}
    texts = {key: one.annotation for key, one in signature(function).parameters.items() if one.annotation in read}
    return SetParseFns(**{key: read[annotation] for key, annotation in texts.items()})(function)


def main() -> None:
    """Run one command; an error the user can mend is one message, not a traceback."""
    from .errors import end_plainly

    end_plainly()
    found, asked = commands(), sys.argv[1:2]
    names = asked if asked and asked[0] in found else found
    try:
        functions = {name: found[name]() for name in names}
        if names is asked and (wrong := _wrong(functions[asked[0]], sys.argv[2:])):
            sys.exit(f"tsfm: {asked[0]} {wrong}; all options: python -m tsfm {asked[0]} --help")
        fire.Fire({name: _as_said(function) for name, function in functions.items()}, name="tsfm")
    except (ValueError, OSError) as error:
        sys.exit(f"tsfm: {error}")


if __name__ == "__main__":
    main()
