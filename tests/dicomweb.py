"""A DICOMweb server in memory for tests: search for series, retrieve a series or its metadata, store instances.

Run it with the Python of MONAI Label's environment (pydicom 2): ``dicomweb.py PORT FOLDER`` serves the files in FOLDER, and
writes there what is stored. It answers what dicomweb-client asks, no more.
"""

import json
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import pydicom

SHOWN = ("StudyInstanceUID", "SeriesInstanceUID", "Modality", "PatientID", "StudyDate", "StudyTime")


class Server(BaseHTTPRequestHandler):
    """QIDO-RS, WADO-RS and STOW-RS below ``/``."""

    folder: Path

    def instances(self, **wanted):
        """Data sets whose attributes are those wanted, with the bytes of their files."""
        for path in sorted(self.folder.glob("*.dcm")):
            found = pydicom.dcmread(path)
            if all(str(found.get(key, "")) == value for key, value in wanted.items()):
                yield found, path.read_bytes()

    def do_GET(self):
        url = urlsplit(self.path)
        wanted = {key: value for key, value in parse_qsl(url.query) if key in SHOWN}
        if url.path == "/series":
            series = {found.SeriesInstanceUID: found for found, _ in self.instances(**wanted)}
            shown = [[found[key] for key in SHOWN if key in found] for found in series.values()]
            return self.answer_json([_plain(elements) for elements in shown])
        study, uid, metadata = re.fullmatch(r"/studies/([\d.]+)/series/([\d.]+)(/metadata)?", url.path).groups()
        found = list(self.instances(StudyInstanceUID=study, SeriesInstanceUID=uid))
        if metadata:
            return self.answer_json([_plain(e for e in one if e.keyword != "PixelData") for one, _ in found])
        parts = [b"--x\r\nContent-Type: application/dicom\r\n\r\n" + content + b"\r\n" for _, content in found]
        self.answer(b"".join([*parts, b"--x--"]), 'multipart/related; type="application/dicom"; boundary=x')

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
        stored = pydicom.Dataset()
        stored.ReferencedSOPSequence = []
        for part in body.split(b"--" + boundary)[1:-1]:
            content = part.split(b"\r\n\r\n", 1)[1].removesuffix(b"\r\n")
            found = pydicom.dcmread(BytesIO(content))
            (self.folder / f"{found.SOPInstanceUID}.dcm").write_bytes(content)
            reference = pydicom.Dataset()
            reference.ReferencedSOPInstanceUID = found.SOPInstanceUID
            path = (
                f"/studies/{found.StudyInstanceUID}/series/{found.SeriesInstanceUID}/instances/{found.SOPInstanceUID}"
            )
            reference.RetrieveURL = f"http://{self.headers['Host']}{path}"
            stored.ReferencedSOPSequence.append(reference)
        self.answer_json(stored.to_json_dict())

    def answer_json(self, content):
        self.answer(json.dumps(content).encode(), "application/dicom+json")

    def answer(self, content, kind):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _plain(elements):
    data = pydicom.Dataset()
    for element in elements:
        data.add(element)
    return data.to_json_dict()


if __name__ == "__main__":
    Server.folder = Path(sys.argv[2])
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Server).serve_forever()
