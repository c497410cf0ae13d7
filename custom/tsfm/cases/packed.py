"""Where a NRRD or MetaImage header says that its voxels are, and whether they are whole.

ITK ignores checksums, and of MetaImage even zlib's errors.
"""

from __future__ import annotations

import os
import re
import zlib
from typing import NamedTuple

from ..errors import CaseError

_HEADER_BYTES = 1 << 16

_PIECE = 1 << 20

_LIST = re.compile(rb"^(?:ElementDataFile|data ?file)[ \t]*[:=][ \t]*LIST\b[^\n]*\n", re.MULTILINE | re.IGNORECASE)

_PATTERN = re.compile(r"([^\s%]*%\d*[di][^\s%]*) +(-?\d+) +(-?\d+)(?: +(-?[1-9]\d*))?(?: +\d+)?")
"""Files numbered from a first to a last by a step, and (NRRD) how many axes each holds."""


class _Header(NamedTuple):
    """Whether it is NRRD's, its fields (keys in lower case), the file of its voxels ("": its own), where it ends if known."""

    nrrd: bool
    field: dict[str, str]
    name: str
    end: int | None


def _header(path: str) -> _Header:
    with open(path, "rb") as file:
        head = file.read(_HEADER_BYTES)
    nrrd = head.startswith(b"NRRD")
    end = re.search(rb"\r?\n\r?\n" if nrrd else rb"^ElementDataFile[ \t]*[=:][^\n]*\n?", head, re.MULTILINE)
    text = head[: end.end() if end else None].decode("utf-8", "surrogateescape")
    field = {
        key.strip().lower(): value.strip()
        for key, value in re.findall(r"^([\w ]+?)[ \t]*[:=](.*)$", text, re.MULTILINE)
    }
    name = field.get("data file", field.get("datafile", "")) if nrrd else field.get("elementdatafile", "")
    return _Header(nrrd, field, "" if not nrrd and name.upper() == "LOCAL" else name, end and end.end())


def data_files(path: str) -> list[str]:
    """The other files that hold the voxels of a NRRD or MetaImage header, whether they exist or not: one, a list or a pattern."""
    name = _header(path).name
    names = [name] if name else []
    if name.upper().split(" ")[0] == "LIST":
        with open(path, "rb") as file:
            listed = _LIST.split(file.read(), maxsplit=1)[-1]
        names = [line.strip() for line in listed.decode("utf-8", "surrogateescape").splitlines() if line.strip()]
    elif match := _PATTERN.fullmatch(name):
        first, last, step = int(match[2]), int(match[3]), int(match[4] or 1)
        names = [match[1] % number for number in range(first, last + (1 if step > 0 else -1), step)]
    return [os.path.join(os.path.dirname(path), name) for name in names]


def voxel_bytes(path: str) -> int | None:
    """Bytes of voxels that the file (or the one beside it that it names) holds, decompressed; None where not known.

    Raises:
        CaseError: a compressed stream that is damaged or cut, by its own checksum.
    """
    nrrd, field, name, end = _header(path)
    if nrrd:
        encoding = field.get("encoding", "").lower()
        skips = any(int(field.get(key, "0") or 0) for key in ("line skip", "lineskip", "byte skip", "byteskip"))
    else:
        encoding = "raw" if field.get("binarydata") == "True" else "text"
        encoding = "gzip" if field.get("compresseddata") == "True" else encoding
        skips = int(field.get("headersize", "0") or 0) != 0
    if encoding not in ("raw", "gzip", "gz") or skips or (not name and end is None):
        return None
    data = os.path.join(os.path.dirname(path), name) if name else path
    if not os.path.isfile(data):  # a list or a pattern of files; ITK names what is missing
        return None
    start = 0 if name else end
    return os.path.getsize(data) - start if encoding == "raw" else _unpacked(data, start, path)


def _unpacked(data: str, start: int, path: str) -> int:
    """Size of a zlib or gzip stream once decompressed; its end proves the checksum."""
    stream, size = zlib.decompressobj(47), 0
    try:
        with open(data, "rb") as file:
            file.seek(start)
            while not stream.eof and (piece := file.read(_PIECE)):
                size += len(stream.decompress(piece))
    except zlib.error as error:
        raise CaseError(f"{path}: its compressed voxels are damaged ({error}); copy or download it again") from error
    if not stream.eof:
        raise CaseError(f"{path}: its compressed voxels end too early; copy or download it again")
    return size
