"""A MONAI Label app that also offers the image about which the network is least sure (active learning).

MONAI Label's own bundle app serves these bundles as it is, with the strategies random and first. An app is a folder
whose ``main.py`` belongs to whoever runs the server, so this file goes in its place, and the original beside it:

    mv apps/monaibundle/main.py apps/monaibundle/bundle_app.py
    cp custom/tsfm_tools/label_app.py apps/monaibundle/main.py

Scores are computed when the server starts and after every training, and kept with the images. Runs only in MONAI
Label's environment.
"""

from __future__ import annotations

import copy
import logging
import os
from typing import Any

import bundle_app
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.tasks.scoring import ScoringMethod
from monailabel.tasks.activelearning.epistemic import Epistemic
from monailabel.utils.others.generic import name_to_device

logger = logging.getLogger(__name__)


class UncertaintyScoring(ScoringMethod):
    """Mean entropy in bits of the targets' probabilities, where the network segments something, of every unlabeled image.

    Args:
        task: the bundle's inference task; its inferer is a `SlabInferer`.
        key: name of the score among what the server keeps about an image.
    """

    def __init__(self, task: Any, key: str) -> None:
        super().__init__("Mean entropy of the targets' probabilities where something is segmented")
        self.task, self.key = task, key

    def __call__(self, request: dict[str, Any], datastore: Any) -> dict[str, int]:
        weights = os.stat(self.task.get_path()).st_mtime
        images = datastore.get_unlabeled_images()
        due = [image for image in images if datastore.get_image_info(image).get(f"{self.key}_weights") != weights]
        for image in due:
            try:
                score = self.score(datastore.get_image_uri(image), request)
            except Exception:  # the others are scored all the same
                logger.exception("%s of %s cannot be computed: it comes last", self.key, image)
                score = 0.0
            datastore.update_image_info(image, {self.key: score, f"{self.key}_weights": weights})
            logger.info("%s of %s: %.4f", self.key, image, score)
        return {"total": len(images), "executed": len(due), "skipped": len(images) - len(due)}

    def score(self, path: str, request: dict[str, Any]) -> float:
        """Score one image file; `request` may hold the options of inference (mirroring, overlap, targets)."""
        data = {**copy.deepcopy(self.task.config()), **request, "image": path, "image_path": path}
        data["device"] = name_to_device(request.get("device", "cuda"))
        data = self.task.run_pre_transforms(data, self.task.pre_transforms(data))
        network = self.task._get_network(data["device"], data)
        return self.task.inferer(data).uncertainty(data["image"][None].to(data["device"]), network)


class MyApp(bundle_app.MyApp, MONAILabelApp):
    """The bundle app with a scoring method and a strategy ``uncertainty_NAME`` for every bundle that it serves.

    MONAI Label takes the class of main.py that names MONAILabelApp among its own bases.
    """

    def init_scoring_methods(self) -> dict[str, Any]:
        own = {
            f"uncertainty_{name}": UncertaintyScoring(self._infers[name], f"uncertainty_{name}") for name in self.models
        }
        return {**super().init_scoring_methods(), **own}

    def init_strategies(self) -> dict[str, Any]:
        own = {
            f"uncertainty_{name}": Epistemic(
                key=f"uncertainty_{name}", desc="The image the network is least sure about"
            )
            for name in self.models
        }
        return {**super().init_strategies(), **own}
