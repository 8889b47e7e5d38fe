"""Builds ``guard.cpp`` with the headers of the installed torch, without importing torch.

The library must be loaded before torch is imported, which finds the hooks of a device only once.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")
OLDEST_TORCH = (2, 13)
"""The release of torch whose interface of devices the source implements."""


def reason_to_skip() -> str | None:
    """Return why the device cannot be simulated here, or None."""
    found = version("torch")
    if sys.platform != "linux" or shutil.which("g++") is None:
        return "the simulated device needs Linux and g++"
    if tuple(map(int, found.split(".")[:2])) < OLDEST_TORCH:
        return f"the simulated device needs torch {'.'.join(map(str, OLDEST_TORCH))}, got {found}"
    if list((_torch() / "lib").glob("libtorch_cuda*")):
        return "the simulated device needs a torch without CUDA"
    return None


def built() -> Path:
    """Return the library, which is built once for each torch, compiler and text of the source."""
    compiler = subprocess.run(["g++", "--version"], check=True, capture_output=True, text=True)
    key = SOURCE.read_text() + version("torch") + compiler.stdout
    folder = Path(tempfile.gettempdir()) / f"einconv-kfac-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} must belong to this user.")
    library = folder / f"guard-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        unfinished = library.with_suffix(f".{os.getpid()}")
        subprocess.run([*_command(), "-o", str(unfinished)], check=True)
        unfinished.replace(library)  # at once, since several processes may build
    return library


def load() -> ctypes.CDLL:
    """Register the simulated device in this process, and return the library."""
    assert "torch" not in sys.modules, "the guard must be loaded before torch"
    library = ctypes.CDLL(str(built()), ctypes.RTLD_GLOBAL)
    library.copy_engine.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    library.copy_engine.restype = None
    return library


def _torch() -> Path:
    """Return the folder of torch."""
    spec = find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _command() -> list[str]:
    """Return the compiler's call, without its output."""
    include, lib = _torch() / "include", _torch() / "lib"
    headers = [f"-I{include}", f"-I{include / 'torch/csrc/api/include'}"]
    link = [f"-L{lib}", f"-Wl,-rpath,{lib}", "-lc10", "-ltorch_cpu"]
    return ["g++", "-O1", "-std=c++20", "-shared", "-fPIC", *headers, str(SOURCE), *link]
