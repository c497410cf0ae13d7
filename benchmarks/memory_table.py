"""Peak memory of one training step, by arithmetic and a walk on the meta device: no GPU, no memory, a minute.

Prints a table for the paper's patch and 31 targets: the planner's sizes of TSFM (tsfm_h is the paper's), batch, weights'
type, activations kept or recomputed, alone, DDP, and FSDP over 2, 4 and 8 GPUs. SGD with momentum, fused; gigabytes of 1e9
bytes, without the workspace of the convolutions.

    python benchmarks/memory_table.py
"""

from __future__ import annotations

from itertools import product

import torch
from tsfm.network.networks import create_network
from tsfm.planning.families import SIZES
from tsfm.planning.planner import plan_patch
from tsfm.training.step_memory import peak_bytes, walk

PATCH, SPACING_MM, TARGETS = (112, 160, 192), (1.5, 1.0, 1.0), 31
SHARED = {
    "1 GPU": {}, "DDP": {"processes": 2}, "FSDP 2": {"processes": 2, "sharded": True},
    "FSDP 4": {"processes": 4, "sharded": True}, "FSDP 8": {"processes": 8, "sharded": True},
}  # fmt: skip
KINDS = {
    "bfloat16 autocast": {},
    "bfloat16 throughout": {"weight_bytes": 2, "state_bytes": 2},
    "float32": {"amp": False},
}


def main() -> None:
    print("| TSFM | weights | activations | batch | type | " + " | ".join(SHARED) + " |")
    print("|---" * (5 + len(SHARED)) + "|")
    for name in SIZES:
        plan = plan_patch(PATCH, SPACING_MM, name, out_channels=TARGETS)
        with torch.device("meta"):
            network = create_network(in_channels=1, out_channels=TARGETS, img_size=PATCH, plan=plan)
        for batch, recomputed in product((1, 2), (False, True)):
            walked = {amp: walk(network, 1, PATCH, batch, recomputed, amp) for amp in (True, False)}
            for kind, options in KINDS.items():
                steps = walked[options.get("amp", True)]
                peaks = [peak_bytes(steps, recomputed, **options, **more) for more in SHARED.values()]
                cells = [name, f"{steps.weights / 1e6:.0f} M", "recomputed" if recomputed else "kept", batch, kind]
                print(f"| {' | '.join(map(str, [*cells, *(f'{peak / 1e9:.1f}' for peak in peaks)]))} |")


if __name__ == "__main__":
    main()
