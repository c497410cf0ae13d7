"""Patches: prepared cases are stored once and read a box at a time, drawn by 1/sqrt(n) and augmented.

Datalist items and a preparation enter; batches of patches with label codes leave. It must not know of networks or losses.
"""
