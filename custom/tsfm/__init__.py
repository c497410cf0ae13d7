"""TSFM: a 1.6 B parameter tumor segmentation foundation model for MONAI bundles."""

from importlib import import_module

from ._version import __version__
from .memory import use_huge_pages

use_huge_pages()

_EXPORTS = {
    "LabelTable": "labels",
    "DatasetPool": "pool",
    "Preparation": "preprocessing",
    "PrepareImaged": "preprocessing",
    "CaseStore": "store",
    "PatchDataset": "dataset",
    "PoolSampler": "dataset",
    "TSFM": "network",
    "PartialLabelLoss": "loss",
    "load_pretrained": "transfer",
    "SlabInferer": "inference",
    "read_description": "checkpoint",
}
__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str):
    """Load a top-level name on first use: torch and MONAI take seconds, `import tsfm` should not."""
    if name in _EXPORTS:
        return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
