"""The network and its loss, and what a device wants of them (layout, precision, sharding).

Patches (B, C, S, P, L) and label codes enter; logits per target and a loss leave. It must not know where patches come from
or how a run is kept.
"""
