"""The network alone, for deployment without Python or without this package: TorchScript, torch.export and ONNX.

What is exported is the network in evaluation mode: one window (B, C, S, P, L) in, logits (B, T, S, P, L) out, B free;
another window is refused. Preparation, sliding windows and painting are not part of it; the description that travels with
the weights says what they have to do. It is in the file's metadata (as ``metadata.json``; in ONNX: the property of that
name), patch included, and beside the file as ``FILE.json``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tsfm.network.described import FixedPatch
from tsfm.training.checkpoint import build_network, load_weights, read_description

TOLERANCE = 1e-4
"""Largest difference of a logit between the exported network and the network itself, relative to the largest logit.

float32 itself is off by 3e-5 of the largest logit, compared with float64, for weights trained on real images.
"""

ONNX_OPSET = 18

ONNX_FILE_BYTES = 2**31 - 2**26  # a protobuf file ends at 2 GiB; larger weights go beside it, into FILE.onnx.data

LARGEST_BATCH = 64

METADATA = "metadata.json"
"""Name under which the description stands in an exported file."""


class ExportError(ValueError):
    """An unknown format, a missing package, or an exported network that computes something else."""


def export(
    checkpoint: str,
    output_file: str,
    format: str = "torchscript",
    patch_size: list[int] | None = None,
    tolerance: float = TOLERANCE,
) -> float:
    """Export the network in `checkpoint`, read the file back, and compare its outputs with the network's.

    Args:
        checkpoint: any weight file of these bundles.
        output_file: ``.ts`` or ``.onnx`` by convention, ``.pt2`` for "export".
        format: "torchscript" (traced), "export" (torch.export) or "onnx" (needs onnx, onnxscript and onnxruntime).
        patch_size: window (S, P, L) in voxels; by default the one that the weights were trained with.
        tolerance: largest difference of a logit that passes, relative to the largest logit.

    Returns:
        the largest such difference, over batches of one and of two windows of noise.

    Raises:
        ExportError: an unknown format or suffix, the checkpoint as `output_file`, a missing package, or a difference above
            `tolerance` (no file is left then).
        ValueError: a window that the network does not take.
    """
    if format not in WRITERS:
        raise ExportError(f"format is {format!r}; expected one of {list(WRITERS)}")
    if format == "export" and not output_file.endswith(".pt2"):
        raise ExportError(f"output_file is {output_file!r}; torch.export reads only files that end in .pt2")
    if os.path.exists(output_file) and os.path.samefile(output_file, checkpoint):
        raise ExportError(f"output_file is {output_file!r}, the checkpoint itself; choose another")
    description = read_description(checkpoint)
    network = build_network(description).eval()
    load_weights(network, checkpoint)
    patch = patch_size or description["patch_size"]
    if not isinstance(patch, list | tuple) or len(patch) != 3:
        raise ExportError(f"patch_size is {patch!r}; expected three numbers of voxels (S, P, L)")
    network.check_size(patch)
    description = {**description, "patch_size": list(patch)}
    window, metadata = (network.in_channels, *description["patch_size"]), json.dumps(description, indent=4)
    os.makedirs(os.path.dirname(os.path.abspath(output_file)), exist_ok=True)
    with torch.no_grad():
        run = WRITERS[format](network, torch.zeros(2, *window), output_file, metadata)
        difference = max(relative_difference(network, run, (batch, *window)) for batch in (1, 2))
    if not difference <= tolerance:
        for path in (output_file, f"{output_file}.data"):
            Path(path).unlink(missing_ok=True)
        raise ExportError(
            f"{output_file}: logits differ from the network's by up to {difference:.2g} of the largest; "
            f"at most {tolerance:g} may"
        )
    Path(f"{output_file}.json").write_text(metadata, encoding="utf-8")
    return difference


def relative_difference(network: nn.Module, run: Callable, shape: tuple[int, ...]) -> float:
    """Largest difference between the logits of `run` and of `network` on noise, as a part of the largest logit."""
    image = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = network(image)
    return ((run(image) - expected).abs().max() / expected.abs().max()).item()


def _torchscript(network: nn.Module, example: torch.Tensor, path: str, metadata: str) -> Callable:
    scripted = torch.jit.script(FixedPatch(network, example.shape[2:]))
    torch.jit.save(scripted, path, _extra_files={METADATA: metadata})
    return torch.jit.load(path)


def _export(network: nn.Module, example: torch.Tensor, path: str, metadata: str) -> Callable:
    torch.export.save(_program(network, example), path, extra_files={METADATA: metadata})
    return torch.export.load(path).module()


def _onnx(network: nn.Module, example: torch.Tensor, path: str, metadata: str) -> Callable:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ExportError(f"format 'onnx' needs {error.name}: pip install onnx onnxscript onnxruntime") from None
    size = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
    options: dict[str, Any] = {"input_names": ["image"], "output_names": ["pred"], "opset_version": ONNX_OPSET}
    program = torch.onnx.export(_program(network, example), (), **options, dynamo=True, verbose=False)
    program.model.metadata_props[METADATA] = metadata
    program.save(path, external_data=size > ONNX_FILE_BYTES)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run(None, {"image": image.numpy()})[0])


def _program(network: nn.Module, example: torch.Tensor) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    return torch.export.export(network, (example,), dynamic_shapes={"x": {0: batch}})


WRITERS: dict[str, Callable[[nn.Module, torch.Tensor, str, str], Callable]] = {
    "torchscript": _torchscript,
    "export": _export,
    "onnx": _onnx,
}
