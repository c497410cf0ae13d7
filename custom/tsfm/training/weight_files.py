"""Weight files as files: written with checksums, verified and read without executing anything.

``.pt`` is torch's zip of tensors and plain values; safetensors carries its checksum in its metadata.
"""

from __future__ import annotations

import os
import pickle
import re
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

CHECKSUM = "crc32"
"""Entry of a safetensors file's metadata."""

AGAIN = "download or copy it again"

_VERIFIED: set[tuple[str, int, int]] = set()

SCALAR = np.float64(0).__reduce__()[0]

NUMPY_SCALARS = [
    (np.dtype, "numpy.dtype"),
    (SCALAR, "numpy.core.multiarray.scalar"),
    (SCALAR, "numpy._core.multiarray.scalar"),
    *(type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "u1", "?")),
]
"""What a weight file may hold besides tensors and plain values: the logs in nnU-Net's are full of such numbers."""


class CheckpointError(ValueError):
    """A weight file that is missing, unsafe, or does not hold what is needed."""


def write_state(state: Mapping[str, torch.Tensor], path: str, safetensors: bool) -> None:
    """Write tensors to `path`, with checksums: the zip of ``.pt`` has one per record, safetensors gets one of all."""
    if safetensors:
        from safetensors.torch import save_file

        save_file(dict(state), path, metadata={CHECKSUM: _checksum(state)})
    else:
        write_pt(state, path)


def write_pt(content: Any, path: str) -> None:
    """`torch.save` whose bytes do not depend on the file's name, and that tells a full disk from a defect (OSError)."""
    with open(path, "wb") as file:
        torch.save(content, file)


def load_pt(path: str, mmap: bool = True, checked: bool = False) -> Any:
    """Plain values and tensors of a ``.pt`` file, its checksums compared first (unless another process has `checked` them); the
    tensors are mapped, unless not `mmap`.

    Raises:
        CheckpointError: a damaged file, or a pickle that holds more than tensors and plain values.
    """
    is_zip = _is_zip(path)
    if is_zip and not checked:
        _verify_zip(path)
    try:
        # Files in the format before torch 1.6 cannot be mapped.
        with torch.serialization.safe_globals(NUMPY_SCALARS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and is_zip)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it names {named[1]}" if named else str(error).splitlines()[0]
        raise CheckpointError(
            f"{path} is refused: it is damaged, or a pickle with code in it instead of tensors and plain values only "
            f"({reason}). Ask its author for a state dict or safetensors."
        ) from None
    except Exception as error:  # the unpickler stumbles over damaged bytes in any way
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(f"{path} is not a readable PyTorch weight file ({reason}): {AGAIN}") from None


def _is_zip(path: str) -> bool:
    """Whether a file ends as a zip does, or pretends to."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # a damaged end that speaks of several disks
        return True


def _verify_zip(path: str) -> None:
    """Compare the checksums of a ``.pt`` file's records, which torch writes and does not read; once per process."""
    state = os.stat(path)
    identity = os.path.abspath(path), state.st_size, state.st_mtime_ns
    if identity in _VERIFIED:
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # a damaged directory of the archive misleads its reader in any way
        damaged = f"{type(error).__name__}: {error}".splitlines()[0]
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged: its checksums do not fit its content ({damaged}): {AGAIN}")
    _VERIFIED.add(identity)


def _load_safetensors(path: str) -> dict[str, torch.Tensor]:
    from safetensors import safe_open
    from safetensors.torch import load_file

    try:
        state = load_file(path)
        with safe_open(path, framework="pt") as file:
            expected = (file.metadata() or {}).get(CHECKSUM)
    except Exception as error:
        raise CheckpointError(f"{path} is not a readable safetensors file ({error}): {AGAIN}") from None
    if expected not in (None, _checksum(state)):
        raise CheckpointError(f"{path} is damaged: its checksum does not fit its content: {AGAIN}")
    return state


def _checksum(state: Mapping[str, torch.Tensor]) -> str:
    """CRC-32 (hexadecimal) of names, types, shapes and values."""
    value = 0
    for name, tensor in sorted(state.items()):
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy(), value)
    return f"{value:08x}"


def misfits(found: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> list[str]:
    """In words, what is in the way of the tensors of a file (`found`) into a network (its `own`)."""
    shapes = {key: (tuple(found[key].shape), tuple(own[key].shape)) for key in own if key in found}
    return [
        *(f"missing {key}" for key in own if key not in found),
        *(f"unexpected {key}" for key in found if key not in own),
        *(f"{key}: file {theirs}, network {ours}" for key, (theirs, ours) in shapes.items() if theirs != ours),
    ]


def load_file(path: str) -> dict[str, Any]:
    """What a weight file holds, as it is, the tensors of ``.pt`` files mapped.

    Raises:
        CheckpointError: as `read_state`.
    """
    if not os.path.isfile(path):
        what = "is a folder; name a file in it, like model.pt" if os.path.isdir(path) else "does not exist"
        raise CheckpointError(f"weight file {os.path.abspath(path)} {what}")
    if path.endswith(".safetensors"):
        return _load_safetensors(path)
    state = load_pt(path)
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path}: holds a {type(state).__name__}, expected a state dict")
    return dict(state)
