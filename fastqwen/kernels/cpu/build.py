"""Compile the C++ kernels for this very processor, once; later starts load the file from the cache."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fastqwen.errors import BadConfig
from fastqwen.paths import PRIVATE_FILE, cache_dir, is_trusted

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
# What takes longest is begun first: they are compiled side by side.
SOURCES = tuple(FOLDER / name for name in ("attention.cpp", "packed.cpp", "kernels.cpp", "scaled.cpp"))
COMPILERS = ("g++", "clang++", "c++")
# Where a product and a sum may be one rounding, they are: compilers differ in what they do unasked.
FLAGS = ("-O3", "-std=c++17", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread", "-Wno-psabi")
# clang takes only the second of these on some processors; where neither is taken, it is compiled for any of its kind.
PROCESSOR_FLAGS = (("-march=native",), ("-mcpu=native",), ())
ERROR_LINES = 10
ROOM_BYTES = 16 * 2**20  # what comes of compiling, with what the compiler writes beside it


def load() -> ctypes.CDLL | None:
    """The compiled kernels, or None where there is no working C++ compiler, or no folder that code can be loaded from."""
    compilers = find_compilers()
    name = f"cpu-kernels-{_fingerprint(compilers)}.so"
    try:
        target = cache_dir() / name
        if not target.exists() and not compile_kernels(compilers, target):
            return None
        if is_trusted(target):
            return ctypes.CDLL(str(target))
        log.warning("%s can be written by other users and is not loaded; using plain torch, which is slower", target)
    except (OSError, BadConfig) as error:
        log.warning(
            "the cache cannot hold the compiled CPU kernels (%s); compiling them into a temporary folder, which makes every "
            "start slower (FASTQWEN_CACHE names another cache)",
            error,
        )
        return _load_once(compilers, name)
    return None


def _load_once(compilers: list[str], name: str) -> ctypes.CDLL | None:
    """A library stays loaded when its file is gone."""
    try:
        with tempfile.TemporaryDirectory(prefix="fastqwen-") as folder:
            target = Path(folder) / name
            return ctypes.CDLL(str(target)) if compile_kernels(compilers, target) else None
    except OSError as error:
        log.warning("the compiled CPU kernels do not load (%s); using plain torch, which is slower", error)
        return None


def find_compilers() -> list[str]:
    """The one that CXX names, else those that are usual."""
    wanted = (os.environ["CXX"],) if os.environ.get("CXX") else COMPILERS
    return [found for found in map(shutil.which, wanted) if found is not None]


def compile_kernels(compilers: list[str], target: Path) -> bool:
    """By the first compiler and the first flags that work. Raises OSError where the target's folder cannot be written, or is
    full."""
    first_error = ""
    if shutil.disk_usage(target.parent).free < ROOM_BYTES:  # else it shows when half a minute of work is done
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target.parent))
    if compilers:
        log.info("compiling the CPU kernels, once for this machine (about ten seconds)")
    for compiler in compilers:
        for processor in PROCESSOR_FLAGS:
            error = _compile([compiler, *FLAGS, *processor], target)
            if error is None:
                return True
            first_error = first_error or f"{compiler} could not compile the CPU kernels:\n{error}"
    log.warning(
        "%s; using plain torch on the CPU, which is slower", first_error or "no C++ compiler (g++, clang++) found"
    )
    return False


def _compile(command: list[str], target: Path) -> str | None:
    """Why it failed, in a few lines; None if ``target`` is there. Raises OSError for a folder that cannot hold it."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        objects = [made.with_name(f"{source.stem}.o") for source in SOURCES]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            pairs = zip(SOURCES, objects, strict=True)
            runs = list(pool.map(lambda pair: _run([*command, "-c", str(pair[0]), "-o", str(pair[1])], folder), pairs))
        error = next(filter(None, runs), None) or _run([*command, *map(str, objects), "-o", str(made)], folder)
        if error is not None:
            if os.strerror(errno.ENOSPC) in error:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target.parent))
            return "\n".join(error.splitlines()[:ERROR_LINES])
        made.chmod(PRIVATE_FILE)
        os.replace(made, target)  # whole or not at all, also when two processes compile at once
    return None


def _run(command: list[str], folder: str) -> str | None:
    """What it said, if it failed. ``folder`` is for the files in between: TMPDIR may be full, where Python looks for another."""
    env = {**os.environ, "TMPDIR": folder}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    return None if run.returncode == 0 else run.stderr or f"exit status {run.returncode}"


def _fingerprint(compilers: list[str]) -> str:
    """Source, flags, compilers and processor: a cache folder may be shared by machines of different kinds."""
    words = " ".join((*FLAGS, *compilers, platform.machine(), platform.processor()))
    digest = hashlib.sha256(words.encode())
    for source in sorted((*SOURCES, *FOLDER.glob("*.h"))):
        digest.update(source.read_bytes())
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(errors="replace").splitlines()
        wanted = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
        digest.update("\n".join(wanted[:2]).encode())
    return digest.hexdigest()[:16]
