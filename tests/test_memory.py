"""Freed memory stays with the process within the block and goes back after it."""

import platform
import subprocess
import sys
import threading

import pytest
from tsfm.network import cpu as memory

RESIDENT = """
import resource, torch
from tsfm.memory import reused_memory

def mib():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20

def faults(size=2**24):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(size)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
before = mib()
print(faults())
with reused_memory():
    for i in range(40):
        faults()
    kept = mib() - before
    for i in range(100):
        last = faults()
    print(last, kept, mib() - before)
print(mib() - before)
"""


def _keeps_large_blocks() -> bool:
    """Before 2.35, glibc refuses a threshold above 32 MiB."""
    name, version = platform.libc_ver()
    return name == "glibc" and tuple(map(int, version.split("."))) >= (2, 35)


@pytest.mark.skipif(not _keeps_large_blocks(), reason="needs glibc 2.35 or newer")
def test_tensors_of_64_mib_take_each_others_pages_and_all_go_back():
    done = subprocess.run([sys.executable, "-c", RESIDENT], capture_output=True, text=True, check=True)
    usual, reused, kept, later, after = map(float, done.stdout.split())
    assert reused < usual / 10
    # One block as a rule; a few where the heap, which begins at random, leaves gaps. Never one more for each tensor.
    assert 60 < kept < 40 * 64 / 2
    assert later < kept + 8
    assert after < 10


def test_blocks_nest_and_overlap_between_threads():
    with memory.reused_memory():
        inside, end = threading.Event(), threading.Event()

        def other():
            with memory.reused_memory():
                inside.set()
                end.wait(10)

        thread = threading.Thread(target=other)
        thread.start()
        assert inside.wait(10) and memory._users == 2
    assert memory._users == 1
    end.set()
    thread.join()
    assert memory._users == 0


def test_without_glibc_nothing_happens(monkeypatch):
    monkeypatch.setattr(memory, "_glibc", lambda: None)
    with pytest.raises(KeyError), memory.reused_memory():
        raise KeyError
    assert memory._users == 0
