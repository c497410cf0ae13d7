"""Cross-validation, whole: folds trained, held-out cases segmented and scored, post-processing found, one release made.

What is done is kept in the folder, what was interrupted goes on, and several processes (one per GPU) share the folds:
each claims a fold before it begins, and the last one makes the table and the release.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.bundle import ConfigParser
from tsfm.cases.folders import PoolError, output_path
from tsfm.cases.sources import file_digest
from tsfm.errors import changes
from tsfm.evaluation.evaluation import evaluate_folder
from tsfm.evaluation.label_maps import load_map, load_truth, match_predictions
from tsfm.evaluation.postprocessing_plan import determine
from tsfm.evaluation.scores import count_voxels
from tsfm.evaluation.tables import load_rows, markdown
from tsfm.files import write_first, write_json, write_text
from tsfm.inference.claims import Claims
from tsfm.inference.postprocessing import apply
from tsfm.names import plain_name
from tsfm.options import OptionError, check_options, check_texts
from tsfm.schema import FileError, read_json
from tsfm.training.weight_files import CheckpointError

from ..paper.grids import run_bundle, said_by
from .gpus import visible_devices
from .release import read_licence, release
from .rules import check_name, named_for_clicks

logger = logging.getLogger(__name__)

PLANNED = ("spacing_mm", "patch_size", "batch_size", "network_size")

OWN = ("fold", "dataset_dir", "output_dir", "ckpt_dir", "bundle_root", "config_file", "meta_file", "logging_file")
OWN += ("run_id", "init_id", "final_id")
"""Ids that a cross-validation sets itself in every run."""

SCORED = "Each case was scored by the fold that held it out, before post-processing; the ensemble was not scored."


def cross_validate(
    dataset_dir: str,
    output_dir: str = "cross_validation",
    bundle_dir: str = "bundles/tsfm_finetune",
    folds: Sequence[int] | int | None = None,
    overlays: Sequence[str] = (),
    name: str | None = None,
    gpus: Sequence[int] | int | None = None,
    trained_on: str | None = None,
    data_license: str | None = None,
    store_dir: str | None = None,
    **settings: Any,
) -> str:
    """Train every fold, segment and score the cases it holds out, find the post-processing, release the folds as one.

    The same command goes on where it was interrupted. Started several times at once, on one machine or on several that
    share the folder, it shares the folds. All of `output_dir`: ``fold_N`` (runs), ``held_out`` (label maps of all cases),
    ``scores``, ``postprocessing.json``, ``table.md``, ``release``.

    Args:
        dataset_dir: the data set, as for the bundle.
        output_dir: folder of this cross-validation.
        bundle_dir: the bundle to train.
        folds: which, one or several; by default all that hold out cases.
        overlays: further configs for the training (``small.json``, or paths).
        name: of the released bundle; by default the data set's. With another name, or other words, it is made anew.
        gpus: numbers of the GPUs, among those that this process sees, to spread the folds over, or how many; without it,
            this process does one after the other.
        trained_on, data_license: as for `release`.
        store_dir: prepared cases, such as another run's; by default ``store`` of `output_dir`.
        settings: any other id of train.json, for all folds.

    Returns:
        the table as Markdown.

    Raises:
        OptionError, FileError, PoolError, ReleaseError: options, configs, data, names that cannot be used, before any training.
        CheckpointError: `output_dir` holds another cross-validation.
    """
    overlays = [overlays] if isinstance(overlays, str) else list(overlays)
    folds = [folds] if isinstance(folds, int) else folds
    if isinstance(folds, str):
        raise OptionError(f"--folds {folds}: expected a number, or a list of numbers; without it all folds are done")
    if data_license:
        read_licence(data_license)
    devices = None if gpus is None else visible_devices(gpus)
    one = CrossValidation(dataset_dir, output_dir, bundle_dir, folds, overlays, settings, store_dir)
    name = one.release_name(name)
    if devices is not None:
        arguments = {"bundle_dir": bundle_dir, "folds": folds, "overlays": overlays, "name": name, **settings}
        arguments |= {"trained_on": trained_on, "data_license": data_license, "store_dir": store_dir}
        one.spread(devices, {"dataset_dir": dataset_dir, "output_dir": output_dir, **arguments})
    for fold in one.folds:
        one.work(fold)
    if left := [fold for fold in one.folds if not one.is_done(fold)]:
        return f"folds {left} are with other processes; the last of them makes the table and the release"
    return one.finish(name, trained_on, data_license)


class CrossValidation:
    """One folder of a cross-validation; the arguments are those of `cross_validate`."""

    def __init__(
        self,
        dataset_dir: str,
        output_dir: str,
        bundle_dir: str,
        folds: Sequence[int] | None,
        overlays: Sequence[str],
        settings: Mapping[str, Any],
        store_dir: str | None = None,
    ) -> None:
        self.bundle, self.folder = os.path.abspath(bundle_dir), Path(os.path.abspath(output_dir))
        self.store = os.path.abspath(store_dir) if store_dir else str(self.folder / "store")
        self.dataset_dir, self.settings = os.path.abspath(dataset_dir), dict(settings)
        paths = {"dataset_dir": self.dataset_dir, "output_dir": self.folder, "bundle_dir": self.bundle}
        check_texts({**paths, "store_dir": self.store}, "options")
        if own := [f"--{key}" for key in self.settings if key.lstrip("+") in OWN]:
            raise OptionError(
                f"{', '.join(own)}: a cross-validation sets this itself; its options are --folds, --output_dir"
            )
        inside, names = Path(self.bundle, "configs"), ("train.json", *overlays)
        self.configs = [str(inside / one) if (inside / one).is_file() else os.path.abspath(one) for one in names]
        if absent := [path for path in self.configs if not os.path.isfile(path)]:
            raise FileError(f"{absent[0]} does not exist, nor is it in {self.bundle}/configs: --bundle_dir, --overlays")
        words = [word for key, value in self.settings.items() for word in (f"--{key}", str(value))]
        check_options(["run", "--config_file", str(self.configs), *words])
        self.parser = ConfigParser()
        self.parser.read_config(self.configs)
        for key, value in {**self._of_training(), "bundle_root": self.bundle}.items():
            self.parser[key] = value
        self.pool = self.parser.get_parsed_content("pool")
        wanted = range(self._count()) if folds is None else folds
        held_out = {fold: self.pool.evaluation_items(fold) for fold in wanted}
        self.held_out = {fold: items for fold, items in held_out.items() if items}
        self.folds = list(self.held_out)
        if not self.folds:
            raise PoolError(f"{self.dataset_dir}: no fold holds out a case; two cases are needed at least")
        self.claims = Claims(self.folder)
        self._remember()

    def work(self, fold: int) -> None:
        """Train a fold and segment what it holds out, unless that is done or another process is at it."""
        if self.is_done(fold) or not self.claims.take(f"fold_{fold}"):
            return
        try:
            logger.info("fold %s of %s", fold, self.folds)
            if not self.is_done(fold):
                run_bundle(
                    self.bundle, self.configs, **self._of_training() | self._plan(fold), fold=fold,
                    output_dir=str(self._fold(fold)), ckpt_dir="none",
                )  # fmt: skip
                self._segment(fold)
                write_json(self._fold(fold) / "done.json", self._weights(fold))
        finally:
            self.claims.free(f"fold_{fold}")

    def is_done(self, fold: int) -> bool:
        """Whether a fold is trained and what it holds out is segmented, with the weights that are there now."""
        done = _known(self._fold(fold) / "done.json") == self._weights(fold)
        return done and all(path.is_file() for path in self._maps(fold))

    def spread(self, gpus: Mapping[int, str], arguments: Mapping[str, Any]) -> None:
        """Run this command once per GPU (number -> device as CUDA names it) and wait; what they say is in ``gpu_N.log``."""
        self.folder.mkdir(parents=True, exist_ok=True)
        run_bundle(self.bundle, self.configs, run_id="prepare", **self._of_training() | self._plan(self.folds[0]))
        words = [word for key, value in arguments.items() if value is not None for word in (f"--{key}", str(value))]
        command = [sys.executable, "-m", "tsfm", "cross_validate", *words]
        logs = {gpu: self.folder / f"gpu_{gpu}.log" for gpu in gpus}
        running = {}
        try:
            for gpu, log in logs.items():
                with open(log, "ab") as out:
                    surroundings = {**os.environ, "CUDA_VISIBLE_DEVICES": gpus[gpu]}
                    running[gpu] = subprocess.Popen(command, env=surroundings, stdout=out, stderr=subprocess.STDOUT)
            failed = [gpu for gpu, process in running.items() if process.wait() != 0]
        finally:
            for process in running.values():
                process.terminate()  # nothing where it has ended
        if failed:
            last = logs[failed[0]].read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
            raise RuntimeError(f"the folds on GPU {failed} failed; the same command goes on. {logs[failed[0]]}: {last}")

    def release_name(self, name: str | None) -> str:
        """`name`, or one made of the data set's; ReleaseError for one that no release may have."""
        clicks = bool(self.parser.get("click_sigma"))
        if name is None:
            plain = plain_name(os.path.basename(self.dataset_dir))
            letters = "".join(one if one.isascii() and one.isalnum() else "_" for one in plain).strip("_")
            name = named_for_clicks(f"tsfm_{letters or 'cross_validated'}", clicks)
        check_name(name, clicks)
        return name

    def finish(self, name: str, trained_on: str | None, data_license: str | None) -> str:
        """Scores of all held-out cases, the post-processing that they support, the release, the table."""
        table, made = self.folder / "table.md", self.folder / "made_from.json"
        asked = {"name": name, "trained_on": trained_on, "data_license": data_license}
        asked["weights"] = [self._weights(fold) for fold in self.folds]
        if not self.claims.take("table"):
            return f"another process is making {table} and the release"
        try:
            self._make(table, made, asked)
        finally:
            self.claims.free("table")
        return table.read_text(encoding="utf-8")

    def _make(self, table: Path, made: Path, asked: Mapping[str, Any]) -> None:
        """What `finish` says, unless it is there and made from what is `asked`."""
        is_there = table.is_file() and (self.folder / "release" / asked["name"]).is_dir()
        if not is_there or _known(made) != asked:
            items = [item for items in self.held_out.values() for item in items]
            evaluate_folder(self.folder / "held_out", items, self.pool.table, self.folder / "scores")
            pairs = match_predictions(self.folder / "held_out", items)
            plan = determine(pairs, self.pool.table)
            write_json(self.folder / "postprocessing.json", plan)
            steps = {key: plan[key] for key in ("targets", "steps")}
            said = f"{len(self.folds)} folds of {os.path.basename(self.dataset_dir)} ({len(items)} cases)"
            own = [path.name for path in map(Path, self.configs[1:]) if path.parent == Path(self.bundle, "configs")]
            released = release(
                self.bundle, [str(self._fold(fold) / "model.pt") for fold in self.folds], str(self.folder / "release"),
                name=asked["name"], metrics=str(self.folder / "scores/summary.json"), metrics_of=SCORED, data_license=asked["data_license"],
                trained_on=asked["trained_on"] or said, overlays=own,  # the server's training shall use the bundle's own, too
                inference={"postprocessing_plan": steps if plan["steps"] else None, "displayable_configs#mirroring": True},
            )  # fmt: skip
            text = self._table(pairs, plan, released)
            write_text(table, text)
            write_json(made, asked)

    # ---- parts ------------------------------------------------------------------------------------------------

    def _fold(self, fold: int) -> Path:
        return self.folder / f"fold_{fold}"

    def _weights(self, fold: int) -> dict[str, Any]:
        """What says which weights a fold's label maps are of: the digest of its ``model.pt`` (None without one)."""
        path = self._fold(fold) / "model.pt"
        return {"fold": fold, "checkpoint": file_digest(str(path)) if path.is_file() else None}

    def _of_training(self) -> dict[str, Any]:
        return {"dataset_dir": self.dataset_dir, "store_dir": self.store, **self.settings}

    def _count(self) -> int:
        """Number of folds: the splits file's, or the pool's."""
        if (splits := self.pool.splits) is None:
            return self.pool.folds
        return len(splits) if isinstance(splits, list) else min(map(len, splits.values()))

    def _remember(self) -> None:
        """Write down what this cross-validation is, or CheckpointError where the folder holds another."""
        cases = sorted([item["dataset"], item["case"], fold] for fold, items in self.held_out.items() for item in items)
        record = {"dataset_dir": self.dataset_dir, "configs": self.configs, "settings": self.settings}
        record["overlays"] = said_by(self.configs[1:])
        record, path = json.loads(json.dumps({**record, "held_out": cases})), self.folder / "cross_validation.json"
        _write_first(path, record)
        known = {"overlays": record["overlays"], **read_json(path)}  # earlier versions did not write them down
        before, now = ({tuple(row) for row in one.pop("held_out", ())} for one in (known, record))
        moved = f"; cases and folds {sorted(before ^ now)[:5]}" if before != now else ""
        differs = changes(*({**one.pop("overlays"), **one.pop("settings", {}), **one} for one in (known, record)))
        if changed := differs + moved:
            raise CheckpointError(
                f"{self.folder} holds a cross-validation with other settings ({changed.lstrip('; ')}); give this one its own --output_dir"
            )

    def _plan(self, fold: int) -> dict[str, Any]:
        """The option that gives all folds one plan, where the data is planned by and nothing but that decides."""
        chosen = [self.parser.get(key, "auto") for key in PLANNED]
        if self.parser.get("plan", "absent") is not None or any(value not in ("auto", "coarse") for value in chosen):
            return {}
        path = self.folder / "plan.json"
        if not path.is_file():
            self.parser["fold"] = fold
            _write_first(path, self.parser.get_parsed_content("planned").to_dict())
        return {"plan": str(path)}

    def _segment(self, fold: int) -> None:
        """Label maps of the cases that a fold holds out, each painted with what its data set annotates."""
        datalist, begun = self._fold(fold) / "held_out.json", self._fold(fold) / "segmented_by.json"
        write_json(datalist, self.held_out[fold])
        if _known(begun) != self._weights(fold):  # what is there is of other weights, or nobody knows of which
            for path in (self.folder / "table.md", *self._maps(fold)):
                path.unlink(missing_ok=True)
            write_json(begun, self._weights(fold))
        painted = {"_target_": "tsfm.labels.LabelTable.from_dict", "table": self.pool.table.to_dict()}
        device = {key: self.settings[key] for key in ("device", "amp") if key in self.settings}
        run_bundle(
            self.bundle, ["inference.json"], dataset_dir=str(datalist), output_dir=str(self.folder / "held_out"),
            checkpoint=str(self._fold(fold) / "model.pt"), existing="skip", mirror=True, part=0, parts=1,
            **device, **{"evaluator#table": painted, "evaluator#annotated_only": True},
        )  # fmt: skip

    def _maps(self, fold: int) -> list[Path]:
        return [output_path(self.folder / "held_out", item["case"]) for item in self.held_out[fold]]

    def _table(self, pairs: Sequence[Mapping[str, Any]], plan: Mapping[str, Any], released: str) -> str:
        """Mean Dice per target: of each fold, of all held-out cases, and of these after post-processing."""
        rows = [row for row in load_rows(self.folder / "scores/cases.csv") if row["dice"] is not None]
        of_case = {item["case"]: fold for fold, items in self.held_out.items() for item in items}
        after = self._processed(pairs, plan)
        heads, lines = ["target", *(f"fold {fold}" for fold in self.folds), "all", "post-processed", "cases"], []
        for target in dict.fromkeys(row["target"] for row in rows):
            found = [(of_case.get(row["case"]), row["dice"]) for row in rows if row["target"] == target]
            parts = [[dice for fold, dice in found if fold == one] for one in self.folds]
            cells = [*map(_mean, parts), _mean([dice for _, dice in found]), _mean(after[target])]
            lines.append([target, *cells, len(found)])
        names = [step["target"] for step in plan["steps"]]
        said = f"the largest component alone is kept of {', '.join(names)}" if names else "none helps"
        return (
            f"# Cross-validation of {os.path.basename(self.dataset_dir)}\n\nMean Dice of the held-out cases that hold the "
            "target, windows averaged with their mirrored versions.\n\n" + markdown(heads, lines) + "\n\n"
            f"Post-processing: {said}. All folds as one bundle, post-processing included: {released}\n"
        )

    def _processed(self, pairs: Sequence[Mapping[str, Any]], plan: Mapping[str, Any]) -> dict[str, list[float]]:
        """Target -> Dice after post-processing of each case that holds the target."""
        found: dict[str, list[float]] = {}
        for pair in pairs:
            prediction, affine = load_map(pair["prediction"])
            truth = load_truth(pair["label"], self.pool.table, pair["dataset"], (prediction, affine, pair["case"]))
            processed = apply(prediction, plan, self.pool.table.annotated(pair["dataset"]))
            for name, (tp, fp, fn) in count_voxels(processed, truth, self.pool.table, pair["dataset"]).items():
                if tp + fn:
                    found.setdefault(name, []).append(2 * tp / (2 * tp + fp + fn))
        return found


def _write_first(path: Path, content: Any) -> None:
    """Write JSON, unless another process has."""
    text = json.dumps(content, indent=4)
    write_first(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def _known(path: Path) -> Any:
    """What an earlier process wrote down; None where it is not there."""
    return read_json(path) if path.is_file() else None


def _mean(values: Sequence[float]) -> str:
    return f"{np.mean(values):.4f}".lstrip("0") if len(values) else "-"
