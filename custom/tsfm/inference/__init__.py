"""Inference: a prepared volume becomes a label map on the input's own grid, in bounded memory.

Images and a network enter; uint8 label maps leave. It must not know the truth.
"""
