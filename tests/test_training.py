import csv
import json
import logging
import subprocess
from types import SimpleNamespace

import pytest
import torch
from conftest import rates_of
from ignite.engine import Engine, Events
from monai.data import DataLoader
from monai.engines import SupervisedTrainer
from monai.optimizers import WarmupCosineSchedule
from tsfm.labels import LabelTable
from tsfm.network.tsfm_net import TSFM
from tsfm.planning.parts import parameter_groups
from tsfm.training.checkpoint import read_state
from tsfm.training.curve import Curve, write_csv
from tsfm.training.record import RunRecord, versions
from tsfm.training.run_state import AllStepsSkipped, RunState
from tsfm.training.steps import TrainStep, Validate, poly_schedule
from tsfm.training.weight_files import CheckpointError

pytestmark = pytest.mark.convolutions

SMALL = {
    "in_channels": 1, "out_channels": 2, "features": [4, 8], "depths_down": [1, 1], "depths_up": [1], "strides": [[2, 2, 2]],
    "img_size": [8, 8, 8], "hidden_size": 8, "num_layers": 1, "num_heads": 2, "mlp_dim": 16, "deep_supervision": False,
}  # fmt: skip
ITEM = {"image": "a.nii.gz", "label": "b.nii.gz", "dataset": "d", "case": "a"}


def optimizer_of(parameters, lr=1.0):
    return torch.optim.SGD(parameters, lr=lr, momentum=0.99, nesterov=True)


def rates(epochs, **options):
    optimizer = optimizer_of([torch.nn.Parameter(torch.zeros(1))])
    schedule = poly_schedule(optimizer, epochs, **options)
    return rates_of(optimizer, schedule, epochs)


def test_the_schedule_is_nnunets():
    assert rates(10) == pytest.approx([(1 - epoch / 10) ** 0.9 for epoch in range(10)])


def test_warming_up_is_linear_and_polynomial_decay_follows():
    assert rates(6, warmup_epochs=2) == pytest.approx([1 / 3, 2 / 3, *((1 - epoch / 4) ** 0.9 for epoch in range(4))])


def engine_with(network, loss=1.0, clip_norm=12.0, epoch_length=None):
    samples = [{"image": torch.randn(1, 8, 8, 8), "label": torch.zeros(1, 8, 8, 8)} for _ in range(2)]
    step = TrainStep(amp=False, clip_norm=clip_norm)
    trainer = SupervisedTrainer(
        device=torch.device("cpu"), max_epochs=2, train_data_loader=DataLoader(samples, batch_size=2), network=network,
        optimizer=optimizer_of(network.parameters(), 0.01), loss_function=lambda pred, label: loss * pred.square().mean(),
        iteration_update=step, decollate=False, epoch_length=epoch_length,
    )  # fmt: skip
    return trainer, step


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_step_whose_gradient_is_not_finite_changes_nothing(scale):
    network = TSFM(**SMALL)
    before = {name: value.clone() for name, value in network.named_parameters()}
    trainer, step = engine_with(network, scale)
    with pytest.raises(AllStepsSkipped, match=r"all 1 steps of epoch 1 .* --learning_rate"):
        trainer.run()
    assert step.skipped == 1
    assert all(torch.equal(value, before[name]) for name, value in network.named_parameters())


def test_a_run_ends_with_the_number_of_its_skipped_steps_also_when_it_was_resumed(tmp_path, caplog):
    def run(epochs, *bad):
        trainer, _ = run_state(tmp_path, TSFM(**SMALL), epoch_length=2)
        trainer.state.max_epochs = epochs
        good = trainer.loss_function
        trainer.loss_function = lambda *pair: good(*pair) * (float("nan") if trainer.state.iteration in bad else 1)
        trainer.run()

    run(1, 1)
    assert caplog.messages[-1].startswith("1 of 2 steps (50%) were skipped") and "--amp False" in caplog.messages[-1]
    with pytest.raises(AllStepsSkipped, match="epoch 3"):
        run(3, 4, 5, 6)
    caplog.clear()
    run(22)
    warned = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert warned == ["2 of 44 steps (5%) were skipped, since their gradient was not finite"]


def test_a_run_in_float16_goes_on_where_losses_are_scaled_though_they_were_not_before():
    step = TrainStep(amp_dtype="float16")
    assert step.scaler.is_enabled(), "on a processor, too, which may compute in float16"
    scale = step.scaler.get_scale()
    step.load_state_dict({"skipped": 1, "scaler": {}})
    assert step.skipped == 1 and step.scaler.get_scale() == scale > 1


def test_the_gradient_is_clipped_to_the_norm_before_the_step():
    network = TSFM(**SMALL)
    trainer, _ = engine_with(network, 1e6, clip_norm=0.5)
    norms = []
    gradients = lambda: torch.stack([p.grad.norm() for p in network.parameters()]).norm().item()  # noqa: E731
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: norms.append(gradients()))
    trainer.run()
    assert norms == pytest.approx([0.5, 0.5], rel=1e-4)


def test_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="float8"):
        TrainStep(amp_dtype="float8")


def run_state(folder, network, **options):
    trainer, step = engine_with(network, epoch_length=options.pop("epoch_length", None))
    curve = Curve(str(folder))
    parts = {"optimizer": options.pop("optimizer", trainer.optimizer), "step": step}
    settings = {"seed": 0, **options.pop("settings", {})}
    RunState(str(folder), network, parts, curve, settings, options.pop("items", [ITEM]), **options).attach(trainer)
    return trainer, curve


def test_the_curve_keeps_the_moving_average_of_the_validation_dice(tmp_path):
    curve = Curve(str(tmp_path), evaluator=None)
    engine = SimpleNamespace(
        state=SimpleNamespace(epoch=0, max_epochs=3), optimizer=optimizer_of([torch.nn.Parameter(torch.zeros(1))], 0.5)
    )
    curve.evaluator = SimpleNamespace(state=SimpleNamespace(metrics={}))
    for epoch, dice in enumerate([0.5, 0.7, 0.1], start=1):
        engine.state.epoch = epoch
        curve._start(engine)
        curve.losses, curve.iterated = [torch.tensor(float(epoch))], curve.started + 1
        curve.evaluator.state.metrics["val_mean_dice"] = dice
        curve._mark(engine)
        curve(engine)
    rows = list(csv.DictReader((tmp_path / "curve.csv").open()))
    assert [float(row["ema"]) for row in rows] == pytest.approx([0.5, 0.52, 0.478])
    assert [float(row["loss"]) for row in rows] == [1, 2, 3]
    assert curve.average == pytest.approx(0.478)


@pytest.mark.parametrize(("epochs", "validated"), [(7, [3, 6, 7]), (6, [3, 6]), (2, [2])])
def test_the_last_epoch_is_validated_too(epochs, validated):
    handler, seen = Validate(interval=3), []
    handler.validator = SimpleNamespace(run=seen.append)
    trainer = Engine(lambda engine, batch: None)
    handler.attach(trainer)
    trainer.run([0], max_epochs=epochs)
    assert seen == validated


def test_an_older_model_is_kept_when_a_run_publishes(tmp_path):
    published = tmp_path / "models"
    published.mkdir()
    (published / "model.pt").write_bytes(b"older weights")
    trainer, _ = run_state(tmp_path / "run", TSFM(**SMALL), ckpt_dir=str(published))
    trainer.run()
    assert (published / "model_previous.pt").read_bytes() == b"older weights"
    assert read_state(published / "model.pt")[1]["epoch"] == 2


def test_bare_items_are_never_resumed(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    for _ in range(2):
        trainer, curve = run_state(tmp_path, TSFM(**SMALL), items=[{"image": "a", "label": "b"}])
        trainer.run()
        assert len(curve.rows) == 2
    assert "resuming after epoch" not in caplog.text


def test_a_run_with_other_settings_or_fewer_epochs_is_refused(tmp_path):
    run_state(tmp_path, TSFM(**SMALL))[0].run()
    with pytest.raises(CheckpointError, match="seed: was 0, is 3"):  # before anything is prepared or written
        run_state(tmp_path, TSFM(**SMALL), settings={"seed": 3})
    with pytest.raises(CheckpointError, match="cases"):
        run_state(tmp_path, TSFM(**SMALL), items=[{**ITEM, "case": "other"}])[0].run()
    with pytest.raises(CheckpointError, match="optimizer: was SGD, is AdamW"):
        network = TSFM(**SMALL)
        run_state(tmp_path, network, optimizer=torch.optim.AdamW(network.parameters()))[0].run()
    with pytest.raises(CheckpointError, match=r"'momentum': 0\.99.*'momentum': 0\.9"):
        network = TSFM(**SMALL)
        changed = torch.optim.SGD(network.parameters(), momentum=0.9, nesterov=True)
        run_state(tmp_path, network, optimizer=changed)[0].run()
    with pytest.raises(
        CheckpointError, match=r"network: was.*mlp_dim: checkpoint 16, network 8; --network_def#mlp_dim 16"
    ):
        run_state(tmp_path, TSFM(**{**SMALL, "mlp_dim": 8}))[0].run()
    trainer, _ = run_state(tmp_path, TSFM(**SMALL))
    trainer.state.max_epochs = 1
    with pytest.raises(CheckpointError, match="has 2 epochs, 1 were asked for"):
        trainer.run()


def test_another_spelling_of_a_place_is_the_same_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("data")
    run_state(tmp_path, TSFM(**SMALL), settings={"pool": "data", "pretrained": "None"})[0].run()
    for spelled in ("data/", "./data", str(tmp_path / "data"), "link"):
        run_state(tmp_path, TSFM(**SMALL), settings={"pool": spelled, "pretrained": "None"})[0].run()
    with pytest.raises(CheckpointError, match="pool: was data, is other"):
        run_state(tmp_path, TSFM(**SMALL), settings={"pool": "other", "pretrained": "None"})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for spelled in (str(tmp_path / "data"), "../data"):
        run_state(tmp_path, TSFM(**SMALL), settings={"pool": spelled, "pretrained": "None"})[0].run()


def test_a_run_whose_label_ids_now_stand_for_other_targets_is_refused(tmp_path):
    def labelled(labels):
        declared = LabelTable({name: {} for name in labels.values()}, [{"name": "d", "labels": labels}]).to_dict()
        network = TSFM(**SMALL)
        network.description.update(targets=declared["targets"], dataset_labels=declared["datasets"])
        return network

    run_state(tmp_path, labelled({"1": "liver", "2": "cyst"}))[0].run()
    run_state(tmp_path, labelled({"1": "liver", "2": "cyst"}))[0].run()
    with pytest.raises(CheckpointError, match=r"labels: was .*stand for other targets"):
        run_state(tmp_path, labelled({"1": "cyst", "2": "liver"}))[0].run()
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    del state["settings"]["labels"]  # as an earlier version wrote it
    torch.save(state, tmp_path / "last.pt")
    run_state(tmp_path, labelled({"1": "liver", "2": "cyst"}))[0].run()


def test_dropout_is_the_same_whether_a_run_was_resumed_or_not(tmp_path):
    def run(folder, epochs, seed):
        torch.manual_seed(0)
        network = TSFM(**{**SMALL, "dropout": 0.5})
        trainer, _ = run_state(folder, network)
        trainer.state.max_epochs = epochs
        torch.manual_seed(seed)  # whatever was drawn before
        trainer.run()
        return network.state_dict()

    whole = run(tmp_path / "whole", 3, 1)
    run(tmp_path / "parts", 1, 2)
    parts = run(tmp_path / "parts", 3, 3)
    assert all(torch.equal(whole[name], parts[name]) for name in whole if name != "_extra_state")


def test_a_run_that_saves_every_second_epoch_loses_at_most_two_and_ends_with_the_same_weights(tmp_path):
    def run(folder, stop_after=None):
        torch.manual_seed(0)
        network = TSFM(**{**SMALL, "dropout": 0.5})
        trainer, curve = run_state(folder, network, save_interval=2)
        trainer.state.max_epochs = 5
        if stop_after:
            trainer.add_event_handler(Events.EPOCH_COMPLETED(once=stop_after), lambda engine: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                trainer.run()
        else:
            trainer.run()
        return network.state_dict(), curve.rows

    whole, rows = run(tmp_path / "whole")
    run(tmp_path / "parts", stop_after=3)
    assert torch.load(tmp_path / "parts/last.pt", weights_only=True)["epoch"] == 2
    parts, resumed = run(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole if name != "_extra_state")
    assert [row["loss"] for row in resumed] == [row["loss"] for row in rows] and len(rows) == 5
    assert torch.load(tmp_path / "whole/last.pt", weights_only=True)["epoch"] == 5


@pytest.mark.parametrize(("weights", "interval"), [(2_600_000, 1), (1_600_000_000, 8), (1_636_335_899, 9)])
def test_large_networks_are_saved_less_often(tmp_path, weights, interval):
    network = TSFM(**SMALL)
    network.parameters = lambda: iter([torch.empty(weights, device="meta")])
    options = {"parts": {"optimizer": optimizer_of([torch.nn.Parameter(torch.zeros(1))])}, "settings": {}}
    state = RunState(str(tmp_path), network, curve=Curve(str(tmp_path)), save_interval="auto", **options)
    assert state.save_interval == interval


def test_what_a_killed_run_left_half_written_is_removed(tmp_path):
    (tmp_path / ".abc.partial").write_bytes(b"half a checkpoint")
    run_state(tmp_path, TSFM(**SMALL))[0].run()
    assert not list(tmp_path.glob(".*.partial")) and (tmp_path / "last.pt").exists()


def cosine(optimizer, epochs):
    return WarmupCosineSchedule(optimizer, warmup_steps=1, t_total=epochs, warmup_multiplier=0.5, end_lr=4e-3)


def warmed(optimizer, epochs):
    schedules = torch.optim.lr_scheduler
    parts = schedules.LinearLR(optimizer, 0.25, 1.0, 1), schedules.CosineAnnealingLR(optimizer, epochs - 1)
    return schedules.SequentialLR(optimizer, parts, [1])


@pytest.mark.parametrize(
    ("schedule", "short", "longer"),
    [
        (poly_schedule, [1, 0.5**0.9], [0.5**0.9, 0.25**0.9]),
        (cosine, [0.5, 1], [0.75, 0.4]),  # (1 + cos(angle)) / 2 of 60 and 120 degrees, no less than 0.4
        (
            torch.optim.lr_scheduler.CosineAnnealingLR,
            [1, 0.5],
            [0.5, (1 - 0.5**0.5) / 2],
        ),  # computes each rate from the last
        (warmed, [0.25, 1], [0.75, 0.25]),
    ],
)
def test_an_extended_run_goes_on_with_the_longer_schedules_rate_and_says_so(schedule, short, longer, tmp_path, caplog):
    caplog.set_level(logging.INFO)

    def run(epochs):
        network = TSFM(**SMALL)
        trainer, step = engine_with(network)
        trainer.state.max_epochs = epochs
        parts = {"optimizer": trainer.optimizer, "step": step, "lr_scheduler": schedule(trainer.optimizer, epochs)}
        trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: parts["lr_scheduler"].step())
        curve = Curve(str(tmp_path))
        RunState(str(tmp_path), network, parts, curve, {}, [ITEM]).attach(trainer)
        trainer.run()
        return [row["lr"] for row in curve.rows]

    assert run(2) == pytest.approx([0.01 * factor for factor in short])
    assert "asked for" not in caplog.text
    assert run(4)[2:] == pytest.approx([0.01 * factor for factor in longer])
    said = next(message for message in caplog.messages if "asked for now" in message)
    assert said.startswith("2 epochs of 2 asked for before done, 4 asked for now")
    assert said.endswith(f"as in a run of 4 epochs, with {0.01 * longer[0]:.3g} next")


def test_rows_with_other_columns_share_one_table(tmp_path):
    write_csv(str(tmp_path / "x.csv"), [{"a": 1}, {"a": 2, "b": None}, {"b": 3}])
    assert (tmp_path / "x.csv").read_text().splitlines() == ["a,b", "1,", "2,", ",3"]


def test_a_git_that_does_not_answer_stops_no_run(monkeypatch):
    def wait(command, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", wait)
    assert "torch" in versions() and "git" not in versions()


def test_a_record_holds_the_configs_that_the_run_was_made_of(tmp_path, monkeypatch):
    config = tmp_path / "train.json"
    config.write_text('{"epochs": 3}')
    monkeypatch.setattr("sys.argv", ["monai.bundle", "run", "--config_file", str(config)])
    record = RunRecord(str(tmp_path), {})
    config.unlink()  # while the cases were prepared
    record(SimpleNamespace(state=SimpleNamespace(max_epochs=1)))
    assert json.loads((tmp_path / "run.json").read_text())["configs"] == {str(config): {"epochs": 3}}


def test_versions_name_what_decides_the_numbers():
    assert {"tsfm", "python", "torch", "monai", "numpy"} <= set(versions())


def test_accumulated_gradients_take_the_steps_of_monais_own_iteration():
    def weights(step):
        torch.manual_seed(0)
        network = torch.nn.Conv3d(1, 1, 1)
        samples = [{"image": torch.randn(1, 4, 4, 4), "label": torch.randn(1, 4, 4, 4)} for _ in range(5)]
        SupervisedTrainer(
            device=torch.device("cpu"), max_epochs=2, train_data_loader=DataLoader(samples, batch_size=1), network=network,
            optimizer=optimizer_of(network.parameters(), 0.01), loss_function=torch.nn.MSELoss(), decollate=False,
            iteration_update=step, accumulation_steps=2,
        ).run()  # fmt: skip
        return torch.cat([value.detach().flatten() for value in network.parameters()])

    torch.testing.assert_close(weights(TrainStep(amp=False, clip_norm=0)), weights(None))


def test_an_epoch_whose_accumulated_steps_were_all_skipped_is_found():
    trainer, _ = engine_with(TSFM(**SMALL), float("nan"), epoch_length=3)
    trainer.accumulation_steps = 2
    with pytest.raises(AllStepsSkipped, match="all 2 steps of epoch 1"):
        trainer.run()


def test_a_run_that_a_handler_of_the_validation_ends_keeps_its_last_epoch(tmp_path):
    network = TSFM(**SMALL)
    trainer, step = engine_with(network)
    trainer.state.max_epochs = 8
    trainer.add_event_handler(Events.EPOCH_COMPLETED(once=3), trainer.terminate)  # as MONAI's EarlyStopHandler
    parts = {"optimizer": trainer.optimizer, "step": step}
    RunState(str(tmp_path), network, parts, Curve(str(tmp_path)), {}, [ITEM], save_interval=5).attach(trainer)
    trainer.run()
    assert torch.load(tmp_path / "last.pt", weights_only=True)["epoch"] == 3 and (tmp_path / "model.pt").exists()


def test_where_every_validation_gives_zero_the_last_weights_are_kept(tmp_path):
    trainer, curve = run_state(tmp_path, TSFM(**SMALL))  # cases without the target, or a network that finds none yet
    curve.evaluator = SimpleNamespace(state=SimpleNamespace(metrics={"val_mean_dice": 0.0}))
    trainer.add_event_handler(Events.ITERATION_COMPLETED, curve._mark)
    trainer.run()
    assert [row["ema"] for row in curve.rows] == [0, 0]
    assert read_state(tmp_path / "model.pt")[1]["epoch"] == 2


def test_the_rate_that_an_overlay_gives_the_optimizer_is_that_of_the_run(tmp_path):
    def run(rate):
        network = TSFM(**SMALL)
        optimizer = torch.optim.Adam(parameter_groups(network, head_lr=0.5), rate)
        assert {group["name"]: group["lr"] for group in optimizer.param_groups}["decoder"] == rate
        run_state(tmp_path, network, optimizer=optimizer, settings={"learning_rate": 0.01})[0].run()

    run(1e-4)
    with pytest.raises(CheckpointError, match=r"learning_rate: was 0\.0001, is 0\.001"):
        run(1e-3)
