"""Commands that a release does not carry: phantoms, gate, export."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any


def phantoms(
    output_dir: str,
    cases_per_dataset: int | None = None,
    seed: int = 0,
    layouts: str = "demo",
    size: Sequence[int] | None = None,
) -> None:
    """Write a pool of CT-like and MR-like phantoms as NIfTI files in the layouts of the real data sets.

    Args:
        output_dir: folder for the data sets.
        cases_per_dataset: cases of each; by default 6 (all_ten: 1).
        seed: the same seed gives the same files.
        layouts: "demo" (four data sets), "all_ten" (every layout of the paper's pool), "downstream" (BraTS2020,
            KiTS2019 and AbdomenCT-1K) or one of "brats2020", "kits19", "abdomenct1k".
        size: about how many voxels a case has along (S, P, L); by default what suits the layout.
    """
    from .phantoms import layouts as writers

    cases = (1 if layouts == "all_ten" else 6) if cases_per_dataset is None else cases_per_dataset
    if cases < 1:
        raise ValueError(f"cases_per_dataset is {cases}; expected 1 or more")
    if size is not None and (isinstance(size, int) or len(size) != 3):
        raise ValueError(f"size is {size!r}; expected three numbers of voxels along (S, P, L), like [64,80,96]")
    write = {"demo": writers.write_pool, "all_ten": writers.write_all_ten, **writers.DOWNSTREAM}
    names = list(writers.DOWNSTREAM) if layouts == "downstream" else [layouts]
    if not write.keys() >= set(names):
        raise ValueError(f"layouts is {layouts!r}; expected one of {[*write, 'downstream']}")
    for name in names:
        write[name](output_dir, cases, seed=seed, **({} if size is None else {"size": tuple(size)}))
    print(f"phantoms written below {os.path.abspath(output_dir)}")


def gate(bundle_dir: str) -> None:
    """Run the Model Zoo's checks that can run here on a bundle's folder; exit code 1 if one fails."""
    from .release.gate import format_table
    from .release.gate import gate as run

    rows = run(bundle_dir)
    print(format_table(rows))
    if any(row.result == "FAIL" for row in rows):
        sys.exit(1)


def export(checkpoint: str, output_file: str, format: str = "torchscript", patch_size: Any = None) -> None:
    """Export the network of a weight file and compare the outputs: TorchScript, torch.export (.pt2) or ONNX.

    Args:
        checkpoint: model.pt, a training checkpoint or safetensors.
        output_file: what to write; the weights' description goes beside it as JSON.
        format: "torchscript", "export" or "onnx".
        patch_size: the window (S, P, L); by default the one that the weights were trained with.
    """
    from .release.export import export as run

    difference = run(checkpoint, output_file, format, patch_size)
    print(f"{output_file}: logits differ from the network's by at most {difference:.1g} of the largest")


def trt_export(**arguments: Any) -> None:
    """MONAI's trt_export, with its arguments by name, once it is sure that this machine can build for TensorRT."""
    import torch

    from .release.export import ExportError

    if not torch.cuda.is_available():
        raise ExportError("trt_export builds for the GPU that it runs on, and this machine shows none")
    if find_spec("torch_tensorrt") is None:
        raise ExportError("trt_export needs torch_tensorrt: pip install torch-tensorrt")
    from monai.bundle import trt_export as run

    run(**arguments)
