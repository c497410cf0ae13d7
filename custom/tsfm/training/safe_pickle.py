"""Pickles of other projects, read without executing anything: plain values and numpy arrays only."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from typing import Any

import numpy as np

from .weight_files import SCALAR, CheckpointError

RECONSTRUCT = np.empty(0).__reduce__()[0]

ALLOWED = {
    ("collections", "OrderedDict"): OrderedDict,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): lambda text, encoding: text.encode(encoding),
    **{(f"numpy.{core}.multiarray", "scalar"): SCALAR for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "_reconstruct"): RECONSTRUCT for core in ("core", "_core")},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return ALLOWED[module, name]


def read_pickle(path: str) -> Any:
    """What `path` holds.

    Raises:
        CheckpointError: no such file, damaged, or anything in it but plain values and numpy arrays; names what.
    """
    try:
        with open(path, "rb") as file:
            return _Unpickler(io.BytesIO(file.read())).load()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except Exception as error:  # damaged bytes make the unpickler fail in any way
        raise CheckpointError(
            f"{path} is refused: it is damaged, or a pickle with code in it instead of plain values and arrays ({error})"
        ) from None
