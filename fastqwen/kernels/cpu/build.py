"""Compile the C++ kernels for this very processor, once; later starts load the file from the cache."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from fastqwen.paths import PRIVATE_FILE, cache_dir, is_trusted

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC")


def load() -> ctypes.CDLL | None:
    """The compiled kernels, or None where there is no working C++ compiler."""
    target = cache_dir() / f"cpu-kernels-{_fingerprint()}.so"
    if not target.exists() and not _compile(target):
        return None
    if not is_trusted(target):
        log.warning("%s can be written by other users and is not loaded; using plain torch, which is slower", target)
        return None
    try:
        return ctypes.CDLL(str(target))
    except OSError as error:
        log.warning("the compiled CPU kernels do not load (%s); using plain torch, which is slower", error)
        return None


def _compile(target: Path) -> bool:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        log.warning("no C++ compiler (g++) found; using plain torch on the CPU, which is slower")
        return False
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        run = subprocess.run(
            [compiler, *FLAGS, str(SOURCE), "-o", str(made)], capture_output=True, text=True, check=False
        )
        if run.returncode != 0:
            log.warning(
                "%s could not compile the CPU kernels; using plain torch, which is slower:\n%s", compiler, run.stderr
            )
            return False
        made.chmod(PRIVATE_FILE)
        os.replace(made, target)  # whole or not at all, also when two processes compile at once
    return True


def _fingerprint() -> str:
    """Source, flags and processor: a cache folder may be shared by machines of different kinds."""
    digest = hashlib.sha256(SOURCE.read_bytes() + " ".join(FLAGS).encode() + platform.machine().encode())
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(errors="replace").splitlines()
        wanted = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
        digest.update("\n".join(wanted[:2]).encode())
    return digest.hexdigest()[:16]
