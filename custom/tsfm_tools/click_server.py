"""Clicks from 3D Slicer's SlicerNNInteractive extension: the three routes it needs for points, for one target of a bundle.

The extension uploads voxels without their grid, which preparation needs; so the image is found again, by its voxels, in a
folder of files. An existing segment is no prior: it starts from the automatic result, and selecting a segment forgets the clicks.
"""

from __future__ import annotations

import gzip
import io
import json
import logging
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.transforms import Compose
from tsfm.cases.folders import find_images
from tsfm.cases.volumes import read_grid, read_volume
from tsfm.errors import first_cause
from tsfm.inference.prediction import root_cause
from tsfm.inference.saving import SaveResultsd
from tsfm.network.clicks import ClickError
from tsfm.options import check_texts
from tsfm.training.checkpoint import load_weights

logger = logging.getLogger(__name__)

LARGEST_BODY = 2**32
"""Bytes of a request: a scan of 512x512x2000 voxels in float64."""

NO_IMAGE = "No image uploaded"
"""The extension uploads its image again where a message holds this."""


class ClickRequests:
    """A bundle's inference as a server runs it: an image and a request in, a label map on the file's own grid out.

    Args:
        bundle_dir: its ``configs/inference.json`` is used, with other values for the ids in `settings`.
    """

    def __init__(self, bundle_dir: str | os.PathLike, **settings: Any) -> None:
        check_texts({"bundle_dir": bundle_dir}, "options")
        parser = ConfigParser()
        parser.read_config(os.path.join(bundle_dir, "configs", "inference.json"))
        parser.config |= {"bundle_root": os.fspath(bundle_dir), "progress": False, **settings}
        ids = ("preprocessing", "inferer", "network", "table", "device", "postprocessing")
        self.prepare, self.inferer, self.network, self.table, self.device, finish = map(parser.get_parsed_content, ids)
        load_weights(self.network, parser.get_parsed_content("checkpoint"))
        self.network.eval()
        self.finish = Compose([step for step in finish.transforms if not isinstance(step, SaveResultsd)])

    def __call__(self, image: Any, **clicks: Any) -> np.ndarray:
        """Label map (I, J, K) of an image file; `clicks` in a form that `ReadClicksd` reads.

        Raises:
            ClickError, CaseError: clicks or an image that cannot be used.
        """
        try:
            data = self.prepare({"image": image, **clicks})
        except RuntimeError as error:
            raise first_cause(error) from None
        with torch.no_grad():
            data["pred"] = self.inferer(data["image"][None].to(self.device), self.network)[0].cpu()
        return np.asarray(self.finish(data)["pred"])[0]


class Session:
    """One image, one target and the clicks so far. Arrays come and go as Slicer holds them, (K, J, I)."""

    def __init__(self, requests: ClickRequests, images: str, target: str) -> None:
        if requests.inferer.sigma is None:
            raise ClickError("these weights have no click channels: train with configs/clicks.json added")
        if target not in requests.table.names:
            raise ClickError(f"the target {target!r} is unknown; these weights have {list(requests.table.names)}")
        self.requests, self.images, self.target, self.image = requests, images, target, None
        self.files = find_images(images)
        self.forget()

    def forget(self) -> None:
        """Begin again, without clicks."""
        self.clicks: dict[str, list] = {"foreground": [], "background": []}

    def upload_image(self, voxels: np.ndarray) -> None:
        """Find the file that holds these voxels; ClickError where none does."""
        self.image, self.files = None, find_images(self.images)
        wanted, alike = voxels.T, 0
        for path in (item["image"] for item in self.files):
            try:
                if read_grid(path).shape != wanted.shape:
                    continue
                found = read_volume(path).array[0]
            except Exception as error:  # one that cannot be read is no reason not to serve the others
                logger.warning("%s is left out: %s", path, root_cause(error))
                continue
            alike += 1
            if np.allclose(found, wanted, rtol=1e-5, atol=1e-3, equal_nan=True):
                self.image = path
                return self.forget()
        raise ClickError(
            f"the uploaded image of {'x'.join(map(str, wanted.shape))} voxels (I, J, K) is none of the {len(self.files)} images "
            f"of this server ({alike} have its size): start it with --images and the folder that Slicer loaded it from"
        )

    def add_point(self, voxel: list[int], inside: bool) -> np.ndarray:
        """The target's mask (K, J, I) with one more click, at a voxel [k, j, i]; one that leads to an error is forgotten.

        Raises:
            ClickError: no image yet, or a click outside of it.
        """
        if self.image is None:
            raise ClickError(NO_IMAGE)
        clicks = self.clicks["foreground" if inside else "background"]
        clicks.append(list(voxel)[::-1])
        try:
            found = self.requests(self.image, label=self.target, **self.clicks)
        except Exception:
            clicks.pop()
            raise
        holds = self.requests.table.map_membership()[:, self.requests.table.names.index(self.target)]
        return np.ascontiguousarray(holds[found].T)


def click_server(
    bundle_dir: str, images: str, target: str, host: str = "127.0.0.1", port: int = 1527, device: str | None = None
) -> None:
    """Serve one target of a promptable bundle to 3D Slicer's SlicerNNInteractive extension, until it is interrupted.

    Args:
        bundle_dir: a release of weights with click channels (`..._deepedit`).
        images: the folder of the images that Slicer opens.
        target: what the clicks are about.
        host, port: where to listen; the extension asks http://HOST:PORT. There is no password.
        device: "cuda" or "cpu"; by default a GPU where there is one.
    """
    settings = {"device": torch.device(device)} if device else {}
    session = Session(ClickRequests(bundle_dir, **settings), images, target)
    with serve(session, host, port) as server:
        print(f"{target} of {bundle_dir}, {len(session.files)} images: http://{host}:{server.server_port}", flush=True)
        server.serve_forever()


def serve(session: Session, host: str, port: int) -> ThreadingHTTPServer:
    """An HTTP server of `session`; port 0 takes a free one."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            try:
                length = self.headers.get("Content-Length", "0")
                if not length.isdecimal() or int(length) > LARGEST_BODY:
                    raise ClickError(f"a request of {length} bytes; expected at most {LARGEST_BODY}")
                body = self.rfile.read(int(length))
                with lock:
                    answer = _answer(session, self.path, body, self.headers.get("Content-Type", ""))
            except Exception as error:  # said in the extension's window
                logger.warning("%s: %s", self.path, root_cause(error), exc_info=not isinstance(error, ValueError))
                answer = {"status": "error", "message": root_cause(error)}
            packed = isinstance(answer, bytes)
            content = answer if packed else json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/octet-stream" if packed else "application/json")
            self.send_header("Content-Length", str(len(content)))
            if packed:
                self.send_header("Content-Encoding", "gzip")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    return ThreadingHTTPServer((host, port), Handler)


def _answer(session: Session, path: str, body: bytes, kind: str) -> dict[str, str] | bytes:
    """JSON, or the mask as gzip of its bits (K, J, I), as the extension unpacks it."""
    if path == "/upload_image":
        session.upload_image(np.load(io.BytesIO(_file(body, kind))))
    elif path == "/upload_segment":
        session.forget()
    elif path == "/add_point_interaction":
        point = json.loads(body)
        mask = session.add_point(point["voxel_coord"], bool(point["positive_click"]))
        return gzip.compress(np.packbits(mask).tobytes(), 1)
    else:
        raise ClickError(f"{path}: this server takes points only (no boxes, lassos or scribbles)")
    return {"status": "ok"}


def _file(body: bytes, kind: str) -> bytes:
    """The first file of a multipart form."""
    boundary = b"\r\n--" + kind.partition("boundary=")[2].strip('"').encode()
    start = body.index(b"\r\n\r\n") + 4
    return body[start : body.index(boundary, start)]
