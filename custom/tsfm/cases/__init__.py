"""Cases: what lies on disk becomes datalist items and checked volumes with affine and label codes.

Folders, pool files and image files enter; items, voxels and their geometry leave. It must not know of preparation,
networks or runs.
"""
