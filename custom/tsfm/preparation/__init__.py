"""Preparation: a case on its own grid becomes a normalized case on the target grid, by nnU-Net's rules.

Volumes and a `Preparation` enter; prepared arrays and fingerprints of data sets leave. It must not know how patches are
drawn or what a network is.
"""
