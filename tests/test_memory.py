"""Memory that stays with a process of one's own, and only there."""

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import os, resource, sys, torch
if "keep" in sys.argv:
    from tsfm.network.cpu import keep_freed_memory
    keep_freed_memory()
for i in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, os.environ.get("THP_MEM_ALLOC_ENABLE"))
"""


def _keeps_large_blocks() -> bool:
    """Before 2.35, glibc refuses a threshold above 32 MiB."""
    name, version = platform.libc_ver()
    return name == "glibc" and tuple(map(int, version.split("."))) >= (2, 35)


@pytest.mark.skipif(not _keeps_large_blocks(), reason="needs glibc 2.35 or newer")
def test_a_process_that_asks_for_it_touches_the_pages_of_a_64_mib_tensor_once():
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("THP_", "MALLOC_"))}

    def run(*arguments):
        command = [sys.executable, "-c", FAULTS, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()

    usual, kept = run(), run("keep")
    assert usual[1] == "None" and kept[1] == "1"
    assert int(kept[0]) < 10 and int(kept[0]) < int(usual[0])


def test_importing_the_package_sets_none_of_the_variables():
    script = "import os, tsfm.inference.windows; print([k for k in os.environ if k.startswith(('THP_', 'MALLOC_'))])"
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("THP_", "MALLOC_"))}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
