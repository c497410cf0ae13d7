"""What a request to the MONAI Label server may say, checked before anything runs. Every refusal is a sentence.

Nothing here knows MONAI Label: the options that a model has come in as it shows them to a client, a list of choices, a
number or a switch each.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

PROMPTS = (
    *("foreground", "background", "points", "point_labels", "boundingbox", "bounding_box", "roi", "label_prompt"),
    *("scribbles", "label"),
)
"""Clicks, boxes and scribbles as clients of MONAI Label send them; empty lists mean none."""

BELOW_ONE = {"threshold": False, "overlap": True}
"""Numbers below 1, and whether 0 is one of them."""

EXTENSIONS = (".nii.gz", ".nii", ".nrrd", ".seg.nrrd", ".mha")

FINAL = "final"
"""MONAI Label's tag of labels that were submitted."""

DTYPES = ("uint8", "uint16", "int16", "int32", "float32")


class BadRequest(ValueError):
    """A request that cannot be served, with the HTTP status of the answer."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


def check_inference(
    request: Mapping[str, Any], options: Mapping[str, Any], devices: Sequence[str], prompts: bool
) -> dict:
    """The request with numbers and switches as such, whatever text they came as.

    Args:
        options: what the model offers: name -> its choices (a list), or its default (a number or a switch).
        devices: names of the server's devices.
        prompts: whether the model takes clicks.

    Raises:
        BadRequest: an option that is nearly one of these, a value that none of them takes, prompts for a model without.
    """
    given = [name for name in PROMPTS if not isinstance(request.get(name), bool) and request.get(name)]
    if given and not prompts:
        raise BadRequest(
            f"this model takes no clicks, boxes or scribbles, and the request has {given}: leave them out, or choose a model "
            "that takes them"
        )
    checked = {**request, **_options(request, options, devices)}
    one_of("result_extension", request.get("result_extension") or EXTENSIONS[0], EXTENSIONS)
    one_of("result_dtype", request.get("result_dtype") or DTYPES[0], DTYPES)
    return checked


def check_training(request: Mapping[str, Any], options: Mapping[str, Any], devices: Sequence[str], labels: int) -> dict:
    """The request to train, checked as `check_inference` does.

    Args:
        labels: number of images with a submitted label.

    Raises:
        BadRequest: no label; what cannot be meant; a split that leaves nothing to train on.
    """
    checked = {**request, **_options(request, options, devices)}
    checked["max_epochs"] = whole("max_epochs", request.get("max_epochs", options.get("max_epochs", 50)))
    split = checked["val_split"] = number("val_split", request.get("val_split", options.get("val_split", 0.2)))
    if not 0 <= split < 1:
        raise BadRequest(
            f"val_split is {split:g}, expected a share of the labeled images from 0 to below 1 (0.2: a fifth)"
        )
    gpus = checked["gpus"] = "all" if request.get("gpus") in (None, "") else str(request["gpus"])
    known = [str(number) for number in range(sum(device.startswith("cuda:") for device in devices))]
    if gpus != "all" and not set(gpus.split(",")) <= set(known):
        raise BadRequest(
            f"gpus is {gpus!r}; this server has {', '.join(known) or 'none'}: expected numbers of these, or all"
        )
    if not labels:
        raise BadRequest(
            f"there is nothing to train on: submit labels first (no image has one that is tagged '{FINAL}')"
        )
    if labels * (1 - split) < 0.5:  # MONAI rounds to the nearest number
        raise BadRequest(f"val_split {split:g} leaves none of the {labels} labeled images to train on: lower it")
    return checked


def check_image(path: str, image: str, images: Iterable[str]) -> None:
    """BadRequest (404) where an image's name leads to no file; its content is looked at when it is read."""
    if not path or not os.path.exists(path):
        raise BadRequest(f"there is no image '{image}' on this server{_nearest(image, images)}", 404)


def _nearest(word: Any, known: Iterable[Any], cutoff: float = 0.6) -> str:
    near = difflib.get_close_matches(str(word), list(map(str, known)), 1, cutoff)
    return f" (did you mean '{near[0]}'?)" if near else ""


def _options(request: Mapping[str, Any], options: Mapping[str, Any], devices: Sequence[str]) -> dict[str, Any]:
    """The values of those options that the request sets."""
    for name in request:
        hint = _nearest(name, [option for option in options if option not in request], 0.8)
        if name not in options and hint:
            raise BadRequest(f"there is no option '{name}'{hint}; it would change nothing")
    given = {name: request[name] for name in options if request.get(name) is not None}
    meant = {name: options[name] if value == "" else value for name, value in given.items()}  # "": a field left empty
    return {name: _value(name, value, options[name], devices) for name, value in meant.items()}


def _value(name: str, value: Any, offered: Any, devices: Sequence[str]) -> Any:
    if name == "device":
        one_of(name, value, devices, "this server has")
        return value
    if isinstance(offered, bool):
        return switch(name, value)
    if name in BELOW_ONE:
        return _below_one(name, value)
    if isinstance(offered, list | tuple):
        one_of(name, value, offered)
    return value


def one_of(name: str, value: Any, choices: Sequence[str], there_are: str = "choose from") -> None:
    """BadRequest unless `value`, or everything in it where it is a list, is one of the choices."""
    values = list(value) if isinstance(value, list | tuple) else [value]
    wrong = [one for one in values if one not in choices]
    if wrong or not values:
        hint = _nearest((wrong or [""])[0], choices)
        raise BadRequest(f"{name} is {value!r}{hint}; {there_are}: {', '.join(map(str, choices)) or 'nothing'}")


def switch(name: str, value: Any) -> bool:
    """True or False, of itself or of the text of it."""
    known = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False, "on": True, "off": False}
    text = str(value).strip().lower()
    if text not in known:
        raise BadRequest(f"{name} is {value!r}, expected true or false")
    return known[text]


def number(name: str, value: Any) -> float:
    """A finite number, of itself or of the text of it."""
    try:
        if isinstance(value, bool) or not math.isfinite(float(value)):
            raise ValueError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise BadRequest(f"{name} is {value!r}, expected a number") from None


def whole(name: str, value: Any) -> int:
    """A whole number from 1."""
    if isinstance(value, bool) or not number(name, value).is_integer() or float(value) < 1:
        raise BadRequest(f"{name} is {value!r}, expected a whole number from 1")
    return int(float(value))


def _below_one(name: str, value: Any) -> float:
    found = number(name, value)
    if not (0 <= found < 1 if BELOW_ONE[name] else 0 < found < 1):
        expected = "from 0 to below 1" if BELOW_ONE[name] else "above 0 and below 1"
        raise BadRequest(f"{name} is {value!r}, expected a number {expected}")
    return found
