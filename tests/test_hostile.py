"""Weight files of strangers, damage at rest, bad moments and command lines: refused or survived, and said how."""

import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import usual_signals
from test_training import SMALL, run_state
from tsfm.cases.cases import Preparation
from tsfm.cases.folders import find_images
from tsfm.errors import CaseError
from tsfm.files import PARTIAL, atomic_write, check_writable, scratch_name, sweep
from tsfm.inference.prediction import CaseEvaluator
from tsfm.inference.report import CaseReport
from tsfm.labels import LabelTable
from tsfm.network.description import NETWORKS, check_description
from tsfm.network.tsfm_net import TSFM
from tsfm.options import OptionError, check_options
from tsfm.patches import store as store_module
from tsfm.patches.store import CaseStore
from tsfm.training.checkpoint import (
    describe_network,
    encode_description,
    read_description,
    read_state,
    save_weights,
    table_of,
)
from tsfm.training.record import RunRecord
from tsfm.training.weight_files import CheckpointError, load_pt

ROOT = Path(__file__).parents[1]
CT = {"CT": {"lower": -1000, "upper": 400, "mean": 50, "sd": 200}}
TABLE = LabelTable(
    {"肝": {"display": "Liver"}, "er_plus": {"inside": "肝", "lesion": True, "tolerance_mm": 2.5}},
    [{"name": "zoo", "labels": {"-1": "肝", "2": "er_plus"}, "ignore": [9], "others": "background"}],
)


@pytest.fixture(scope="module")
def description():
    """A description as training writes it, with everything that a label table can declare."""
    items = [{"image": "a", "dataset": "zoo", "modality": "CT"}]
    network = describe_network(TSFM(**SMALL), TABLE, Preparation((3, 2, 2), CT, masked={"MR": True}), [8, 8, 8], items)
    return json.loads(bytes(network.get_extra_state().tolist()))


def with_description(path, description):
    """A weight file of our own making, as any stranger could write it."""
    torch.save({"stem.weight": torch.zeros(1), "_extra_state": encode_description(description)}, path)
    return path


# ---- a stranger's weight file ------------------------------------------------------------------------------------


def test_what_training_writes_is_read_back_whole(tmp_path, description):
    assert read_description(with_description(tmp_path / "m.pt", description)) == description
    assert table_of(description).codes == TABLE.codes and description["targets"]["肝"] == {"display": "Liver"}


def places(value, place=()):
    """Every place in a description where a text or a key stands."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*place, key), "key"
            yield from places(inner, (*place, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from places(inner, (*place, number))
    else:
        yield place, "value"


def changed(description, place, how, text):
    """A copy of `description` with `text` as the value, or in place of the key, at `place`."""
    copy = json.loads(json.dumps(description))
    inner = copy
    for step in place[:-1]:
        inner = inner[step]
    if how == "value":
        inner[place[-1]] = text
    else:
        inner[text] = inner.pop(place[-1])
    return copy


@pytest.mark.parametrize(
    "text", ["$__import__('os').system('touch hacked')", "@bundle_root", "%train", "_target_", "a\n| b"]
)
def test_text_that_a_config_would_run_is_refused_wherever_it_stands(description, text):
    everywhere = list(places(description))
    assert len(everywhere) > 80
    for place, how in everywhere:
        with pytest.raises(CheckpointError, match=r"m\.pt.*refused"):
            check_description(changed(description, place, how, text), "m.pt", CheckpointError)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("network", "features"), "wide", "features.*a list of whole numbers"),
        (("network", "in_channels"), -1, "in_channels.*whole number from 0"),
        (("network", "interpolation"), "NEAREST", "interpolation.*a word"),
        (("network", "fetures"), [1], r"'fetures' \(did you mean 'features'\?\)"),
        (("network", "name"), "tsfmm", r"'tsfmm' \(did you mean 'tsfm'\?\)"),
        (("preparation", "spacing_mm"), [1, 1], "three numbers of millimetres"),
        (("preparation", "spacing_mm"), [1, 0, 1], "millimetres above 0"),
        (("preparation", "intensity"), {"CT": {"lower": 1}}, "lacks"),
        (("patch_size",), [16, 16, 1.5], "a whole number"),
        (("mirror_axes",), "SS", "S, P, L"),
        (("modalities",), "CT", "a list of names"),
        (("targets", "肝"), {"inside": 3}, "expected a name"),
        (("colour",), 1, "unknown fields 'colour'"),
    ],
)
def test_values_of_another_type_are_refused_with_their_place(description, place, value, message):
    with pytest.raises(CheckpointError, match=message):
        check_description(changed(description, place, "value", value), "m.pt", CheckpointError)


def test_every_argument_of_the_network_has_a_declared_type():
    assert set(NETWORKS["tsfm"]) == set(TSFM(**SMALL).description["network"])


def test_a_hostile_file_reaches_no_use(tmp_path, description, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from tsfm.planning.own_data import count_channels, dataset_pool
    from tsfm.planning.transfer import load_pretrained
    from tsfm.training.checkpoint import WeightLoader
    from tsfm_tools.release.export import export
    from tsfm_tools.release.release import release

    evil = changed(description, ("network", "interpolation"), "value", "$open('hacked', 'w')")
    path = str(with_description(tmp_path / "evil.pt", evil))
    uses = (
        lambda: read_description(path),
        lambda: release(str(ROOT / "bundles/tsfm_pretrain"), path, "dist", name="evil"),
        lambda: count_channels(dataset_pool(".", {"targets": {"a": {}}, "datasets": []}), path),
        lambda: load_pretrained(TSFM(**SMALL), path),
        lambda: export(path, "x.ts"),
        lambda: WeightLoader(path, TSFM(**SMALL))(),
    )
    for use in uses:
        with pytest.raises(CheckpointError, match="interpolation"):
            use()
    assert sorted(os.listdir()) == ["evil.pt"]


def test_a_run_that_could_not_be_read_back_does_not_start():
    with pytest.raises(ValueError, match=r"mirror_axes.* is .XYZ.*S, P, L"):
        describe_network(TSFM(**SMALL), TABLE, Preparation((3, 2, 2), CT), [8, 8, 8], mirror_axes="XYZ")


# ---- damage at rest ----------------------------------------------------------------------------------------------


def flipped(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_a_flipped_bit_in_weights_is_found_or_means_nothing(tmp_path, description, name):
    network = TSFM(**SMALL)
    network.description = description
    save_weights(network, tmp_path / name)
    good = read_state(tmp_path / name)
    size, content = os.path.getsize(tmp_path / name), (tmp_path / name).read_bytes()
    draw, found = random.Random(0), 0
    bits = [draw.randrange(8 * size) for _ in range(60)]
    bits += [8 * byte + 1 for byte in range(size - 60, size)]  # where a zip has its directory
    for number, bit in enumerate(bits):
        path = tmp_path / f"{number}_{name}"
        path.write_bytes(content)
        flipped(path, bit)
        try:
            tensors, read = read_state(path)
        except CheckpointError as error:
            found += 1
            assert str(path) in str(error)
            continue
        assert read == good[1] and tensors.keys() == good[0].keys()
        assert all(torch.equal(value, good[0][key]) for key, value in tensors.items())
    assert found > 40


def test_weights_are_compared_with_their_checksums_once_per_process(tmp_path, monkeypatch):
    compared = []
    testzip = zipfile.ZipFile.testzip
    monkeypatch.setattr(
        zipfile.ZipFile, "testzip", lambda archive: compared.append(archive.filename) or testzip(archive)
    )
    for name in ("a.pt", "b.pt"):
        torch.save({"a": torch.ones(20, 20)}, tmp_path / name)
        for _ in range(3):
            load_pt(str(tmp_path / name))
    assert compared == [str(tmp_path / "a.pt"), str(tmp_path / "b.pt")]


@pytest.fixture
def stored(tmp_path):
    """A store with one case: (store, its item, the case's folder)."""
    random_numbers = np.random.default_rng(0)
    image, label = random_numbers.integers(-1000, 1000, (24, 24, 16)).astype(np.int16), np.zeros((24, 24, 16), np.uint8)
    label[4:20, 4:20, 4:12] = 2
    item = {"dataset": "zoo", "modality": "CT", "case": "c1"}
    for name, array in (("image", image), ("label", label)):
        item[name] = str(tmp_path / f"{name}.nii.gz")
        nib.save(nib.Nifti1Image(array, np.eye(4)), item[name])
    store = CaseStore(tmp_path / "store", TABLE, Preparation((1, 1, 1), CT))
    return store, item, Path(store.open(item).path)


def test_a_flipped_bit_in_a_stored_case_is_found(stored):
    store, item, folder = stored
    draw = random.Random(1)
    for name in ("image.b2nd", "codes.b2nd", "foreground.npy", "case.json"):
        content = (folder / name).read_bytes()
        for bit in (0, 8 * len(content) - 1, *(draw.randrange(8 * len(content)) for _ in range(8))):
            flipped(folder / name, bit)
            store_module._VERIFIED.clear()  # as a new process
            with pytest.raises(CaseError, match=f"{folder}.*damaged.*delete this folder"):
                store.open(item)
            (folder / name).write_bytes(content)
    store_module._VERIFIED.clear()
    assert store.open(item).read_codes().any()


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b""), lambda path: path.unlink()])
def test_a_damaged_case_is_reported_and_made_again_once_its_folder_is_deleted(stored, damage):
    store, item, folder = stored
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    damage(folder / "codes.b2nd")
    store_module._VERIFIED.clear()
    with pytest.raises(CaseError, match=r"1 failed[\s\S]*codes.b2nd"):
        store.prepare([item], progress=False).raise_failures()
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    assert store.prepare([item], progress=False).prepared == 1
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# ---- bad moments -------------------------------------------------------------------------------------------------


def trained(folder, epochs):
    torch.manual_seed(0)
    network = TSFM(**{**SMALL, "dropout": 0.5})
    trainer, curve = run_state(folder, network)
    trainer.state.max_epochs = epochs
    trainer.run()
    return {name: value for name, value in network.state_dict().items() if name != "_extra_state"}, curve


@pytest.mark.parametrize("how", ["flipped", "truncated", "empty", "gone", "something else"])
def test_a_run_goes_on_from_the_epoch_before_when_the_last_is_damaged(tmp_path, caplog, how):
    whole, _ = trained(tmp_path / "whole", 4)
    trained(tmp_path / "run", 3)
    last = tmp_path / "run/last.pt"
    size = last.stat().st_size
    {
        "flipped": lambda: flipped(last, 4 * size),
        "truncated": lambda: os.truncate(last, size // 2),
        "empty": lambda: os.truncate(last, 0),
        "gone": last.unlink,
        "something else": lambda: torch.save({"a": 1}, last),
    }[how]()
    parts, curve = trained(tmp_path / "run", 4)
    assert str(last) in caplog.text and "last_previous.pt, after epoch 2" in caplog.text
    assert all(torch.equal(whole[name], parts[name]) for name in whole) and len(curve.rows) == 4
    assert load_pt(str(last))["epoch"] == 4 and load_pt(str(tmp_path / "run/last_previous.pt"))["epoch"] == 3


def test_a_run_without_any_whole_state_says_what_to_do(tmp_path):
    trained(tmp_path, 1)
    os.truncate(tmp_path / "last.pt", 1000)
    with pytest.raises(CheckpointError, match=r"last\.pt.*remove .*last\.pt to begin anew.*model\.pt"):
        trained(tmp_path, 2)


def test_a_damaged_record_is_set_aside(tmp_path, caplog):
    tmp_path = tmp_path / "run.json of mine"
    record = RunRecord(str(tmp_path), {"seed": 0})
    engine = type("Engine", (), {"state": type("State", (), {"max_epochs": 1})})
    record(engine)
    (tmp_path / "run.json").write_text('{"started": ')
    record(engine)
    assert "run_damaged.json" in caplog.text and (tmp_path / "run_damaged.json").exists()
    record(engine)
    assert len(json.loads((tmp_path / "run.json").read_text())["earlier"]) == 1


def test_folders_that_cannot_be_written_are_found_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "x.nii.gz").touch()
    with pytest.raises(OSError, match=r"file/models cannot be written.*--ckpt_dir"):
        run_state(tmp_path / "run", TSFM(**SMALL), ckpt_dir=str(tmp_path / "file/models"))
    with pytest.raises(OSError, match=r"file/out cannot be written.*--output_dir"):
        find_images(str(tmp_path / "x.nii.gz"), str(tmp_path / "file/out"))
    before = sorted(os.listdir(tmp_path))
    check_writable(tmp_path / "new/er", "--output_dir")
    assert sorted(os.listdir(tmp_path)) == before


def test_a_full_disk_that_still_takes_names_is_found_before_the_work(tmp_path, monkeypatch):
    def write(path, content):
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", write)
    with pytest.raises(OSError, match=r"new cannot be written \(No space left on device\).*--output_dir"):
        check_writable(tmp_path / "new", "--output_dir")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_a_full_disk_is_named_with_path_and_sizes(tmp_path, name):
    """The limit on file size stands in for the full disk, which torch and safetensors report each in its own way."""
    (tmp_path / name).write_bytes(b"before")
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"No space left.*{name}.*writing stopped after.*MiB.*are free"):
            save_weights({"a": torch.zeros(2**20)}, tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_bytes() == b"before"


def test_every_writer_sweeps_what_dead_processes_left(tmp_path):
    host, _, number = scratch_name().rsplit("_", 2)
    dead = [tmp_path / f".{host}_999999999_{number}{PARTIAL}{ending}" for ending in ("", ".nii.gz")]
    alive = tmp_path / f".{host}_{os.getpid()}_{number}{PARTIAL}"
    elsewhere = [tmp_path / f".other-host_{age}_{number}{PARTIAL}" for age in (1, 2)]
    for path in (*dead, alive, *elsewhere):
        path.touch()
    os.utime(elsewhere[1], (1, 1))
    folder = tmp_path / f".{host}_999999999_{number}{PARTIAL}.before"
    folder.mkdir()
    (folder / "model.pt").touch()
    atomic_write(tmp_path / "a.txt", lambda temporary: Path(temporary).write_text("a"))
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", alive.name, elsewhere[0].name}
    sweep(tmp_path / "absent")


def test_another_containers_files_are_kept_for_a_day(tmp_path, monkeypatch):
    """One host name, other process numbers: that a number is dead here says nothing."""
    own = scratch_name().replace(f"_{os.getpid()}_", "_999999999_")
    monkeypatch.setattr("tsfm.files._numbering", lambda: "0badcafe")
    theirs, old = (tmp_path / f".{name}{PARTIAL}" for name in (own, own[:-1]))
    mine = tmp_path / f".{scratch_name().replace(f'_{os.getpid()}_', '_999999999_')}{PARTIAL}"
    for path in (theirs, old, mine):
        path.touch()
    os.utime(old, (1, 1))
    sweep(tmp_path)
    assert [*tmp_path.iterdir()] == [theirs]
    monkeypatch.setattr("tsfm.files._numbering", lambda: "")
    assert "-" not in scratch_name().rsplit("_", 1)[1]


def test_where_a_process_cannot_be_asked_for_age_decides(tmp_path, monkeypatch):
    """Signal 0 is Ctrl-C on Windows."""
    monkeypatch.setattr("tsfm.files.ASKS", False)
    monkeypatch.setattr(os, "kill", None)
    old, new = (tmp_path / f".{scratch_name()}{PARTIAL}" for _ in range(2))
    for path in (old, new):
        path.touch()
    os.utime(old, (1, 1))
    sweep(tmp_path)
    assert [*tmp_path.iterdir()] == [new]


@pytest.mark.parametrize("content", ['{"version": 1}', "[]", '{"cases": 3}', '{"cases"'])
def test_another_report_is_refused_before_any_case(tmp_path, content):
    (tmp_path / "report.json").write_text(content)
    engine = CaseEvaluator(
        device="cpu",
        val_data_loader=[{"case": ["a"]}],
        network=torch.nn.Identity(),
        table=TABLE,
        val_handlers=[CaseReport(tmp_path)],
    )
    with pytest.raises(ValueError, match=r"report\.json"):
        engine.run()
    assert engine.results == [] and (tmp_path / "report.json").read_text() == content


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_signals_end_a_run_as_an_interrupt_does(tmp_path, name):
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent("""
        import os, sys, time
        from tsfm.errors import end_plainly

        end_plainly()
        try:
            if os.fork() == 0:  # as a loader's worker, which has to end at once
                print("ready", flush=True)
            time.sleep(60)
        finally:
            print("cleaned up", flush=True)
        """)
    )
    number = getattr(signal, name)
    running = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=usual_signals,
    )  # fmt: skip
    assert running.stdout.readline() == "ready\n"
    os.killpg(running.pid, number)
    output, errors = running.communicate(timeout=240)  # importing torch takes long on a busy machine
    assert running.returncode in (128 + number, -number)  # Python itself ends by SIGINT
    assert "The same command goes on" in errors and "Traceback" not in errors and "cleaned up" in output


# ---- command lines and overlays ----------------------------------------------------------------------------------


def command(*options, overlay=None, bundle="tsfm_finetune", first="train.json", folder=None):
    files = [str(ROOT / "bundles" / bundle / "configs" / first)]
    if overlay is not None:
        path = folder / "overlay.json"
        path.write_text(overlay if isinstance(overlay, str) else json.dumps(overlay))
        files.append(str(path))
    return ["monai.bundle", "run", "--config_file", str(files), *options]


@pytest.mark.parametrize(
    ("overlay", "message"),
    [
        ({"learning_rte": 1}, "learning_rte (did you mean learning_rate?)"),
        ({"trian#step#amp": 1}, "trian#step#amp (did you mean train?)"),
        ({"train#stepp#amp": 1}, "no 'stepp' there (did you mean 'step'?)"),
        ({"validate#handler": []}, "no 'handler' there"),
        ({"epochs": "ten"}, '"epochs" is "ten", expected a whole number'),
        ({"epochs": 0}, '"epochs" is 0'),
        ({"amp": "yes"}, '"amp" is "yes", expected true or false'),
        ({"patch_size": [32, 32]}, "three whole numbers"),
        (
            {"patch_size": "chekpoint"},
            '"patch_size" is "chekpoint", expected three whole numbers of voxels (S, P, L), auto',
        ),
        ({"spacing_mm": "fine"}, "auto, coarse or checkpoint"),
        ({"num_workers": {"a": 1}}, "a whole number from 0"),
        ({"mirror_axes": "XYZ"}, "some of the letters S, P, L"),
        ({"dataset_dir": "/data/a#b"}, "has a #"),
        ({"dataset_dir": ["/data/a", "/data/a#b"]}, "has a #"),
        ('{"epochs": 1, "epochs": 2}', r"the keys ['epochs'] are there twice"),
    ],
)
def test_a_slip_in_an_overlay_is_refused(tmp_path, overlay, message):
    with pytest.raises(ValueError) as error:
        check_options(command(overlay=overlay, folder=tmp_path))
    assert message in str(error.value) and "overlay.json" in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset_dir", "/data/a#b"], "has a #"),
        (["--dataset_dir", "@data"], "write ./@data"),
        (["--dataset_dir", "2024"], "./2024"),
        (["--train#trainr#max_epochs", "4"], "did you mean 'trainer'"),
        (["--amp", "no"], "True or False"),
        (["--fold", "first"], '"all"'),
        (["--epochs", "1e3"], '"epochs" is 1000.0, expected a whole number'),
        (["--batch_size", "2.0"], '"batch_size" is 2.0, expected a whole number'),
        (["--patch_size", "[16, 16, 32.0]"], "is 32.0, expected a whole number"),
        (["--seed", "True"], '"seed" is true, expected a whole number'),
    ],
)
def test_a_slip_on_the_command_line_is_refused(options, message):
    with pytest.raises(OptionError) as error:
        check_options(command(*options))
    assert message in str(error.value)


def test_what_is_meant_passes(tmp_path):
    overlay = {"_desc_": "a # is fine here", "train#trainer#max_epochs": 4, "device": "@other", "other": "cpu",
               "patch_size": "$[16] * 3", "+imports": ["$import numpy"], "fold": "all"}  # fmt: skip
    options = (
        "--fold",
        "4",
        "--learning_rate",
        "1e-3",
        "--mirror_axes",
        "",
        "--network",
        "@network_def",
        "--amp=False",
    )
    check_options(command(*options, overlay=overlay, folder=tmp_path))
    for folder in (ROOT / "bundles").iterdir():
        for path in sorted((folder / "configs").glob("*.json")):
            first = "train.json" if "train" in path.name else "inference.json"
            if path.name not in ("metadata.json", "pool.json", "demo_pool.json", first):
                check_options(command(overlay=path.read_text(), bundle=folder.name, first=first, folder=tmp_path))
