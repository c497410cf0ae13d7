"""A stored case is whole or absent, the same bytes whichever way it was made, and read in part."""

import gzip
import hashlib
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from conftest import usual_signals
from tsfm.cases import sources
from tsfm.cases.cases import Preparation
from tsfm.cases.folders import PoolError
from tsfm.cases.pool import DatasetPool
from tsfm.errors import CaseError, CaseWarning
from tsfm.labels import LabelTable
from tsfm.patches import store as store_module
from tsfm.patches.store import CaseStore
from tsfm.patches.stored_case import StoredCase, StoreError, files_of, quantize, sample_foreground, write_folder
from tsfm.planning import plan
from tsfm.preparation.fingerprint import fingerprint
from tsfm.preparation.parallel import WorkerDied, run_all
from tsfm.preparation.preprocessing import prepare_case
from tsfm_tools.phantoms import layouts as phantoms

TARGETS = {"liver": {}, "lesion": {"inside": "liver"}}
ONE = {"name": "one", "labels": {"1": "liver", "2": "lesion"}, "ignore": [3]}
TABLE = LabelTable(TARGETS, [ONE])
PREPARATION = Preparation((1.5, 1.0, 1.0), {"CT": {"lower": -900, "upper": 1200, "mean": 50, "sd": 200}})


@pytest.fixture
def items(tmp_path):
    """Three CT cases of 40 x 36 x 20 voxels; the last has an empty label map."""
    random, found = np.random.default_rng(0), []
    for number in range(3):
        image = random.integers(-1000, 1500, (40, 36, 20)).astype(np.int16)
        label = np.zeros(image.shape, np.uint8)
        if number < 2:
            label[5:30, 5:30, 3:15], label[10:20, 10:20, 5:9], label[25:29, 6:9, 4:8] = 1, 2, 3
        item = {"dataset": "one", "modality": "CT", "case": f"case {number}"}
        for name, array in (("image", image), ("label", label)):
            item[name] = str(tmp_path / f"{name}_{number}.nii.gz")
            nib.save(nib.Nifti1Image(array, np.diag([-0.8, -0.8, 2.0, 1.0])), item[name])
        found.append(item)
    return found


def copied(path, folder):
    """Another path with the same bytes and another time."""
    return shutil.copy(path, folder)


def files_in(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def test_a_stored_case_gives_back_what_was_prepared(tmp_path, items):
    stored = CaseStore(tmp_path / "store", TABLE, PREPARATION).open(items[0])
    prepared = prepare_case(items[0], TABLE, PREPARATION)
    assert stored.shape == prepared.image.shape[1:] and stored.channels == 1
    image = stored.read_image()
    assert image.dtype == np.float32
    assert np.abs(image - prepared.image).max() < 5e-5 * np.ptp(prepared.image)
    np.testing.assert_array_equal(stored.read_codes(), prepared.codes)
    box = ((3, 9), (0, 29), (7, 8))
    np.testing.assert_array_equal(stored.read_image(box), image[:, 3:9, 0:29, 7:8])
    np.testing.assert_array_equal(stored.read_codes(box), prepared.codes[3:9, 0:29, 7:8])
    with pytest.raises(ValueError, match="beyond the volume"):
        stored.read_codes(((0, 4), (0, 4), (0, 400)))


def test_foreground_voxels_are_of_their_code_and_ignored_codes_are_left_out(tmp_path, items):
    stored = CaseStore(tmp_path / "store", TABLE, PREPARATION).open(items[0])
    codes = stored.read_codes()
    assert set(stored.foreground) == {1, 2} and (codes == 3).any()
    for code, voxels in stored.foreground.items():
        assert (codes[tuple(voxels.T.astype(int))] == code).all()
        assert len(np.unique(voxels, axis=0)) == len(voxels) == min(10_000, (codes == code).sum())


def test_ten_thousand_voxels_or_one_percent_are_kept():
    codes = np.zeros((150, 150, 150), np.uint8)
    codes[:60, :100, :100], codes[60:, :, :] = 1, 2
    voxels, spans = sample_foreground(codes)
    assert [(code, stop - start) for code, start, stop in spans] == [(1, 10_000), (2, 20_250)]
    assert voxels.dtype == np.uint16 and abs(voxels[:10_000].mean(0) - [29.5, 49.5, 49.5]).max() < 1.5


def test_ahead_in_processes_ahead_alone_and_on_first_touch_give_the_same_bytes(tmp_path, items):
    stores = [CaseStore(tmp_path / name, TABLE, PREPARATION) for name in ("processes", "alone", "touch")]
    report = stores[0].prepare(items, num_workers=2, progress=False)
    assert (report.prepared, report.reused, report.failed, report.empty_labels) == (3, 0, [], ["one/case 2"])
    stores[1].prepare(items, progress=False)
    for item in reversed(items):
        pickle.loads(pickle.dumps(stores[2])).open(item)
    first, second, third = (files_in(store.store_dir) for store in stores)
    assert len(first) == 12 and first == second == third
    again = stores[0].prepare(items, progress=False)
    assert (again.prepared, again.reused) == (0, 3) and again.empty_labels == ["one/case 2"]


def test_workers_are_started_for_missing_cases_only(tmp_path, items, monkeypatch):
    store, started = CaseStore(tmp_path / "store", TABLE, PREPARATION), []
    store.prepare(items[:1], progress=False)
    monkeypatch.setattr(
        store_module, "run_all", lambda function, jobs, n: started.append((len(jobs), n)) or run_all(function, jobs)
    )
    store.prepare(items[:1], num_workers=8, progress=False)
    report = store.prepare(items, num_workers=8, progress=False)
    assert started == [(0, 0), (2, 1)] and (report.prepared, report.reused) == (2, 1)


def test_a_large_store_is_compared_when_it_is_read(tmp_path, items, monkeypatch):
    store = CaseStore(tmp_path / "store", TABLE, PREPARATION)
    paths = [Path(store.open(item).path) for item in items[:2]]
    image = paths[1] / "image.b2nd"
    content = bytearray(image.read_bytes())
    content[len(content) // 2] ^= 1
    image.write_bytes(content)
    monkeypatch.setattr(store_module, "COMPARED_BYTES", 1)
    store_module._VERIFIED.clear()
    assert store.prepare(items[:2], progress=False).reused == 2, "the second would have been read whole"
    with pytest.raises(CaseError, match=r"image\.b2nd"):
        store.open(items[1])


@pytest.mark.parametrize("orientation", ["SPL", "ikj"])
def test_a_label_that_was_read_for_the_fingerprint_is_not_read_again(orientation, tmp_path, items, monkeypatch):
    preparation = replace(PREPARATION, orientation=orientation)
    first, second = (CaseStore(tmp_path / name, TABLE, preparation) for name in ("first", "second"))
    first.prepare(items, progress=False)
    for other in ("SPL", orientation):
        read_as = replace(PREPARATION, orientation=other)
        fingerprint(items, TABLE, read_as, progress=False, sources=second.sources)
    monkeypatch.setattr("tsfm.cases.cases.load_codes", lambda *call: pytest.fail("the label was read again"))
    assert second.prepare(items, progress=False).prepared == 3
    assert files_in(tmp_path / "first/one") == files_in(tmp_path / "second/one")


def test_the_key_follows_what_matters_and_nothing_else(tmp_path, items):
    def key(table=TABLE, preparation=PREPARATION, **changes):
        return CaseStore(tmp_path, table, preparation).path({**items[0], **changes})

    same = key()
    more = LabelTable({**TARGETS, "spleen": {}}, [{"name": "zero", "labels": {"9": "spleen"}}, ONE])
    assert key(table=more) == same, "adding a data set would throw the store away"
    others = [
        key(modality="MR"),
        key(label=items[1]["label"]),
        key(preparation=Preparation((1.5, 1.0, 0.9), PREPARATION.intensity)),
        key(preparation=Preparation((1.5, 1.0, 1.0))),
        key(table=LabelTable(TARGETS, [{**ONE, "labels": {"1": "liver", "4": "lesion"}}])),
        key(table=LabelTable(TARGETS, [{**ONE, "ignore": []}])),
    ]
    os.utime(items[0]["image"], (1, 1))
    assert key() == same, "the time of a file would decide"
    voxels = np.asarray(nib.load(items[0]["image"]).dataobj) + 1
    nib.save(nib.Nifti1Image(voxels, np.diag([-0.8, -0.8, 2.0, 1.0])), items[0]["image"])
    others.append(key())
    assert len({same, *others}) == len(others) + 1


def test_a_copied_pool_and_a_changed_time_prepare_nothing_again(tmp_path, items):
    CaseStore(tmp_path / "store", TABLE, PREPARATION).prepare(items, progress=False)
    (tmp_path / "copy").mkdir()
    moved = [{**item, **{part: copied(item[part], tmp_path / "copy") for part in ("image", "label")}} for item in items]
    report = CaseStore(tmp_path / "store", TABLE, PREPARATION).prepare(moved, progress=False)
    assert (report.prepared, report.reused) == (0, 3)


def test_a_store_of_an_earlier_version_is_taken_over_or_named(tmp_path, items, caplog):
    """Its key was made of absolute path, size and time."""
    store = CaseStore(tmp_path / "store", TABLE, PREPARATION)
    store.prepare(items, progress=False)
    before = files_in(tmp_path / "store")
    for item in items:
        facts = {
            "format": 2, "structures": None, "modality": "CT", "preparation": PREPARATION.to_dict(),
            "labels": TABLE.label_rules("one"),
            "files": [(item[p], os.stat(item[p]).st_size, os.stat(item[p]).st_mtime_ns) for p in ("image", "label")],
        }  # fmt: skip
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
        os.rename(store.path(item), store.path(item)[:-24] + key)
    os.utime(items[2]["label"], (1, 1))
    report = CaseStore(tmp_path / "store", TABLE, PREPARATION).prepare(items, progress=False)
    assert (report.prepared, report.reused) == (1, 2)
    assert "2 cases that an earlier version stored are taken over" in caplog.text
    assert "1 of the 1 cases to prepare are stored, but with other settings" in caplog.text
    now = files_in(tmp_path / "store")
    assert {name: now[name] for name in before} == before


def test_files_are_looked_at_once_per_object(tmp_path, items, monkeypatch):
    store, looked = CaseStore(tmp_path / "store", TABLE, PREPARATION), []
    monkeypatch.setattr(sources, "file_identity", lambda item, run=sources.file_identity: looked.append(1) or run(item))
    CaseStore(tmp_path / "store", TABLE, PREPARATION).open(items[0])
    looked.clear()
    for _ in range(3):
        store.open(items[0])
    assert len(looked) == 1


def test_digests_are_those_of_the_whole_content(tmp_path):
    """Of gzip the two ends are read, where the content's CRC is; bgzip's members each have their own."""
    random = np.random.default_rng(0)
    content = bytearray(random.bytes(100_000))
    blocks = b"\x1f\x8b\x08\x04" + bytes(content)
    digests = set()
    for start in (b"plain", b"", blocks[:4]):
        for flip in (0, 1):
            content[50_000] ^= flip
            body = start + bytes(content) if start else gzip.compress(bytes(content), 0, mtime=0)
            (tmp_path / "file").write_bytes(body)
            digests.add(sources.file_digest(str(tmp_path / "file")))
    assert len(digests) == 6
    assert sources.file_digest(str(tmp_path / "file")) in digests


def test_a_download_that_broke_off_at_once_has_a_digest_too(tmp_path):
    (tmp_path / "cut.nii.gz").write_bytes(b"\x1f\x8b")
    assert len(sources.file_digest(str(tmp_path / "cut.nii.gz"))) == 20


def test_without_raw_data_the_store_alone_is_enough(tmp_path):
    phantoms.write_pool(str(tmp_path / "data"), 2, (24, 32, 32), datasets=["msd_liver", "totalsegmentator"])
    declared = Path(__file__).parents[1] / "bundles/tsfm_pretrain/configs/pool.json"
    names = ["msd_liver", "totalsegmentator"]
    pool = DatasetPool(declared, tmp_path / "data", names)
    preparation = Preparation((10.0, 8.0, 8.0), PREPARATION.intensity)
    plan.prepare(CaseStore(tmp_path / "store", pool.table, preparation), pool.cases, pool=pool)
    before = files_in(tmp_path / "store")
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(PoolError, match="2 of 2 data sets"):
        assert not DatasetPool(declared, tmp_path / "data", names).cases
    kept = DatasetPool(declared, tmp_path / "data", names, kept_in=tmp_path / "store")
    assert kept.cases == pool.cases and kept.split(0) == pool.split(0)
    store = CaseStore(tmp_path / "store", kept.table, preparation, raw_data=False)
    plan.prepare(store, kept.cases, pool=kept)
    assert all(store.open(item).read_codes().any() for item in kept.cases)
    assert files_in(tmp_path / "store") == before
    other = CaseStore(tmp_path / "store", kept.table, Preparation((9.0, 8.0, 8.0)), raw_data=False)
    with pytest.raises(CaseError, match=r"(?s)4 failed.*liver_0.*--raw_data False.*`run prepare`"):
        plan.prepare(other, kept.cases)
    with pytest.raises(PoolError, match=r"(?s)msd_lung.*--raw_data False"):
        assert not DatasetPool(declared, tmp_path / "data", ["msd_lung"], kept_in=tmp_path / "store").cases


def test_bare_items_need_no_data_set(tmp_path, items):
    bare = {"image": items[0]["image"], "label": items[0]["label"]}
    stored = CaseStore(tmp_path / "store", TABLE, PREPARATION).open(bare)
    assert stored.properties["dataset"] == "one" and stored.properties["modality"] == "CT"


def test_names_that_a_file_system_refuses_are_stored_all_the_same(tmp_path, items):
    store = CaseStore(tmp_path / "störe 1", TABLE, PREPARATION)
    stored = store.open({**items[0], "case": "../a/b: ü?"})
    assert Path(stored.path).parent.parent == tmp_path / "störe 1"
    table = LabelTable(
        {f"t{n}": {} for n in range(104)}, [{**ONE, "labels": {"1": "t0", "2": "t1"}, "name": "肝" * 100}]
    )
    maps = table.with_maps({items[0]["label"]: table.names[:100]})  # names the targets by their numbers
    for other in (table, maps):
        dataset = max(other._datasets, key=len)
        item = {**items[0], "case": "é" * 120, "dataset": dataset}
        assert os.path.isdir(CaseStore(tmp_path / "store", other, PREPARATION).open(item).path)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_cases_are_reported_together_and_the_others_go_on(tmp_path, items, num_workers):
    bad = [{**items[0], "case": "gone", "image": "/nowhere/gone.nii.gz"}, {**items[1], "case": "odd", "dataset": "two"}]
    store = CaseStore(tmp_path / "store", TABLE, PREPARATION)
    report = store.prepare([bad[0], *items, bad[1]], num_workers, progress=False)
    assert report.prepared == 3 and {item["case"] for item, _ in report.failed} == {"gone", "odd"}
    with pytest.raises(CaseError, match=r"(?s)3 cases prepared.*2 failed.*gone.nii.gz"):
        report.raise_failures()


def test_an_unwritable_store_is_an_error(tmp_path, items):
    (tmp_path / "file").write_text("not a folder")
    store = CaseStore(tmp_path / "file" / "store", TABLE, PREPARATION)
    with pytest.raises(StoreError, match=r"cannot write the store at .*file/store"):
        store.open(items[0])
    with pytest.raises(StoreError):
        store.prepare(items, progress=False)


def test_a_full_disk_leaves_nothing_behind(tmp_path, items):
    """The limit on file size stands in for the full disk: writing fails in the middle of a file."""
    store = CaseStore(tmp_path / "store", TABLE, PREPARATION)
    store.open(items[1])
    before = files_in(tmp_path / "store")
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(StoreError, match="free some space"):
            store.open(items[0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert files_in(tmp_path / "store") == before
    assert not list((tmp_path / "store" / ".writing").iterdir())
    assert store.open(items[0]).read_codes().any()


def test_two_processes_that_prepare_the_same_case_agree(tmp_path, items):
    store = CaseStore(tmp_path / "store", TABLE, PREPARATION)
    report = store.prepare([items[0]] * 4, num_workers=2, progress=False)
    assert report.prepared + report.reused == 4 and not report.failed
    assert len(files_in(tmp_path / "store")) == 4


def test_leftovers_of_a_killed_process_are_swept(tmp_path, items):
    import socket

    dead = tmp_path / "store" / ".writing" / f".{socket.gethostname()}_999999999_x.partial"
    alive = tmp_path / "store" / ".writing" / f".{socket.gethostname()}_{os.getpid()}_x.partial"
    dead.mkdir(parents=True)
    alive.mkdir()
    CaseStore(tmp_path / "store", TABLE, PREPARATION).prepare([], progress=False)
    assert not dead.exists() and alive.exists()


def test_levels_keep_the_range_and_a_constant_channel_survives():
    image = np.stack([np.linspace(-5, 12, 27).reshape(3, 3, 3), np.full((3, 3, 3), 4.0)]).astype(np.float32)
    levels, steps = quantize(image)
    back = np.stack([channel * step + low for channel, (low, step) in zip(levels, steps, strict=True)])
    assert np.abs(back - image).max() < 17 * 5e-5 and levels.dtype == np.uint16


def test_one_hot_voxel_that_takes_the_levels_from_the_rest_is_warned_of():
    image = np.random.default_rng(0).normal(0, 1, (1, 20, 20, 20)).astype(np.float32)
    prepared = SimpleNamespace(image=image, codes=np.zeros(image.shape[1:], np.uint8), properties={"source": "mr.nii"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        files_of(prepared)
    image[0, 10, 10, 10] = 5000  # 16383 levels over about 5000 standard deviations: 15 for 4.6 of them
    with pytest.warns(CaseWarning, match="mr.nii: channel 0.* reaches 5000 .* leaves 15 gray levels"):
        files_of(prepared)


@pytest.mark.parametrize("share", [0.5, 0.001], ids=["half", "few voxels"])
def test_gray_levels_that_an_outlier_would_merge_are_stored_as_they_are(share, tmp_path):
    random = np.random.default_rng(0)
    image = np.where(random.random((2, 30, 40, 50)) < share, random.integers(1, 9, (2, 30, 40, 50)), 0) * np.float32(
        1e-3
    )
    image[1] += random.normal(0, 1, image.shape[1:])  # a channel for which levels would do
    codes = np.zeros(image.shape[1:], np.uint8)
    properties = {"source": "mr.nii", "shape": codes.shape, "dataset": "one", "empty_label": True}

    def stored(name):
        files = files_of(SimpleNamespace(image=image.astype(np.float32), codes=codes, properties=properties))
        write_folder(str(tmp_path), str(tmp_path / name), files)
        return StoredCase(str(tmp_path / name), TABLE)

    plain = stored("plain")
    assert all(plain.steps) and len(np.unique(plain.read_image()[0])) == 9, "few levels that differ stay apart"
    image[0, 0, 0, 0] = 1e3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CaseWarning)
        exact = stored("exact")
    assert exact.steps == (0.0, 0.0) and np.array_equal(exact.read_image(), image.astype(np.float32))
    assert np.array_equal(exact.read_image(((0, 3), (2, 9), (1, 4))), image[:, :3, 2:9, 1:4].astype(np.float32))


# ---- workers -----------------------------------------------------------------------------------------------------


def square_or_die(number):
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 5:
        raise CaseError("five is bad")
    if number == 6:
        raise MemoryError
    return number**2


def test_data_sets_of_similar_names_have_folders_of_their_own(tmp_path):
    names = ["kits 21", "kits_21", "kits/21"]
    folders = [os.path.basename(os.path.dirname(sources.Sources(tmp_path).path(name))) for name in names]
    assert folders[1] == "kits_21" and len(set(folders)) == 3
    assert all(folder.startswith("kits_21") and folder.isascii() for folder in folders)


def die(*job):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_dying_worker_costs_its_own_job_only():
    results = dict(run_all(square_or_die, [(n,) for n in range(7)], num_workers=2))
    assert isinstance(results[3], WorkerDied) and isinstance(results[5], CaseError)
    assert isinstance(results[6], CaseError) and "6 does not fit into memory" in str(results[6])
    assert [results[n] for n in (0, 1, 2, 4)] == [0, 1, 4, 16]
    died = dict(run_all(die, [(object(), {"case": "a", "image": "a.nii.gz"})], num_workers=1))[0]
    assert "case a (a.nii.gz)" in str(died)


def test_a_script_without_a_guard_is_named_before_workers_run_it_again(tmp_path):
    lines = ["from tsfm.preparation.parallel import run_all", "print(list(run_all(abs, [(-1,), (-2,)], 2)))"]
    (tmp_path / "bare.py").write_text("\n".join(lines))
    done = subprocess.run([sys.executable, "bare.py"], cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert done.returncode == 1 and "bare.py prepares" in done.stderr and 'if __name__ == "__main__":' in done.stderr
    assert done.stdout == "" and done.stderr.count("Traceback") == 1
    (tmp_path / "guarded.py").write_text(f"{lines[0]}\nif __name__ == '__main__':\n    {lines[1]}")
    done = subprocess.run([sys.executable, "guarded.py"], cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert done.stdout in ("[(0, 1), (1, 2)]\n", "[(1, 2), (0, 1)]\n"), done.stderr


def test_an_interrupt_ends_the_run_and_its_workers(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent("""
        import sys, time
        from pathlib import Path
        from tsfm.preparation.parallel import run_all

        def wait(folder, n):
            (Path(folder) / f"started{n}").touch()
            time.sleep(600)

        if __name__ == "__main__":
            list(run_all(wait, [(sys.argv[1], n) for n in range(4)], 2))
        """)
    )
    start = time.monotonic()
    running = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)], stderr=subprocess.PIPE, text=True, preexec_fn=usual_signals
    )
    while len(list(tmp_path.glob("started*"))) < 2 and time.monotonic() < start + 300:
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=240)
    assert running.returncode != 0 and "KeyboardInterrupt" in errors
    assert len(list(tmp_path.glob("started*"))) == 2


def test_case_json_is_plain(tmp_path, items):
    stored = CaseStore(tmp_path / "store", TABLE, PREPARATION).open(items[0])
    index = json.loads((Path(stored.path) / "case.json").read_text())
    assert index["properties"]["spacing_mm"] == [1.5, 1.0, 1.0] and index["properties"]["empty_label"] is False


def test_a_run_that_excludes_a_case_does_not_take_it_from_another_that_needs_no_files(tmp_path):
    """Else the other would go on with fewer cases, and other folds, without a word."""
    for part in "il":
        for case in "ab":
            (tmp_path / f"own/{part}").mkdir(parents=True, exist_ok=True)
            (tmp_path / f"own/{part}/{case}.nii.gz").write_bytes(case.encode())

    def pool(exclude=(), kept_in=None):
        files = {"image": "i/{case}.nii.gz", "label": "l/{case}.nii.gz", "labels": {"1": "liver"}}
        entry = {"name": "own", "folder": "own", "exclude": list(exclude), **files}
        return DatasetPool({"targets": {"liver": {}}, "datasets": [entry]}, tmp_path, kept_in=kept_in)

    def record(store, *pools):
        for one in pools:
            sources.Sources(store).record(one.cases, {"liver": {}}, one.entries)
        return store

    store = record(tmp_path / "both", pool(), pool("b"))
    assert [item["case"] for item in pool(kept_in=store).cases] == ["a", "b"]
    assert [item["case"] for item in pool("b", store).cases] == ["a"]
    store = record(tmp_path / "fewer", pool("b"))
    assert [item["case"] for item in pool("b", store).cases] == ["a"]
    with pytest.raises(PoolError, match="case 'b', which was excluded when the others were prepared, is not known to"):
        _ = pool(kept_in=store).cases
