"""Tools around the package: phantoms, the paper's tables, releases, the demo. Of them only label_app is part of a release.

Configs and weights of finished runs enter; demos, tables and bundle zips leave. The package ``tsfm`` must not import it.
"""
