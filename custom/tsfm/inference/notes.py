"""Keys of an image's meta data, under which a step of inference notes something for a later one."""

CLICKS = "clicks"
"""JSON, a list of [kind, name, [x, y, z] in mm]; kind "inside", "outside" or "label"."""

COMPUTED = "computed"
"""JSON, a list: the targets that a label map could hold. A text, since a list would count as a batch."""
