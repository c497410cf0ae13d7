"""Draw docs/network.png from the network object itself: blocks A to F, widths, stacked blocks, strides, grids and tokens.

python docs/draw_network.py [--output docs/network.png]
"""

import argparse
from math import prod
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.patches import FancyBboxPatch
from tsfm.network.tsfm_net import TSFM

COLORS = {"A": "#cfe3f5", "B": "#dbe9d3", "C": "#f9dcc4", "D": "#e2d4ee", "E": "#fbeeb8", "F": "#f3cfd4"}
NAMES = {
    "A": "stem: 3x3x3 convolution",
    "B": "ResBlock: (IN, LeakyReLU, conv 3x3x3) twice + input",
    "C": "down: ResBlock with stride",
    "D": "Transformer bottleneck",
    "E": "up: interpolation + 1x1x1 convolution, and the skip",
    "F": "head: IN, LeakyReLU, 1x1x1 convolution",
}
LEFT, RIGHT, LEVEL, HEIGHT = 0.0, 11.6, 2.3, 0.62  # x of the two sides, distance of levels, height of a box


def box(axes, letter: str, x: float, y: float, text: str, width: float = 3.6) -> None:
    """A rounded box of one block, centered at (x, y)."""
    corner = (x - width / 2, y - HEIGHT / 2)
    axes.add_patch(
        FancyBboxPatch(corner, width, HEIGHT, "round,pad=0.06", facecolor=COLORS[letter], edgecolor="#444444")
    )
    axes.text(x, y, f"{letter}   {text}".rstrip(), ha="center", va="center", fontsize=9)


def arrow(axes, start: tuple[float, float], end: tuple[float, float], dashed: bool = False) -> None:
    style = {
        "arrowstyle": "-|>",
        "color": "#777777" if dashed else "#222222",
        "linestyle": "--" if dashed else "-",
        "lw": 1.2,
    }
    axes.annotate("", xy=end, xytext=start, arrowprops=style)


def times(values) -> str:
    return "x".join(str(value) for value in values)


def draw(network: TSFM) -> plt.Figure:
    """The U: encoder on the left, decoder on the right, the Transformer at the bottom."""
    size = network.description["network"]["img_size"]
    levels = len(network.encoder)
    figure, axes = plt.subplots(figsize=(13, 11.5))
    half = HEIGHT / 2 + 0.06
    grid = list(size)
    for level, blocks in enumerate(network.encoder):
        y, lowest = -LEVEL * level, level == levels - 1
        if level:
            conv = network.down[level - 1].conv1
            grid = [voxels // stride for voxels, stride in zip(grid, conv.stride, strict=True)]
            box(axes, "C", LEFT, y + 0.95, f"stride {times(conv.stride)}, {conv.in_channels} to {conv.out_channels}")
            arrow(axes, (LEFT, y + LEVEL - half), (LEFT, y + 0.95 + half))
            arrow(axes, (LEFT, y + 0.95 - half), (LEFT, y + half))
        width = blocks[0].conv2.out_channels
        box(axes, "B", LEFT, y, f"{len(blocks)} ResBlocks, {width} channels")
        axes.text(LEFT - 2.1, y, times(grid), ha="right", va="center", fontsize=9, color="#555555")
        if not lowest:
            draw_decoder_level(axes, network, level, y, half)
    draw_ends(axes, network, half)
    draw_bottom(axes, network, -LEVEL * (levels - 1), grid, half)
    draw_legend(axes, network, -LEVEL * (levels - 1) - 1.5)
    axes.set_xlim(-4.2, 17.6)
    axes.set_aspect("equal")
    axes.axis("off")
    figure.tight_layout()
    return figure


def draw_decoder_level(axes, network: TSFM, level: int, y: float, half: float) -> None:
    """One level on the right: E below, the stacked B above it, F beside them, the skip from the left."""
    up, blocks = network.up[level], network.decoder[level]
    box(axes, "E", RIGHT, y - 0.95, f"x {times(up.stride)}, {up.conv.in_channels} to {up.conv.out_channels}")
    box(axes, "B", RIGHT, y, f"{len(blocks)} ResBlocks, {blocks[0].conv2.out_channels} channels")
    arrow(axes, (RIGHT, y - 0.95 + half), (RIGHT, y - half))
    arrow(axes, (LEFT + 1.9, y), (RIGHT - 1.9, y - 0.8), dashed=True)
    if level:
        arrow(axes, (RIGHT, y + half), (RIGHT, y + LEVEL - 0.95 - half))
    if level < len(network.heads):
        head = network.heads[level].conv
        box(axes, "F", RIGHT + 4.1, y, f"{head.out_channels} logits" + ("" if level == 0 else " (training)"), 3.0)
        arrow(axes, (RIGHT + 1.9, y), (RIGHT + 2.5, y))


def draw_ends(axes, network: TSFM, half: float) -> None:
    """The stem above the first level."""
    box(axes, "A", LEFT, 1.1, f"{network.stem.in_channels} to {network.stem.out_channels} channels")
    arrow(axes, (LEFT, 1.1 - half), (LEFT, half))
    axes.text(LEFT, 1.1 + half + 0.15, "image", ha="center", va="bottom", fontsize=9)
    arrow(axes, (LEFT, 1.1 + half + 0.12), (LEFT, 1.1 + half))


def draw_bottom(axes, network: TSFM, y: float, grid: list[int], half: float) -> None:
    """The Transformer on the lowest grid, between the two sides."""
    middle, width = (LEFT + RIGHT) / 2, 5.2
    layers = getattr(network.bottleneck, "layers", ())
    hidden = network.bottleneck.position_embedding.shape[1] if layers else 0
    heads = layers[0].attn.num_heads if layers else 0
    text = f"{prod(grid)} tokens, {len(layers)} layers, hidden {hidden}, {heads} heads" if layers else "identity"
    box(axes, "D", middle, y, text, width)
    arrow(axes, (LEFT + 1.9, y), (middle - width / 2 - 0.08, y))
    arrow(axes, (middle + width / 2 + 0.08, y), (RIGHT, y + LEVEL - 0.95 - half))


def draw_legend(axes, network: TSFM, y: float) -> None:
    """What the letters mean, and the size of the whole."""
    parameters = sum(p.numel() for p in network.parameters())
    for index, (letter, name) in enumerate(NAMES.items()):
        x, row = (LEFT - 1.3, RIGHT - 4.3)[index // 3], y - 0.85 * (index % 3)
        box(axes, letter, x, row, "", 0.6)
        axes.text(x + 0.6, row, name, va="center", fontsize=9)
    joined = "concatenated" if network.up[0].concatenates else "added"
    title = f"TSFM: {parameters / 1e9:.2f} billion parameters; dashed: skips, {joined}"
    axes.text((LEFT + RIGHT) / 2 + 0.6, 2.1, title, ha="center", fontsize=13)
    axes.set_ylim(y - 2.1, 2.6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("network.png"))
    output = parser.parse_args().output
    with torch.device("meta"):
        network = TSFM()
    draw(network).savefig(output, dpi=110)
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
