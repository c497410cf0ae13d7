"""The audit of a pool: what in its data would spoil a training or its scores, found before either.

Pools enter, findings leave, as JSON and as a page with pictures. It measures every case once (`measures`, kept on disk),
compares cases (`signature`, `duplicates`) and data sets (`checks`, `overlaps`), and knows nothing of networks or training.
"""
