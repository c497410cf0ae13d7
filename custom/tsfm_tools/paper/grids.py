"""The runs of a grid.

A run trains a bundle, then segments and scores the validation cases whole, in its own folder. What is done is kept, what
was interrupted goes on.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import monai
from monai.bundle import ConfigParser
from tsfm.cases.pool import DatasetPool
from tsfm.errors import changes, first_cause
from tsfm.files import write_json
from tsfm.options import OptionError, check_options, check_texts
from tsfm.planning.own_data import pretrained_description
from tsfm.schema import FileError, nearest, read_json
from tsfm.training.weight_files import CheckpointError

from ..release.import_stunet import write_stunet
from .grid_files import Grid, Run, is_published, listed
from .prompted import prompted_scores

logger = logging.getLogger(__name__)

EVALUATED = (
    "pool_file", "images", "labels", "label_ids", "regions", "modality", "splits_file", "fold", "allow_missing", "datasets",
    "device", "amp",
)  # fmt: skip
"""Ids of a training run that its evaluation needs too."""

PUBLISHED = ("fold", "device", "splits_file")
"""Those that the scores of published weights take."""

OWN = ("epochs", "seed", "pretrained", "from_scratch", "bundle_root", "store_dir", "ckpt_dir")
"""Ids that a grid, or its runner, sets in every run."""


def run_bundle(bundle_dir: str | os.PathLike, configs: Sequence[str], **overrides: Any) -> None:
    """``python -m monai.bundle run`` in this process: `configs` are names in the bundle's configs folder, or paths.

    An error is raised as what it was before MONAI wrapped it.

    Raises:
        OptionError: an override, a path for example, with a ``#``.
    """
    folder = Path(bundle_dir) / "configs"
    check_texts({**overrides, "bundle_root": str(bundle_dir)}, "options")
    try:
        monai.bundle.run(
            config_file=_config_paths(bundle_dir, configs),
            meta_file=str(folder / "metadata.json"),
            logging_file=str(folder / "logging.conf"),
            bundle_root=str(bundle_dir),
            **overrides,
        )
    except RuntimeError as error:
        raise first_cause(error) from None


def _config_paths(bundle_dir: str | os.PathLike, configs: Sequence[str]) -> list[str]:
    folder = Path(bundle_dir) / "configs"
    return [str(folder / name) if (folder / name).is_file() else str(name) for name in configs]


def said_by(configs: Sequence[str]) -> dict[str, Any]:
    """Ids and values of config files, those of the later over those of the earlier; descriptions left out."""
    loaded = [ConfigParser.load_config_file(path) for path in configs]
    return {key: value for config in loaded for key, value in config.items() if key[0] != "_"}


class GridRunner:
    """What is common to the runs of a grid.

    Args:
        grid: the table.
        dataset_dir: folder of its data sets.
        output_dir: for ``cells``, one folder per run, and ``store``, the prepared cases.
        weights: name in the grid -> weight file.
        overlays: over the configs of every training run.
        settings: ids of train.json for every training run whose bundle has them.

    Raises:
        FileError, OptionError, CheckpointError: bundles, configs, weights, options that do not exist: before any run.
    """

    def __init__(
        self,
        grid: Grid,
        dataset_dir: str | os.PathLike,
        output_dir: str | os.PathLike,
        weights: Mapping[str, str] | None = None,
        overlays: Sequence[str] | str = (),
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.grid, self.overlays, self.settings = grid, listed(overlays), dict(settings or {})
        if not isinstance(weights or {}, Mapping):
            raise OptionError(f"--weights is {weights!r}; expected a file for each name: \"{{'NAME': 'FILE'}}\"")
        self.dataset_dir, self.output_dir = Path(os.path.abspath(dataset_dir)), Path(os.path.abspath(output_dir))
        self.weights = {name: os.path.abspath(path) for name, path in (weights or {}).items()}
        paths = {"dataset_dir": self.dataset_dir, "output_dir": self.output_dir, "weights": [*self.weights.values()]}
        check_texts({**paths, "bundles_dir": grid.bundles_dir}, "options")
        if not self.dataset_dir.is_dir():
            raise FileError(f"--dataset_dir {self.dataset_dir} is no folder")
        for name, path in self.weights.items():
            if name not in grid.weights:
                raise FileError(
                    f"--weights: the table asks for {list(grid.weights)}, not for '{name}'{nearest(name, grid.weights)}"
                )
            pretrained_description(path)
        self.recipes = {name: next(grid.runs(w["row"])) for name, w in grid.weights.items() if "row" in w}
        self.runs = sorted((run for row in grid.rows for run in grid.runs(row)), key=lambda run: run.epochs or 0)
        trained = [run for run in (*self.runs, *self.recipes.values()) if not is_published(run.row)]
        self._ids = {bundle: self._known_ids(bundle) for bundle in {run.row["bundle"] for run in trained}}
        self._check_settings()
        for run in trained:
            bundle, configs = self._bundle(run)
            options = [word for key, value in self._options(run).items() for word in (f"--{key}", str(value))]
            check_options(["run", "--config_file", str(_config_paths(bundle, configs)), *options])

    def _check_settings(self) -> None:
        known = set(PUBLISHED).union(*self._ids.values())
        unknown = [f"--{key}{nearest(key, known)}" for key in self.settings if key.split("#")[0] not in known]
        if unknown:
            raise OptionError(f"no bundle of this table has an id for {', '.join(unknown)}")
        if own := [f"--{key}" for key in self.settings if key in OWN]:
            raise OptionError(
                f"{', '.join(own)}: the grid and --output_dir decide this for each run: change rows in a copy of the grid "
                "(--grid; transfer_table has --epochs and --seeds), give weights by name (--weights)"
            )

    def _known_ids(self, bundle: str) -> set[str]:
        folder = self.grid.bundles_dir / bundle / "configs"
        if not (folder / "train.json").is_file():
            raise FileError(
                f"{folder / 'train.json'} does not exist: --bundles_dir is the folder of the bundles, with {bundle}"
            )
        return {key.split("#")[0] for path in folder.glob("*.json") for key in read_json(path)}

    def _bundle(self, run: Run) -> tuple[Path, list[str]]:
        """The bundle of a training run, and its configs."""
        bundle = self.grid.bundles_dir / run.row["bundle"]
        configs = ["train.json", *self._of_data(run), *run.row.get("overlays", ()), *self.overlays]
        for path in _config_paths(bundle, configs):
            if not os.path.isfile(path):
                raise FileError(f"{self.grid.source}: {bundle} has no config {path}, and there is no such file")
        return bundle, configs

    def _of_data(self, run: Run) -> list[str]:
        return self.grid.datasets[run.dataset].get("overlays", [])

    def _options(self, run: Run) -> dict[str, Any]:
        """Ids of a training run, data and folders aside."""
        known = self._ids[run.row["bundle"]]
        options = {key: value for key, value in self.settings.items() if key.split("#")[0] in known}
        options |= {**run.row.get("options", {}), "epochs": run.epochs, "seed": run.seed}
        entry = self.grid.datasets[run.dataset]
        if "only" in entry:
            options["pool_file"] = self.grid.pools[run.dataset]
        elif entry.get("pool_file", usual := f"{run.row['bundle']}/configs/pool.json") != usual:
            options.setdefault("pool_file", self.grid.pools[run.dataset])
        return options

    def folder_of(self, dataset: str) -> Path:
        """Where a data set lies."""
        return self.dataset_dir / self.grid.datasets[dataset].get("folder", "")

    def cell(self, run: Run) -> Path:
        """The folder of a run."""
        return self.output_dir / "cells" / run.folder

    # ---- what keeps a run from running --------------------------------------------------------------------------

    def obstacle(self, run: Run) -> str | None:
        """Why a run cannot start: a package, data or weights that are not here."""
        absent = [name for name in run.row.get("packages", ()) if find_spec(name) is None]
        if absent:
            names = " ".join(absent).replace("_", "-")
            return f"the package {names} is not installed (pip install --no-deps {names}, docs/networks.md)"
        return self._absent_data(run) or self._absent_weights(run)

    def _absent_data(self, run: Run) -> str | None:
        pool = self.grid.pools[run.dataset]
        entries = [] if pool is None else [entry.get("folder", ".") for entry in pool["datasets"]]
        folders = [self.folder_of(run.dataset) / name for name in entries or [""]]
        absent = [str(path) for path in folders if not path.is_dir()]
        if not absent or (self.settings.get("allow_missing") and len(absent) < len(folders)):
            return None
        return f"no data ({', '.join(absent)})"

    def _absent_weights(self, run: Run) -> str | None:
        name = run.row.get("weights")
        if name is None or name in self.weights:
            return None
        recipe = self.recipes.get(name)
        reason = self.obstacle(recipe) if recipe else self.grid.weights[name].get("file", "")
        if reason is None:
            return None
        return f"no weights '{name}' ({reason}; --weights \"{{'{name}': FILE}}\")"

    # ---- running ------------------------------------------------------------------------------------------------

    def train(self, run: Run) -> Path:
        """Train a run unless that is done; its weights."""
        folder, options = self.cell(run), self._options(run)
        bundle, configs = self._bundle(run)
        if "weights" in run.row:
            options["pretrained"] = self.weights_of(run.row["weights"])
        settings = self._settings(run, options, configs)
        if self._kept(run, settings):
            logger.info("%s is trained already", folder.name)
        else:
            run_bundle(
                bundle, configs, dataset_dir=str(self.folder_of(run.dataset)), output_dir=str(folder), **options,
                store_dir=str(self.output_dir / "store"), ckpt_dir=str(folder / "published"),
            )  # fmt: skip
            write_json(folder / "cell.json", {"settings": settings})
        return folder / "model.pt"

    def weights_of(self, name: str) -> str:
        """The file of weights, trained first where the grid says how."""
        return self.weights.get(name) or str(self.train(self.recipes[name]))

    def scores(self, run: Run) -> dict[str, dict[str, float]]:
        """Train and score a run unless that is done: data set -> target -> Dice."""
        if is_published(run.row):
            return self._published(run)
        checkpoint, record = self.train(run), self.record(run)
        if "scores" in record:
            return record["scores"]
        evaluated = checkpoint.parent / "evaluation"
        bundle, _ = self._bundle(run)
        data = {key: value for key, value in self._options(run).items() if key in EVALUATED}
        run_bundle(
            bundle, ["inference.json", "evaluate.json", *self._of_data(run)], dataset_dir=str(self.folder_of(run.dataset)),
            checkpoint=str(checkpoint), output_dir=str(evaluated), progress=False, **data,
        )  # fmt: skip
        scores = _dice(evaluated)
        write_json(checkpoint.parent / "cell.json", {**record, "scores": scores})
        return scores

    def _published(self, run: Run) -> dict[str, dict[str, float]]:
        """The scores of a network that is not trained here."""
        weights = self.weights[run.row["weights"]]
        chosen = {key: self.settings[key] for key in PUBLISHED if key in self.settings}
        settings = self._settings(run, {"pretrained": weights, "seed": run.seed, **chosen}, [])
        record = self._kept(run, settings)
        if not record:
            scores = self._prompted if run.row.get("prompted") else self._zero_shot
            record = {"settings": settings, "scores": scores(run, weights, **chosen)}
            write_json(self.cell(run) / "cell.json", record)
        return record["scores"]

    def _prompted(self, run: Run, weights: str, splits_file: Any = None, **chosen: Any) -> dict[str, dict[str, float]]:
        pool = DatasetPool(self.grid.pools[run.dataset], self.folder_of(run.dataset), splits_file=splits_file)
        return prompted_scores(weights, pool, seed=run.seed, **chosen)

    def _zero_shot(self, run: Run, weights: str, **chosen: Any) -> dict[str, dict[str, float]]:
        """STU-Net's own structures, by name, where the data set annotates them."""
        folder = self.cell(run)
        folder.mkdir(parents=True, exist_ok=True)
        run_bundle(
            self.grid.bundles_dir / "tsfm_finetune", ["inference.json", "evaluate.json", "zero_shot.json"], **chosen,
            dataset_dir=str(self.folder_of(run.dataset)), pool_file=self.grid.pools[run.dataset], progress=False,
            checkpoint=write_stunet(weights, str(folder / "model.pt")), output_dir=str(folder / "evaluation"),
        )  # fmt: skip
        return _dice(folder / "evaluation")

    def _settings(self, run: Run, options: Mapping[str, Any], configs: Sequence[str]) -> dict[str, Any]:
        """What a run that is done must have been run with; of weights size and time, wherever they lie."""
        asked, weights = dict(options), str(options.get("pretrained"))
        asked.pop("pretrained", None)
        settings = {"run": asked, "dataset_dir": str(self.folder_of(run.dataset)), "configs": list(configs)}
        settings["overlays"] = said_by(_config_paths(self.grid.bundles_dir / run.row.get("bundle", ""), configs)[1:])
        if os.path.isfile(weights):  # a pretraining that ran again left others under this name
            settings["pretrained"] = [os.path.getsize(weights), os.stat(weights).st_mtime_ns]
        return json.loads(json.dumps(settings))

    def record(self, run: Run) -> dict[str, Any]:
        """What is kept of a run that is trained: its settings, and its scores once it is scored."""
        path = self.cell(run) / "cell.json"
        return read_json(path) if path.is_file() else {}

    def _kept(self, run: Run, settings: Mapping[str, Any]) -> dict[str, Any]:
        """`record`; CheckpointError where it is that of other settings."""
        record = self.record(run)
        # earlier versions did not write the overlays down
        before = {"overlays": settings["overlays"]} | record.get("settings", settings)
        if before != settings:
            flat = [{**one, **one["overlays"], **one["run"], "overlays": 0, "run": 0} for one in (before, settings)]
            raise CheckpointError(
                f"{self.cell(run)} holds a cell with other settings ({changes(*flat)}); give this grid its own --output_dir"
            )
        return record


def _dice(evaluated: Path) -> dict[str, dict[str, float]]:
    """Data set -> target -> mean Dice, of an evaluation's folder."""
    return {
        dataset: {target: entry["dice"]["mean"] for target, entry in part.items() if entry["dice"]}
        for dataset, part in read_json(evaluated / "summary.json")["datasets"].items()
    }
