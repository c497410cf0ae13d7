"""Which part of pretrained weights helps or hurts after transfer: weight files that keep one part, the rest at its start.

    python benchmarks/real_data/parts.py PRETRAINED OUTPUT_FOLDER
    python -m tsfm table3 --grid benchmarks/real_data/parts.json --weights "{...}"       (run.sh has the whole command)

``encoder.pt`` keeps stem, encoder and the steps down, ``bottleneck.pt`` the Transformer, ``decoder.pt`` the steps up and the
decoder. ``shuffled.pt`` is the control: every pretrained tensor with its values in random order, so their size and
spread are the pretraining's and what it learnt is gone. Heads are not among them: a new data set's are new anyway.
"""

import sys
from pathlib import Path

import torch
from tsfm.training.checkpoint import build_network, read_state, save_weights

PARTS = {
    "encoder": ("stem.", "encoder.", "down."),
    "bottleneck": ("bottleneck.",),
    "decoder": ("up.", "decoder."),
}


def main(pretrained: str, output: str) -> None:
    state, description = read_state(pretrained)
    torch.manual_seed(0)
    fresh = build_network(description).state_dict()
    Path(output).mkdir(parents=True, exist_ok=True)
    for name, starts in PARTS.items():
        kept = {key: state[key] if key.startswith(starts) else value for key, value in fresh.items()}
        save_weights(kept, f"{output}/{name}.pt")
    shuffled = dict(fresh)
    for key, value in state.items():
        if value.is_floating_point():
            shuffled[key] = value.flatten()[torch.randperm(value.numel())].reshape(value.shape)
    save_weights(shuffled, f"{output}/shuffled.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
