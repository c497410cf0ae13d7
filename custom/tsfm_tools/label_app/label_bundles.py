"""The bundles that a MONAI Label server serves side by side: where they are, and what they must not share.

Nothing here knows MONAI Label.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

logger = logging.getLogger(__name__)


def served_bundles(app_dir: str, conf: dict[str, str]) -> dict[str, str]:
    """Name -> folder of the bundles to serve: those that are named, or the one around the app, or all below ``model``.

    Raises:
        ValueError: a name that leads to no bundle; two folders of one name; no bundle at all.
    """
    named = [name.strip() for name in conf.get("models", "").split(",") if name.strip()]
    around = os.path.dirname(os.path.realpath(app_dir))
    if not named:
        inside = sorted(map(str, Path(app_dir, "model").glob("*")))
        named = [around] if _is_bundle(around) else list(filter(_is_bundle, inside))
    found = {}
    for name in named:
        folder = next((f for f in (os.path.join(app_dir, "model", name), name) if _is_bundle(f)), None)
        if folder is None:
            raise ValueError(
                f"--conf models: '{name}' is no folder of a bundle with weights, nor one below {app_dir}/model"
            )
        folder = os.path.realpath(folder)
        other = found.setdefault(os.path.basename(folder), folder)
        if other != folder:
            raise ValueError(
                f"--conf models: {other} and {folder} have one name, by which requests would choose: rename one"
            )
    if not found:
        raise ValueError(f"no bundle to serve: put one into {app_dir}/model, or name its folder (--conf models FOLDER)")
    return found


def _is_bundle(folder: str) -> bool:
    return all(Path(folder, part).is_file() for part in ("configs/inference.json", "models/model.pt"))


def check_names(name: str, models: Iterable[str]) -> None:
    """ValueError where the name under which a bundle is offered without clicks is that of another bundle."""
    if f"{name}_seg" in models:
        raise ValueError(
            f"the bundle '{name}' is offered as '{name}_seg' too, which is another bundle's name: rename one"
        )


def common_values(labels: Mapping[str, Mapping[str, int]]) -> dict[str, int] | None:
    """Name -> value in a label map, as all of several bundles have it; None, with a warning, where they differ."""
    first = next(iter(labels))
    others = [name for name, values in labels.items() if dict(values) != dict(labels[first])]
    if not others:
        return dict(labels[first])
    logger.warning(
        "%s and %s have different targets: labels of this DICOMweb server can be neither stored nor read; serve each by a "
        "server of its own for that", first, ", ".join(others),
    )  # fmt: skip
    return None
