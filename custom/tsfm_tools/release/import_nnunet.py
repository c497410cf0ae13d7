"""A trained nnU-Net model becomes a bundle that infers, evaluates, fine-tunes and serves as the others do."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from tsfm.planning.public_weights import read_folder
from tsfm.training.checkpoint import encode_description, save_weights
from tsfm.training.folds import combine

from .release import release

TEMPLATE = os.path.join(os.path.dirname(__file__), "..", "..", "..", "bundles", "tsfm_finetune")


def import_nnunet(
    model_folder: str,
    output_dir: str,
    name: str = "nnunet",
    folds: Sequence[int | str] | None = None,
    checkpoint: str | None = None,
    trainer: str = "",
    trained_on: str | None = None,
    bundle_dir: str = TEMPLATE,
) -> str:
    """Make a bundle of a model folder of nnU-Net 2 (or 1): all folds, as one network whose logits are their mean.

    Of version 1 the probabilities are averaged and resampled, of version 2 the logits, as they do themselves. The bundle
    needs nothing of nnU-Net but the network's package, dynamic-network-architectures.

    Args:
        model_folder: ``DatasetNNN_NAME/TRAINER__PLANS__CONFIGURATION``.
        output_dir: the bundle goes below it, as `name`.
        name: of the bundle.
        folds: which; by default all that are there.
        checkpoint: file name in each fold's folder, by default ``checkpoint_final.pth`` (version 1:
            ``model_final_checkpoint.model``).
        trainer: a trainer of your own that leaves network, preprocessing and labels as the plans have them.
        trained_on: a sentence on what the weights were trained on, for metadata and README.
        bundle_dir: the bundle whose configs are taken.

    Returns:
        the bundle's folder.

    Raises:
        CheckpointError: no such model, or something in it that would be done differently here.
        ReleaseError: `output_dir` holds something else under this name.
    """
    named = {"checkpoint": checkpoint} if checkpoint else {}
    model = read_folder(model_folder, folds=folds, trainer=trainer, **named)
    members = [(f"fold {fold}", state, model.description) for fold, state in model.folds.items()]
    state, description = combine(members) if len(members) > 1 else members[0][1:]
    said = trained_on or f"an nnU-Net model ({description['trained_by']}, fold {', '.join(model.folds)})"
    # nnU-Net's predictor averages over mirrored versions unless it is told not to
    inference = {"displayable_configs#mirroring": bool(description["mirror_axes"])}
    bundle = bundle_of(state, description, output_dir, name, said, bundle_dir, inference)
    if os.path.isfile(os.path.join(model_folder, "postprocessing.json")):  # nnUNet_predict of version 1 applies it
        print(
            f"{model_folder}/postprocessing.json is left out: `python -m tsfm postprocessing` makes a plan for bundles"
        )
    print(f"{bundle}: {len(members)} fold(s), targets {', '.join(description['targets'])}")
    return bundle


def bundle_of(
    state: Mapping[str, Any],
    description: Mapping[str, Any],
    output_dir: str,
    name: str,
    trained_on: str,
    bundle_dir: str,
    inference: Mapping[str, Any] | None = None,
) -> str:
    """Stage a bundle around tensors that `description` describes; returns its folder. `inference` as for `release`."""
    with tempfile.TemporaryDirectory() as scratch:
        path = os.path.join(scratch, "model.pt")
        save_weights({**state, "_extra_state": encode_description(description)}, path)
        told = {"trained_on": trained_on, "inference": inference}
        return release(bundle_dir, path, output_dir, name=name, zipped=False, **told)
