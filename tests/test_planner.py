"""The planner against nnU-Net 2.8.1's own plans, TSFM's sizes against the networks themselves, and budgets."""

import json
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from tsfm.network.networks import create_network
from tsfm.network.tsfm_net import TSFM
from tsfm.planning.families import FAMILIES, SIZES, Family, topology, tsfm_cost, unet_cost
from tsfm.planning.plan_run import warn_of_small_patch
from tsfm.planning.planner import Budget, Plan, PlanError, coarse_spacing, plan, plan_patch
from tsfm.preparation.fingerprint import Fingerprint, plan_spacing

NNUNET = json.loads((Path(__file__).parent / "fixtures/nnunet_plans.json").read_text())


# ---- nnU-Net's own plans (benchmarks/make_plan_fixtures.py) ----------------------------------------------------------


@pytest.mark.parametrize(("name", "network"), [(name, network) for name in NNUNET for network in NNUNET[name]["plans"]])
def test_the_plan_is_nnunets(name, network):
    data = NNUNET[name]
    theirs = data["plans"][network]
    turn = theirs["transpose"]
    spacing = plan_spacing(data["spacings"], data["shapes"])
    found = Fingerprint({}, data["shapes"], data["spacings"], {}, [])
    options = {
        "cases": data["cases"],
        "in_channels": data["channels"],
        "out_channels": data["classes"],
        "network": network,
    }
    ours = plan(found.median_prepared_shape(spacing), spacing, **options)
    assert same_plan(ours, theirs["3d_fullres"], turn)
    if "3d_lowres" in theirs:
        coarse = coarse_spacing(ours, **options)
        assert [coarse[axis] for axis in turn] == pytest.approx(theirs["3d_lowres"]["spacing"], rel=1e-6)
        shape = [round(n * old / new) for n, old, new in zip(ours.median_shape, spacing, coarse, strict=True)]
        assert same_plan(plan(shape, coarse, **options), theirs["3d_lowres"], turn)
    elif network == "nnunet":
        assert coarse_spacing(ours, **options) == ours.spacing_mm


def same_plan(ours, theirs, turn):
    """Our plan (S, P, L) and nnU-Net's, whose axes are transposed, agree in all that a network and a loader need."""
    arguments = ours.create_arguments()
    assert arguments["residual"] == ("n_blocks_per_stage" in theirs)
    depth = "n_blocks_per_stage" if arguments["residual"] else "n_conv_per_stage"
    assert [ours.patch_size[axis] for axis in turn] == theirs["patch_size"]
    assert ours.batch_size == theirs["batch_size"]
    assert [ours.spacing_mm[axis] for axis in turn] == pytest.approx(theirs["spacing"])
    for ours, key in (([[1, 1, 1], *arguments["strides"]], "strides"), (arguments["kernel_sizes"], "kernel_sizes")):
        assert [[row[axis] for axis in turn] for row in ours] == theirs[key]
    assert arguments["features"] == theirs["features_per_stage"] and arguments["depths_down"] == theirs[depth]
    assert arguments["depths_up"][::-1] == theirs["n_conv_per_stage_decoder"]
    return True


@pytest.mark.parametrize(("name", "parameters"), [("nnunet", 31_195_594), ("nnunet_resenc_m", 102_349_770)])
def test_parameters_of_nnunets_networks(name, parameters):
    assert unet_cost(FAMILIES[name], topology((1, 1, 1), (128, 128, 128)), 1, 2).parameters == parameters


# ---- TSFM's sizes ----------------------------------------------------------------------------------------------------


def network_of(found, **more):
    return create_network(out_channels=3, **found.create_arguments(), **more)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize(("spacing", "patch"), [((1.5, 1, 1), (112, 160, 192)), ((5, 1, 1), (16, 96, 64))])
def test_the_parameters_are_counted_right(name, spacing, patch):
    found = plan_patch(patch, spacing, name, out_channels=3)
    with torch.device("meta"):
        network = network_of(found)
    assert sum(parameter.numel() for parameter in network.parameters()) == found.parameters


def test_the_largest_size_is_the_papers_network():
    found = plan_patch((112, 160, 192), (1.5, 1, 1), "tsfm_h", out_channels=31)
    with torch.device("meta"):
        assert network_of(found).description["network"] == TSFM(out_channels=3).description["network"]
    assert plan_patch((40, 56, 40), (1, 1, 1), "tsfm_s").parameters < 1e6 < 1.5e9 < found.parameters


@pytest.mark.parametrize("skip", ["add", "concat"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_values_kept_for_the_backward_pass_are_estimated(checkpointing, skip):
    family = replace(FAMILIES["tsfm_s"], skip=skip)
    found = plan_patch((24, 32, 32), (1, 1, 1), "tsfm_s", out_channels=3)
    network, kept = network_of(found, checkpointing=checkpointing, skip=skip), {}
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = network(torch.randn(1, 1, 24, 32, 32))
    assert len(outputs) == len(found.strides)
    cost = tsfm_cost(family, topology(found.spacing_mm, found.patch_size), 1, 3, checkpointing)
    assert cost.parameters == sum(parameter.numel() for parameter in network.parameters())
    assert 0.8 < cost.values / sum(kept.values()) < (2.5 if checkpointing else 1.25)  # what is recomputed comes on top


def test_recomputing_saves_memory_and_no_seconds():
    kept, chosen, recomputed = (
        plan((64, 128, 128), (1, 1, 1), "tsfm_s", Budget(None, 60), checkpointing=way) for way in (False, "auto", True)
    )
    assert chosen == recomputed and chosen.memory_gb < kept.memory_gb
    assert (chosen.patch_size, chosen.step_seconds) == (kept.patch_size, kept.step_seconds)


def test_flat_kernels_look_at_single_slices_until_the_spacing_allows():
    """With kernel 1 and stride 1 along S in the upper levels, slices meet in the lower ones only."""
    found = plan_patch((8, 32, 32), (5, 1, 1), "tsfm_s")
    assert found.strides[0] == (1, 2, 2) and found.kernel_sizes[0] == (1, 3, 3) and found.kernel_sizes[-1] == (3, 3, 3)
    stem = network_of(found).stem
    one, other = torch.zeros(2, 1, 8, 16, 16)
    one[:, 3] = 1
    assert not stem(one[None])[0, :, [2, 4]].any() and stem(one[None])[0, :, 3].any() and not stem(other[None]).any()


# ---- budgets ---------------------------------------------------------------------------------------------------------

LIVER = {"median_shape": (432, 512, 512), "spacing_mm": (1.0, 0.77, 0.77), "cases": 131, "out_channels": 2}


@pytest.mark.parametrize("budgets", [[Budget(gb) for gb in (4, 8, 24, 80)], [Budget(None, s) for s in (0.2, 1, 5, 60)]])
def test_a_larger_budget_buys_a_larger_network_or_patch_and_is_kept(budgets):
    plans = [plan(budget=budget, **LIVER) for budget in budgets]
    for found, budget in zip(plans, budgets, strict=True):
        assert (
            found.memory_gb <= (budget.memory_gb or 1e9) and found.step_seconds <= (budget.step_seconds or 1e9) * 1.01
        )
        lowest = [n // prod(s) for n, s in zip(found.patch_size, zip(*found.strides, strict=True), strict=True)]
        assert min(lowest) >= 4
    assert [found.parameters for found in plans] == sorted(found.parameters for found in plans)
    assert (plans[0].network == "tsfm_s" and plans[-1].parameters > 100 * plans[0].parameters) or not budgets[
        -1
    ].memory_gb


def test_a_budget_into_which_nothing_fits_says_so():
    with pytest.raises(PlanError, match=r"tsfm_s: nothing fits into 0\.001 s a step.*--step_seconds"):
        plan(budget=Budget(step_seconds=0.001), **LIVER)
    with pytest.raises(PlanError, match=r"tsfm_h: nothing fits into 0\.5 GB"):
        plan(network="tsfm_h", budget=Budget(0.5), **LIVER)


def test_what_cannot_be_planned_is_named():
    with pytest.raises(PlanError, match="two-dimensional"):
        plan((1, 256, 256), (1, 1, 1))
    with pytest.raises(PlanError, match="expected 'auto' or one of nnunet"):
        plan((64, 64, 64), (1, 1, 1), "unet")
    with pytest.raises(PlanError, match="would fit"):
        plan_patch((20, 36, 36), (1, 1, 1))
    with pytest.raises(PlanError, match=r"lacks \['patch_size'\]"):
        values = plan((64, 64, 64), (1, 1, 1)).to_dict()
        Plan.from_dict({key: value for key, value in values.items() if key != "patch_size"})


def test_a_plan_survives_json_with_what_a_run_has_measured():
    found = plan((36, 50, 35), (1, 1, 1), budget=Budget(step_seconds=0.3))
    assert Plan.from_dict(json.loads(json.dumps(found.to_dict() | {"hours": 3.0}))) == found


def test_a_patch_of_weights_fits_their_strides_and_the_images():
    def patch_of(shape, strides, own=(112, 160, 192)):
        family = Family("weights", "fixed", 0, 0, (1,), (1,), strides=strides, patch=own)
        return plan(shape, (1, 1, 1), family).patch_size

    strides = ((2, 2, 2),) * 4 + ((1, 2, 2),)
    assert patch_of((400, 400, 400), strides) == (112, 160, 192)
    assert patch_of((36, 50, 35), strides) == (48, 64, 64)
    assert patch_of((90.5, 100, 500), strides, (112, 150, 192)) == (96, 128, 192)
    assert patch_of((3, 4, 2), ((2, 2, 2),) * 3) == (8, 16, 8), "one voxel at the bottom cannot be normalised"
    with pytest.raises(PlanError, match="16x8x8 would fit"):
        plan_patch(
            (8, 8, 8), (1, 1, 1), Family("x", "fixed", 0, 0, (1,), (1,), strides=((2, 2, 2),) * 3, patch=(8, 8, 8))
        )


def test_a_familys_number_of_levels_is_kept():
    deep = plan((36, 50, 35), (1, 1, 1), replace(FAMILIES["nnunet"], levels=(6, 6)))
    assert len(deep.features) == 6 and deep.strides[3:] == ((1, 1, 1), (1, 1, 1)) and deep.patch_size == (40, 56, 40)
    assert len(plan((128, 128, 128), (1, 1, 1), replace(FAMILIES["nnunet"], levels=(3, 3))).strides) == 2
    assert np.prod(plan((9, 6, 5), (1, 1, 1), "tsfm_s", Budget(8)).patch_size) >= 9 * 6 * 5


def test_of_a_coarse_spacing_the_patch_that_is_asked_for_sees_a_quarter():
    options = {"network": "tsfm_s", "budget": Budget(8), "patch_size": (32, 32, 32)}
    coarse = coarse_spacing(plan((100, 100, 100), (1, 1, 1), **options), **options)
    assert 0.25 <= 32**3 / prod(100 / mm for mm in coarse) < 0.25 * 1.03**3


@pytest.mark.parametrize(
    ("shape", "spacing", "warned"), [((54, 135, 135), (3.3, 1, 1), True), ((36, 50, 35), (1, 1, 1), False)]
)
def test_a_patch_far_smaller_than_nnunets_is_said_with_the_spacing_that_suits_it(shape, spacing, warned, caplog):
    numbers, budget = {"network": "tsfm_s", "cases": 30}, Budget(step_seconds=0.3)
    fine = plan(shape, spacing, budget=budget, **numbers)
    warn_of_small_patch(fine, budget, numbers)
    assert bool(caplog.messages) == warned
    if warned:
        coarse = "x".join(f"{mm:.4g}" for mm in coarse_spacing(fine, budget=budget, **numbers))
        assert f"--spacing_mm coarse plans for voxels of {coarse} mm" in caplog.text
