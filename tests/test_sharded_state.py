"""States that are written in shares and in the background: nothing is lost, torn or executed."""

import os
import pickle
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import environment, warm
from ignite.engine import Events
from test_checkpoint import Attack
from test_training import SMALL, optimizer_of, run_state
from torch.distributed.checkpoint import filesystem
from tsfm.network.sharding import set_shares, take_shares
from tsfm.network.tsfm_net import TSFM
from tsfm.training.checkpoint import read_state
from tsfm.training.sharded_state import ShardedStates, read_tensors, read_values
from tsfm.training.weight_files import CheckpointError

pytestmark = pytest.mark.convolutions

EPOCHS = 5


@pytest.fixture
def slow_disk(monkeypatch):
    """Shares are written long after the next steps were taken."""
    write = filesystem.FileSystemWriter.write_data

    def late(*arguments):
        time.sleep(0.3)
        return write(*arguments)

    monkeypatch.setattr(filesystem.FileSystemWriter, "write_data", late)


def train(folder, stop_after=None, epochs=EPOCHS, **options):
    torch.manual_seed(0)
    network = TSFM(**{**SMALL, "dropout": 0.5})
    trainer, curve = run_state(folder, network, **options)
    trainer.state.max_epochs = epochs
    if stop_after:
        trainer.add_event_handler(Events.EPOCH_COMPLETED(once=stop_after), lambda engine: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.run()
        deadline = time.monotonic() + 60
        while not (folder / f"last/epoch_{stop_after - stop_after % 2}").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
    else:
        trainer.run()
    return {name: value for name, value in network.state_dict().items() if name != "_extra_state"}, curve


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_that_writes_every_second_epoch_in_shares_ends_bit_for_bit_as_one_that_never_stopped(tmp_path, slow_disk):
    whole, curve = train(tmp_path / "whole")
    train(tmp_path / "parts", stop_after=3, sharded=True, save_interval=2)
    assert [path.name for path in ShardedStates(tmp_path / "parts/last").finished()] == ["epoch_2"]
    parts, resumed = train(tmp_path / "parts", sharded=True, save_interval=2)
    assert same(whole, parts) and [row["loss"] for row in resumed.rows] == [row["loss"] for row in curve.rows]
    assert [path.name for path in ShardedStates(tmp_path / "parts/last").finished()] == ["epoch_5", "epoch_4"]
    assert not (tmp_path / "parts/last.pt").exists()
    assert same(read_state(tmp_path / "parts/model.pt")[0], parts)


def test_a_run_may_change_from_one_way_of_writing_to_the_other_and_back(tmp_path):
    whole, _ = train(tmp_path / "whole")
    train(tmp_path / "parts", epochs=2)
    train(tmp_path / "parts", epochs=4, sharded=True)
    parts, curve = train(tmp_path / "parts")
    assert same(whole, parts) and len(curve.rows) == EPOCHS


def test_a_write_that_is_killed_leaves_the_state_before_and_is_swept_away(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(
        f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import test_sharded_state as tests
write, calls = tests.filesystem.FileSystemWriter.write_data, []
def write_half(writer, plan, planner):
    done = write(writer, plan, planner)
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return done
tests.filesystem.FileSystemWriter.write_data = write_half
tests.train(Path({str(tmp_path / "run")!r}), sharded=True)
"""
    )
    killed = subprocess.run(
        [warm().python, str(script)], env=environment(), capture_output=True, timeout=300, check=False
    )
    assert killed.returncode != 0
    assert list((tmp_path / "run/last").glob(".epoch_3.partial/*.distcp")), killed.stderr.decode()[-2000:]
    assert [path.name for path in ShardedStates(tmp_path / "run/last").finished()] == ["epoch_2", "epoch_1"]
    whole, _ = train(tmp_path / "whole")
    parts, _ = train(tmp_path / "run", sharded=True)
    assert same(whole, parts) and not list((tmp_path / "run/last").glob(".*"))


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "run.pt"])
def test_a_damaged_state_is_found_and_the_one_before_taken(tmp_path, caplog, name):
    whole, _ = train(tmp_path / "whole")
    train(tmp_path / "run", epochs=3, sharded=True)
    path = tmp_path / "run/last/epoch_3" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    if name == ".metadata":
        os.truncate(path, len(content) // 2)
    parts, _ = train(tmp_path / "run", sharded=True)
    assert str(path.parent) in caplog.text and "epoch_2, after epoch 2" in caplog.text
    assert same(whole, parts)


def test_a_copy_that_someone_made_of_a_state_is_none(tmp_path):
    train(tmp_path, epochs=1, sharded=True)
    (tmp_path / "last/epoch_1").rename(tmp_path / "last/epoch_1_before")
    assert len(train(tmp_path, epochs=1, sharded=True)[1].rows) == 1
    assert {path.name for path in (tmp_path / "last").iterdir()} == {"epoch_1", "epoch_1_before"}


def test_a_disk_that_is_full_stops_the_run_and_leaves_the_state_before(tmp_path, monkeypatch):
    train(tmp_path, epochs=2, sharded=True)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(filesystem.FileSystemWriter, "write_data", full)
    with pytest.raises(OSError, match=r"No space left.*epoch_3"):
        train(tmp_path, sharded=True)
    monkeypatch.undo()
    assert same(train(tmp_path, sharded=True)[0], train(tmp_path / "whole")[0])


def test_nothing_that_a_state_holds_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(tmp_path, epochs=1, sharded=True)
    state = tmp_path / "last/epoch_1"
    tensors, _ = take_shares(network := TSFM(**SMALL), optimizer_of(network.parameters()))
    (state / ".metadata").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(CheckpointError, match=r"names posix\.system"):
        read_tensors(state, tensors)
    with pytest.raises(CheckpointError, match=r"names posix\.system"):
        read_values(state)
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("kind", [optimizer_of, torch.optim.AdamW])
def test_shares_hold_all_of_network_and_optimizer_under_names_that_do_not_depend_on_the_number_of_processes(kind):
    def stepped(seed, steps):
        torch.manual_seed(seed)
        network = TSFM(**SMALL)
        optimizer = kind(network.parameters(), lr=0.01)
        for _ in range(steps):
            network(torch.ones(1, 1, 8, 8, 8)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return network, optimizer

    first, second = stepped(0, 2), stepped(1, 0)
    tensors, others = take_shares(*first)
    assert all(name.split(".", 1)[1].startswith(tuple(dict(first[0].named_parameters()))) for name in tensors)
    set_shares(*second, {name: value.clone() for name, value in tensors.items()}, others)
    for network, optimizer in (first, second):
        network(torch.ones(1, 1, 8, 8, 8)).square().mean().backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(first[0].parameters(), second[0].parameters(), strict=True))
