"""Whether this torch computes on a GPU of this machine, asked before anything is loaded; and if not, why, in one line."""

from __future__ import annotations

import os
import re
import warnings
from functools import cache
from pathlib import Path

import torch

from fastqwen.plan.generations import OLD_TORCH_BUILD, OLD_TORCH_INSTALL, generation_of, hindrance
from fastqwen.plan.gpus import installed_driver

NEWEST_CUDA_DRIVER = 580  # the least driver for CUDA 13 (CUDA Toolkit release notes, table of minimum driver versions)
OLD_CUDA_DRIVER = 525  # and for CUDA 12.6, by minor version compatibility
AMD_DRIVER = Path("/dev/kfd")


@cache
def why_no_gpu() -> str | None:
    """None: torch computes on the GPU. Else the reason, and what to do; empty if there is nothing to compute on."""
    if torch.version.hip is not None:
        return f"torch {torch.__version__} is built for AMD's GPUs, which fastqwen does not support"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own words about the driver: ours follow
        if not torch.cuda.is_available():
            return _without_cuda()
        try:
            device = torch.cuda.current_device()
            name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        except RuntimeError as error:
            return f"the GPU does not start: {str(error).splitlines()[0]}"
    return why_not_on(name, capability, torch.cuda.get_arch_list(), str(torch.version.cuda))


def why_not_on(name: str, capability: tuple[int, int], architectures: list[str], cuda: str) -> str | None:
    """``architectures`` are those that torch was compiled for, as it names them; ``cuda`` is the version of its build."""
    build = "cu" + cuda.replace(".", "")
    stops = hindrance(name, capability, build)
    if stops is not None or has_code(capability, architectures):
        return stops
    instead = (
        "install torch of the ordinary index" if build == OLD_TORCH_BUILD else "install a build of torch that knows it"
    )
    if generation_of(capability).torch_build == OLD_TORCH_BUILD:
        instead = f"install torch's build for CUDA 12.6 ({OLD_TORCH_INSTALL})"
    return (
        f"{name} has compute capability {capability[0]}.{capability[1]}, for which torch {torch.__version__} "
        f"(CUDA {cuda}) has no code: {instead}"
    )


def has_code(capability: tuple[int, int], architectures: list[str]) -> bool:
    """Compiled code runs on the same major version from its minor version on, and code for PTX on whatever is newer; what
    ends with a letter is for one capability."""
    for architecture in architectures:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", architecture)
        if match is None:
            continue
        found = (int(match[2]), int(match[3]))
        if match[4] == "a" or match[1] == "sm":
            runs = found[0] == capability[0] and (found[1] == capability[1] or (not match[4] and found < capability))
        else:
            runs = found <= capability
        if runs:
            return True
    return False


def _without_cuda() -> str:
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return ""  # hidden on purpose
    installed = installed_driver()
    if installed is not None:
        return _unused_driver(*installed)
    if getattr(torch, "xpu", None) is not None and torch.xpu.is_available():
        return "Intel's GPUs are not supported"
    if torch.backends.mps.is_available():
        return "Apple's GPUs are not supported"
    return "AMD's GPUs are not supported" if AMD_DRIVER.exists() else ""


def _unused_driver(name: str, driver: str) -> str:
    """One line for what takes people an evening: a GPU and a driver, and a torch that does not use them."""
    cuda = torch.version.cuda
    if cuda is None:
        return (
            f"there is a {name} with driver {driver}, but torch {torch.__version__} is built for CPUs: "
            "pip install --force-reinstall torch"
        )
    least = NEWEST_CUDA_DRIVER if int(cuda.split(".")[0]) >= 13 else OLD_CUDA_DRIVER
    if driver.split(".")[0].isdigit() and int(driver.split(".")[0]) >= least:
        return (
            f"torch {torch.__version__} (CUDA {cuda}) does not start on the {name} with driver {driver}: see nvidia-smi"
        )
    older = "" if least == OLD_CUDA_DRIVER else f", or install torch's build for CUDA 12.6 ({OLD_TORCH_INSTALL})"
    return (
        f"the driver {driver} of the {name} is too old for torch {torch.__version__} (CUDA {cuda}): install driver {least} or "
        f"newer{older}"
    )
