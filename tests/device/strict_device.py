"""The device ``strict`` of strict.cpp, built with what torch.utils.cpp_extension knows of the compiler."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import types
import zlib
from pathlib import Path

import torch
from conftest import ROOT
from torch.utils import cpp_extension

SOURCE = Path(__file__).with_name("strict.cpp")


def compiler() -> str | None:
    """Path of the C++ compiler, None where there is none."""
    return shutil.which(cpp_extension.get_cxx_compiler())


@functools.cache
def strict_device() -> torch.device:
    """Register the device with torch, built before (once; a quarter of a minute) if need be."""
    torch.ops.load_library(_built())
    torch.utils.rename_privateuse1_backend("strict")
    torch._register_device_module("strict", _module())
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    return torch.device("strict:0")


def _built() -> Path:
    """The library of this source and this torch."""
    library = ROOT / f"build/strict-{torch.__version__}-{zlib.crc32(SOURCE.read_bytes()):08x}.so"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}")
        paths = [part for path in cpp_extension.include_paths() for part in ("-isystem", path)]
        paths += [f"-L{path}" for path in cpp_extension.library_paths()]
        command = [compiler(), str(SOURCE), "-shared", "-fPIC", "-std=c++20", "-O1", *paths]
        subprocess.run([*command, "-lc10", "-ltorch_cpu", "-ltorch", "-o", str(unfinished)], check=True)
        unfinished.replace(library)
    return library


def _module() -> types.ModuleType:
    """What torch asks of ``torch.strict``; its random numbers are the processor's."""
    module = types.ModuleType("torch.strict")
    module.is_available = module.is_initialized = lambda: True
    module._is_in_bad_fork = lambda: False
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module.manual_seed_all = lambda seed: None
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    return module
