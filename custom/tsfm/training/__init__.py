"""Training: steps, curve, record and state of a run, and the weight files with their description.

A network, its optimizer and batches enter; checkpoints that resume bit for bit leave. It must not know of inference or
scores of whole cases.
"""
