"""CUDA C++ to machine code by NVRTC, the compiler that torch's CUDA builds bring along; kept between starts."""

from __future__ import annotations

import ctypes
import hashlib
import os
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

from fastqwen.paths import cache_dir


class CannotCompile(Exception):
    """NVRTC is not there, or refuses a program; the text says why."""


def machine_code(source: str, defines: Mapping[str, str], capability: tuple[int, int]) -> bytes:
    """A program for one compute capability, from the cache if it was compiled before. Raises CannotCompile."""
    options = ["--std=c++17", f"--gpu-architecture=sm_{capability[0]}{capability[1]}"]
    options += [f"-D{name}={value}" for name, value in defines.items()]
    digest = hashlib.sha256("\0".join([source, *options, str(torch.version.cuda)]).encode()).hexdigest()[:24]
    kept = cache_dir() / "cuda" / f"{digest}.cubin"
    if kept.is_file():
        return kept.read_bytes()
    code = _compile(source, options)
    kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=kept.parent, delete=False) as file:
        file.write(code)
    os.replace(file.name, kept)  # whole or not at all, also when two processes compile at once
    return code


def _compile(source: str, options: list[str]) -> bytes:
    library = _library()
    program = ctypes.c_void_p()
    _check(library, library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"fastqwen.cu", 0, None, None))
    try:
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if library.nvrtcCompileProgram(program, len(options), given):
            raise CannotCompile(_text(library, program, "ProgramLog").decode(errors="replace").strip())
        return _text(library, program, "CUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _text(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(library, getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    text = ctypes.create_string_buffer(size.value)
    _check(library, getattr(library, f"nvrtcGet{what}")(program, text))
    return text.raw


def _check(library: ctypes.CDLL, code: int) -> None:
    if code:
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise CannotCompile(f"NVRTC: {library.nvrtcGetErrorString(code).decode()}")


@cache
def _library() -> ctypes.CDLL:
    """As the system finds it, or where pip puts it beside torch."""
    name = f"libnvrtc.so.{str(torch.version.cuda).split('.')[0]}"
    beside = sorted((Path(torch.__file__).parents[1] / "nvidia").glob(f"*/lib/{name}"))
    for place in (name, *map(str, beside)):
        try:
            return ctypes.CDLL(place)
        except OSError:
            continue
    raise CannotCompile(f"{name} is not found")
