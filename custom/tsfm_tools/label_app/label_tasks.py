"""Inference, training and scoring with one bundle, as MONAI Label's tasks. Runs only in MONAI Label's environment."""

from __future__ import annotations

import copy
import logging
import os
from pathlib import Path
from typing import Any

import torch
from label_checks import FINAL, check_inference
from monailabel.interfaces.tasks.infer_v2 import InferType
from monailabel.interfaces.tasks.scoring import ScoringMethod
from monailabel.tasks.infer.bundle import BundleInferTask
from monailabel.tasks.train.bundle import BundleTrainTask
from monailabel.utils.others.generic import device_list, device_map, name_to_device, strtobool

logger = logging.getLogger(__name__)


def devices() -> list[str]:
    """Names by which a client may ask for a device; "cuda" is the best that there is."""
    numbered = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return list(dict.fromkeys([*device_list(), *device_map().values(), *numbered, "cpu", "cuda"]))


def weight_files(bundle: str) -> list[str]:
    """Names of the weight files that a bundle has now, ``model.pt`` first."""
    return sorted((path.name for path in Path(bundle, "models").glob("*.pt")), key=len)


class InferTask(BundleInferTask):
    """A bundle's inference, whose menu shows the weights that are there, and which holds the network once.

    MONAI Label's own keeps a copy of the network without its weights, and loads weights that do not fit in part.
    `shared`: a task with the same bundle and the same network in memory, so that what it computed is known to both.
    """

    _offered: int | None = None
    """Time of the weights whose targets are offered."""

    def __init__(self, path: str, conf: dict[str, str], shared: InferTask | None = None, **options: Any) -> None:
        with torch.device("meta"):  # what a network is; its weights come with the first request
            super().__init__(path, {**conf, "preload": "false"}, **options)
        if shared is not None:
            self._networks = shared._networks
        if strtobool(conf.get("preload", "false")):
            for device in device_map().values():
                self._get_network(device, None)

    def config(self) -> dict[str, Any]:
        """The options of a request; weights that a training left, and targets that it taught, are among them."""
        from tsfm.training.checkpoint import read_description, trained_targets

        self._config["model_filename"] = weight_files(self.bundle_path)
        path = os.path.join(self.bundle_path, "models", "model.pt")
        if self._offered != os.stat(path).st_mtime_ns and "targets" in self._config:
            self._offered = os.stat(path).st_mtime_ns
            trained = trained_targets(read_description(path), self.bundle_config.get("raw_ids"))
            self._config["targets"] = ["all", *trained]
        return super().config()

    def checked(self, request: dict[str, Any]) -> dict[str, Any]:
        """The request with its options as they are meant; BadRequest for those that cannot be."""
        return check_inference(request, self.config(), devices(), prompts=self.takes_clicks)

    @property
    def takes_clicks(self) -> bool:
        """Whether MONAI Label's clients send it clicks."""
        return self.type == InferType.DEEPEDIT

    def run_inferer(self, data: dict[str, Any], convert_to_batch: bool = True, device: str = "cuda") -> dict[str, Any]:
        """The label map of one image, which stays where it is: a GPU that does not hold it takes window after window."""
        network = self._get_network(device, data)
        with torch.no_grad():
            data[self.output_label_key] = self.inferer(data)(data[self.input_key][None], network)[0]
        if device.startswith("cuda"):
            torch.cuda.empty_cache()
        return data

    def _get_network(self, device: str, data: dict[str, Any] | None) -> torch.nn.Module:
        """The network with the weights that the request names, loaded again only where the file is another one."""
        from tsfm.training.checkpoint import build_network, load_weights, read_description

        named = (data or {}).get("model_filename") or "model.pt"
        path = os.path.join(self.bundle_path, "models", named if isinstance(named, str) else named[0])
        state = (path, os.stat(path).st_mtime_ns)
        if self._networks.get(device, (None, None))[1] != state:
            self._networks.pop(device, None)  # before there are two
            network = build_network(read_description(path), dropout=self.dropout)
            load_weights(network, path)
            self._networks[device] = network.to(torch.device(device)).eval(), state
        return self._networks[device][0]


class TrainTask(BundleTrainTask):
    """A bundle's training on the labels that were submitted, each with what it says about the targets.

    The option "annotated" is "drawn", "all", or names of targets (`tsfm.cases.submitted`); `rule` is its default.
    """

    def __init__(self, path: str, conf: dict[str, str], rule: str = "drawn") -> None:
        super().__init__(path, conf)
        self.rule = rule

    def config(self) -> dict[str, Any]:
        """The options of a request to train."""
        known = [self.rule, *(word for word in ("drawn", "all") if word != self.rule)]
        return {**super().config(), "model_filename": weight_files(self.bundle_path), "annotated": known}

    def named(self, request: dict[str, Any]) -> str:
        """What the request says about the targets that its labels annotate, as one text."""
        chosen = request.get("annotated") or self.rule
        if chosen == self.config()["annotated"]:  # a client that sends every choice back has made none
            return self.rule
        return chosen if isinstance(chosen, str) else ",".join(chosen)

    def __call__(self, request: dict[str, Any], datastore: Any) -> Any:
        # a client sends back the empty run_id that it was shown
        return super().__call__({**request, "run_id": request.get("run_id") or "run"}, datastore)

    def _fetch_datalist(self, request: dict[str, Any], datastore: Any) -> list[dict[str, Any]]:
        """The labeled images, each with the targets that its label or the request names; those that say nothing left out.

        Raises:
            CaseError: all of them say nothing.
        """
        from tsfm.cases.submitted import drawn_targets, named_targets
        from tsfm.errors import CaseError
        from tsfm.training.checkpoint import read_description

        targets = tuple(read_description(os.path.join(self.bundle_path, "models", "model.pt"))["targets"])
        labels = [entry["labels"].get(FINAL) for entry in datastore.json()["objects"].values()]
        about = {label["info"].get("name"): label["info"] for label in labels if label}
        items = []
        for item in super()._fetch_datalist(request, datastore):
            own = about.get(os.path.basename(item["label"]), {}).get("annotated", ())
            named = [*named_targets(self.named(request), targets), *named_targets(own, targets)]
            if named or drawn_targets(item["label"], targets):
                items.append({**item, "annotated": named})
            else:
                logger.warning("%s is left out: it holds no target, and none is named as annotated", item["label"])
        if not items:
            raise CaseError(
                "the submitted labels hold no target at all, so there is nothing to learn from them; draw one, or name the "
                "targets that are absent where they are not drawn (annotated)"
            )
        return items

    def _load_checkpoint(self, model_pytorch: str, pretrained: bool, train_handlers: list) -> None:
        if pretrained:
            super()._load_checkpoint(model_pytorch, pretrained, train_handlers)
        self.pretrained = pretrained

    def _update_overrides(self, overrides: dict[str, Any]) -> dict[str, Any]:
        """Without pretrained weights: the network as it is, its weights drawn anew."""
        if not self.pretrained:
            fresh = {"from_scratch": True, "initial_weights": ""}  # MONAI drops what is None
            overrides.update({key: value for key, value in fresh.items() if key in self.bundle_config.config})
        return overrides


class UncertaintyScoring(ScoringMethod):
    """Mean entropy in bits of the targets' probabilities, where the network segments something, of every unlabeled image.

    Args:
        task: the bundle's inference task; its inferer is a `SlabInferer`.
        key: name of the score among what the server keeps about an image.
    """

    def __init__(self, task: Any, key: str) -> None:
        super().__init__("Mean entropy of the targets' probabilities where something is segmented")
        self.task, self.key = task, key

    def due(self, datastore: Any) -> list[str]:
        """Unlabeled images without a score of the weights of now."""
        weights = os.stat(self.task.get_path()).st_mtime
        images = datastore.get_unlabeled_images()
        return [image for image in images if datastore.get_image_info(image).get(f"{self.key}_weights") != weights]

    def __call__(self, request: dict[str, Any], datastore: Any) -> dict[str, int]:
        weights = os.stat(self.task.get_path()).st_mtime
        due, total = self.due(datastore), len(datastore.get_unlabeled_images())
        for image in due:
            try:
                score = self.score(datastore.get_image_uri(image), request)
            except Exception:  # the others are scored all the same
                logger.exception("%s of %s cannot be computed: it comes last", self.key, image)
                score = 0.0
            datastore.refresh()  # labels submitted meanwhile are in the same file, which is written whole
            if image in datastore.list_images():  # or else it was removed meanwhile
                datastore.update_image_info(image, {self.key: score, f"{self.key}_weights": weights})
                logger.info("%s of %s: %.4f", self.key, image, score)
        return {"total": total, "executed": len(due), "skipped": total - len(due)}

    def score(self, path: str, request: dict[str, Any]) -> float:
        """Score one image file; `request` may hold the options of inference (mirroring, overlap, targets)."""
        data = {**copy.deepcopy(self.task.config()), **request, "image": path, "image_path": path}
        data["device"] = name_to_device(request.get("device", "cuda"))
        data = self.task.run_pre_transforms(data, self.task.pre_transforms(data))
        network = self.task._get_network(data["device"], data)
        return self.task.inferer(data).uncertainty(data["image"][None], network)  # windows go to the device one by one
