"""Whether the voxels of a NRRD or MetaImage file are whole: ITK ignores checksums, and of MetaImage even zlib's errors."""

from __future__ import annotations

import os
import re
import zlib

from ..errors import CaseError

_HEADER_BYTES = 1 << 16

_PIECE = 1 << 20


def voxel_bytes(path: str) -> int | None:
    """Bytes of voxels that the file (or the one beside it that it names) holds, decompressed; None where not known.

    Raises:
        CaseError: a compressed stream that is damaged or cut, by its own checksum.
    """
    with open(path, "rb") as file:
        head = file.read(_HEADER_BYTES)
    nrrd = head.startswith(b"NRRD")
    end = re.search(rb"\r?\n\r?\n" if nrrd else rb"^ElementDataFile *= *[^\n]*\n?", head, re.MULTILINE)
    text = head[: end.end() if end else None].decode("latin-1")
    field = {
        key.strip().lower(): value.strip() for key, value in re.findall(r"^([\w ]+?) *[:=](.*)$", text, re.MULTILINE)
    }
    if nrrd:
        name, encoding = field.get("data file", field.get("datafile", "")), field.get("encoding", "").lower()
        skips = any(int(field.get(key, "0") or 0) for key in ("line skip", "lineskip", "byte skip", "byteskip"))
    else:
        name, encoding = field.get("elementdatafile", ""), "raw" if field.get("binarydata") == "True" else "text"
        encoding = "gzip" if field.get("compresseddata") == "True" else encoding
        skips, name = int(field.get("headersize", "0") or 0) != 0, "" if name.upper() == "LOCAL" else name
    if encoding not in ("raw", "gzip", "gz") or skips or (not name and end is None):
        return None
    data = os.path.join(os.path.dirname(path), name) if name else path
    if not os.path.isfile(data):  # a list or a pattern of files; ITK names what is missing
        return None
    start = 0 if name else end.end()
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
