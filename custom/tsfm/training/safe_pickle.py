"""Pickles of other projects, read without executing anything: plain values and numpy arrays only."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from typing import Any

import numpy as np

from .weight_files import CheckpointError

KINDS = "biufcSU"
"""numpy's numbers and texts: types without pointers, whose bytes may be anything."""


class _Type:
    """A data type by its name and byte order; what else its pickle may say of fields and flags is refused."""

    def __init__(self, name: str, align: bool = False, copy: bool = False) -> None:
        self.type = np.dtype(name)
        if self.type.kind not in KINDS:
            raise pickle.UnpicklingError(f"it holds values of the type {name!r}")

    def __setstate__(self, state: tuple) -> None:
        _, order, *more = state
        if any(part is not None for part in more[:3]):
            raise pickle.UnpicklingError(f"it holds values of a type with {more[:3]}")
        self.type = self.type.newbyteorder(order)


class _Array(np.ndarray):
    """An array that takes nothing but a shape, a `_Type` and bytes of exactly that size."""

    def __setstate__(self, state: tuple) -> None:
        _, shape, kind, is_fortran, content = state
        array = np.frombuffer(content, kind.type).reshape(shape, order="F" if is_fortran else "C")
        super().__setstate__(array.__reduce__()[2])


def _scalar(kind: _Type, content: bytes) -> np.generic:
    (value,) = np.frombuffer(content, kind.type)
    return value


ALLOWED = {
    ("collections", "OrderedDict"): OrderedDict,
    ("numpy", "ndarray"): None,  # named by arrays, never called
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): lambda text, encoding: text.encode(encoding),
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "_reconstruct"): lambda kind, shape, code: _Array(0) for core in ("core", "_core")},
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
