"""TSFM: a 1.6 B parameter tumor segmentation foundation model for MONAI bundles.

Bundles reference it by full addresses (``tsfm.network.tsfm_net.TSFM``) and a release carries it whole; what only this
repository needs (phantoms, paper tables, releases) is in ``tsfm_tools``, which nothing here may import.
"""

from ._version import __version__

__all__ = ["__version__"]
