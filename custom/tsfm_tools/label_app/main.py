"""A MONAI Label app for these bundles: what is wrong with a request is said at once, in a sentence, as HTTP 4xx.

A release brings it along: ``monailabel start_server --app NAME/label_app --studies FOLDER`` serves the bundle that it
lies in. It also offers the image about which the network is least sure (active learning), reads folders of DICOM series,
and lets a submitted label say which targets it is about. Runs only in MONAI Label's environment.

Options, as ``--conf KEY VALUE``: ``models`` (folders of bundles, or names of folders below ``model``), ``annotated``
(``drawn``, ``all``, or names of targets that every submitted label annotates), ``scoring`` (``false``: no scores for
active learning), ``skip_trainers``, ``preload``.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import monailabel
from fastapi import HTTPException
from label_bundles import check_names, common_values, served_bundles
from label_checks import BadRequest, check_image, check_training
from label_dicom import NamedSegments, series_as_nifti
from label_tasks import InferTask, TrainTask, UncertaintyScoring, devices
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.utils.app import app_instance
from monailabel.tasks.activelearning.epistemic import Epistemic
from monailabel.tasks.activelearning.first import First
from monailabel.tasks.activelearning.random import Random
from monailabel.utils.async_tasks.task import AsyncTask
from monailabel.utils.others.generic import strtobool

logger = logging.getLogger(__name__)


@contextmanager
def answered() -> Iterator[None]:
    """Errors become HTTP errors with their sentence: 4xx for what a user can mend, 500 for the rest."""
    from tsfm.errors import first_cause

    try:
        yield
    except HTTPException:
        raise
    except BadRequest as error:
        raise HTTPException(error.status, str(error)) from None
    except Exception as error:
        cause = first_cause(error)
        logger.exception("the request failed")
        if type(cause).__module__.split(".")[0] == "tsfm":
            raise HTTPException(422, str(cause)) from error
        text = getattr(cause, "msg", cause)
        raise HTTPException(500, f"{type(cause).__name__}: {text} (the server's log has more)") from error


class AnyImage(Random):
    """MONAI Label's random choice, whose weights, seconds since an image was shown, must not all be zero."""

    def __call__(self, request: dict[str, Any], datastore: Any) -> dict[str, Any] | None:
        try:
            return super().__call__(request, datastore)
        except ValueError:  # every image that is left was shown within this second
            return First()(request, datastore)


class MyApp(MONAILabelApp):
    """See this module. MONAI Label takes the class of main.py that names MONAILabelApp among its own bases."""

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        self.models = served_bundles(app_dir, conf)
        sys.path.insert(0, next(iter(self.models.values())))
        import tsfm.cases.submitted  # noqa: F401  (the package of the first bundle serves all)

        sys.path.pop(0)
        version = monailabel.__version__
        super().__init__(app_dir, studies, conf, f"TSFM ({version})", "Tumor segmentation bundles", version)

    # ---- what is offered --------------------------------------------------------------------------------------

    def init_infers(self) -> dict[str, Any]:
        """Every bundle; one that takes clicks (MONAI Label goes by its name) also without them, as NAME_seg."""
        found = {name: InferTask(folder, self.conf) for name, folder in self.models.items()}
        for name, folder in self.models.items():
            if found[name].takes_clicks:
                check_names(name, self.models)
                found[f"{name}_seg"] = InferTask(folder, self.conf, type="segmentation", shared=found[name])
        if isinstance(self.datastore(), NamedSegments):
            self.datastore().values = common_values({name: task.labels for name, task in found.items()})
        return found

    def init_trainers(self) -> dict[str, Any]:
        if strtobool(self.conf.get("skip_trainers", "false")):
            return {}
        rule = self.conf.get("annotated", "drawn")
        return {name: TrainTask(folder, self.conf, rule) for name, folder in self.models.items()}

    def init_strategies(self) -> dict[str, Any]:
        about = "The image the network is least sure about"
        own = {key: Epistemic(key=key, desc=about) for key in self.init_scoring_methods()}
        return {"random": AnyImage(), "first": First(), **own}

    def init_scoring_methods(self) -> dict[str, Any]:
        if not strtobool(self.conf.get("scoring", "true")):
            return {}
        keys = {f"uncertainty_{name}": name for name in self.models}
        return {key: UncertaintyScoring(self._infers[name], key) for key, name in keys.items()}

    def init_datastore(self) -> Any:
        if not self.studies.startswith(("http://", "https://")):
            series_as_nifti(self.studies)
        return super().init_datastore()

    def _init_dicomweb_datastore(self) -> Any:
        store = super()._init_dicomweb_datastore()
        store.__class__ = NamedSegments  # MONAI Label chooses the class itself; the state is the same
        return store

    def _download_dcmqi_tools(self) -> None:
        """The tool that writes DICOM SEG comes with the package dcmqi; nothing is fetched from elsewhere."""
        os.environ["PATH"] += os.pathsep + os.path.dirname(sys.executable)
        if not shutil.which("itkimage2segimage"):
            logger.warning(
                "labels cannot be submitted to this DICOMweb server: itkimage2segimage is missing (pip install dcmqi)"
            )

    # ---- requests ---------------------------------------------------------------------------------------------

    def infer(self, request: dict[str, Any], datastore: Any = None) -> dict[str, Any]:
        with answered():
            checked = self._task(self._infers, request).checked(request)
            self._check_image(checked["image"], datastore or self.datastore())
            return super().infer(checked, datastore)

    def _task(self, tasks: dict[str, Any], request: dict[str, Any]) -> Any:
        name = request.get("model")
        if name not in tasks:
            raise BadRequest(f"there is no model '{name}'; this server has {', '.join(tasks) or 'none'}", 404)
        return tasks[name]

    def _check_image(self, image: Any, datastore: Any) -> None:
        if not isinstance(image, str) or os.path.exists(image):
            return
        try:
            path = datastore.get_image_uri(image)
        except Exception as error:  # whatever a remote server answers
            logger.exception("image %s", image)
            raise BadRequest(f"image '{image}' cannot be had from {datastore.name()}: {error!r}", 404) from None
        check_image(path, image, datastore.list_images())

    def check_task(self, method: str, request: dict[str, Any]) -> dict[str, Any]:
        """A request for a background task as it is meant, checked before its process starts."""
        from tsfm.cases.submitted import named_targets
        from tsfm.errors import CaseError
        from tsfm.training.checkpoint import read_description

        with answered():
            if method == "train":
                task = self._task(self._trainers, request)
                weights = os.path.join(self.models[request["model"]], "models", "model.pt")
                try:
                    named_targets(task.named(request), tuple(read_description(weights)["targets"]))
                except CaseError as error:
                    raise BadRequest(str(error)) from None
                options = {key: value for key, value in task.config().items() if key != "annotated"}
                return check_training(request, options, devices(), len(self.datastore().get_labeled_images()))
            if method == "batch_infer":
                return self._task(self._infers, request).checked(request)
            asked, known = request.get("method"), list(self._scoring_methods)
            if method == "scoring" and asked not in known:
                raise BadRequest(f"there is no scoring method '{asked}'; there are {known}", 404)
            return request

    def next_sample(self, request: dict[str, Any]) -> dict[str, Any]:
        with answered():
            asked = request.get("strategy", "random")
            if asked not in self._strategies:
                raise BadRequest(f"there is no strategy '{asked}'; there are {list(self._strategies)}", 404)
            return super().next_sample(request)

    # ---- background tasks -------------------------------------------------------------------------------------

    def on_init_complete(self) -> None:
        check_background_tasks()
        super().on_init_complete()

    def async_scoring(self, method: str | None, params: Any = None) -> Any:
        """Scoring that nobody asked for (at the start, after a training, with every sample) where an image lacks a score;
        never of a DICOMweb server, of which it would fetch every series."""
        if method:
            return super().async_scoring(method, params)
        remote = isinstance(self.datastore(), NamedSegments)
        due = [task for task in self._scoring_methods.values() if not remote and task.due(self.datastore())]
        return super().async_scoring(None, params) if due else {}


def check_background_tasks() -> None:
    """MONAI Label starts a process before it looks at a request for training; let the app look first."""
    start = AsyncTask.run
    if getattr(start, "checks", False):
        return

    def run(method: str, request: Any = None, params: Any = None, **options: Any) -> Any:
        checked = app_instance().check_task(method, {**(request or {}), **(params or {})})
        return start(method, request=checked, params=None, **options)

    run.checks = True
    AsyncTask.run = staticmethod(run)
