"""Phantoms: CT-like and MR-like bodies, written in the layouts of the real data sets.

A seed enters; folders of NIfTI files with labels leave. It must not know how they are read.
"""
