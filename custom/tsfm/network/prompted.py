"""SAM-Med3D: one target at a time, pointed at by clicks. Its rows in a table are never ranked with automatic ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .adapted import Adapted, NetworkError, given, package
from .described import Parts

PARTS = Parts(r"net\.image_encoder\.", r"net\.mask_decoder\.", r"(?!)", r"(?!)", r"(?!)")


class SAMMed3D(Adapted):
    """SAM-Med3D (100.5 million parameters): (B,1,128,128,128) and clicks -> logits (B,1,128,128,128) of what they mark.

    Args:
        img_size: the only window that it takes; three equal sides.
        width, depth, num_heads, global_layers: the image encoder's; the last are the layers without windows.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        img_size: Sequence[int] = (128, 128, 128),
        width: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        global_layers: Sequence[int] = (2, 5, 8, 11),
    ):
        if in_channels != 1 or out_channels != 1 or len({*img_size}) != 1:
            raise NetworkError(
                f"sam_med3d: {in_channels} channels, {out_channels} targets, patch {tuple(img_size)}; expected one channel, "
                "one target at a time, and a cube"
            )
        net = package("medim.models.sam_med3d").build_sam3D_vit_b_ori(
            image_size=img_size[0],
            encoder_embed_dim=width,
            encoder_depth=depth,
            encoder_num_heads=num_heads,
            encoder_global_attn_indexes=list(global_layers),
        )
        arguments = {"name": "sam_med3d", **given(SAMMed3D, locals()), "deep_supervision": False}
        super().__init__(arguments, net, [[16, 16, 16]], PARTS)
        self.side = img_size[0]

    def check_size(self, size: Sequence[int], shape: Sequence[int] | None = None) -> None:
        """Raise a ValueError for any window but the one that the position embedding was made for."""
        super().check_size(size, shape)
        side = self._arguments["img_size"][0]
        if any(voxels != side for voxels in size):
            raise ValueError(
                f"SAMMed3D: a window of {tuple(size)} voxels; only {(side,) * 3} fits its position embedding"
            )

    def forward(
        self, x: Tensor, points: Tensor | None = None, labels: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Logits for clicks `points` (B,N,3) in voxels with `labels` (B,N), 1 on the target and 0 off it.

        `mask`: an earlier answer's logits (B,1,128,128,128), from which the next click goes on.
        """
        self.check_size(x.shape[2:], x.shape)
        net, low = self.net, None
        if mask is not None:
            low = F.interpolate(mask, size=[self.side // 4] * 3, mode="trilinear", align_corners=False)
        embedding = net.image_encoder(x)
        if points is None:  # "not a point", outside the image
            points, labels = x.new_zeros(len(x), 1, 3), x.new_full((len(x), 1), -1.0)
        answers = []
        for i in range(len(x)):
            sparse, dense = net.prompt_encoder(
                points=(points[i : i + 1].float(), labels[i : i + 1]),
                boxes=None,
                masks=None if low is None else low[i : i + 1],
            )
            answer, _ = net.mask_decoder(
                image_embeddings=embedding[i : i + 1],
                image_pe=net.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=False,
            )
            answers.append(answer)
        return F.interpolate(torch.cat(answers), size=x.shape[2:], mode="trilinear", align_corners=False)
