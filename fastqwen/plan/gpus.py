"""From what the user calls a GPU to its facts: a name, an amount of memory, or what this machine has."""

from __future__ import annotations

import functools
import re
import subprocess
from pathlib import Path
from typing import Any

import msgspec

from fastqwen.errors import BadConfig
from fastqwen.plan.facts import GIB, MIB, DeviceFacts
from fastqwen.plan.host_memory import free_bytes, total_bytes

DATA = Path(__file__).parent.parent / "data"
NVIDIA_SMI = ("nvidia-smi", "--query-gpu=name,memory.total,compute_cap,memory.used", "--format=csv,noheader,nounits")
NVIDIA_SMI_TIMEOUT_S = 10
NOMINAL_SLACK = 0.93  # a "24 GB" card shows 22.5 to 24 GiB


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """A card's data sheet."""

    name: str
    memory_mib: int
    bandwidth_gb_s: float
    compute_capability: str
    matmul_tflops: float
    multiprocessors: int
    source: str

    def facts(self) -> DeviceFacts:
        return DeviceFacts(
            kind="cuda",
            name=self.name,
            total_bytes=self.memory_mib * MIB,
            free_bytes=self.memory_mib * MIB,
            compute_capability=_capability(self.compute_capability),
            multiprocessors=self.multiprocessors,
            bandwidth_gb_s=self.bandwidth_gb_s,
            matmul_tflops=self.matmul_tflops,
        )


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """What to plan for. ``slow`` and ``fast`` differ if only an amount of memory is known: the range of such cards."""

    facts: DeviceFacts
    slow: DeviceFacts
    fast: DeviceFacts
    label: str
    installed: int = 1  # how many of them this machine has


@functools.cache
def known_gpus() -> tuple[Gpu, ...]:
    values = msgspec.json.decode((DATA / "gpus.json").read_bytes())
    return tuple(msgspec.convert(values["gpus"], list[Gpu]))


def find_target(gpu: str) -> Target:
    """Raises BadConfig for a name that no known card has."""
    text = gpu.strip()
    if text.lower() == "auto":
        return _this_machine()
    memory = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(g|gb|gib)", text.lower())
    if memory:
        return _any_card(float(memory[1]), text)
    found = _by_name(text)
    return one_device(found.facts(), found.name)


def _by_name(text: str) -> Gpu:
    """The one card whose name has all the words; several that differ only in memory are told apart by it."""
    words = _words(text)
    exact = [gpu for gpu in known_gpus() if _words(gpu.name) == words]
    matches = exact or [gpu for gpu in known_gpus() if words and words <= _words(gpu.name)]
    if not matches:
        raise BadConfig(
            f"--gpu is {text!r}, which is not in the list of GPUs: give its memory instead, for example 24GB, or one of "
            + ", ".join(gpu.name for gpu in known_gpus())
        )
    fewest = min(len(_words(gpu.name)) for gpu in matches)
    plain = [gpu for gpu in matches if len(_words(gpu.name)) == fewest]  # 3090 is the RTX 3090, not the Ti
    if len(plain) == 1:
        return plain[0]
    if len(matches) > 1:
        raise BadConfig(f"--gpu is {text!r}, which could be {' or '.join(gpu.name for gpu in matches)}")
    return matches[0]


def _words(name: str) -> set[str]:
    text = re.sub(r"(\d)\s+(gb|gib)\b", r"\1gb", name.lower().replace("-", " "))
    text = re.sub(r"\b(rtx|gtx)(\d)", r"\1 \2", text)
    text = re.sub(r"(\d)(ti)\b", r"\1 \2", text)
    return set(text.split()) - {"nvidia", "geforce", "tesla", "quadro"}


def _any_card(gigabytes: float, text: str) -> Target:
    """Planned for the card of that size that leaves the engine least, so that the answer holds for all of them."""
    if not 1 <= gigabytes <= 4096:
        raise BadConfig(f"--gpu is {text!r}: give between 1GB and 4096GB")
    total = int(gigabytes * GIB)
    alike = [gpu for gpu in known_gpus() if NOMINAL_SLACK * total <= gpu.memory_mib * MIB <= 1.01 * total]
    nearest = alike or [min(known_gpus(), key=lambda gpu: abs(gpu.memory_mib * MIB - total))]
    slow = min(nearest, key=lambda gpu: gpu.bandwidth_gb_s).facts()
    fast = max(nearest, key=lambda gpu: gpu.bandwidth_gb_s).facts()
    label = f"{gigabytes:g} GiB GPU"
    facts = msgspec.structs.replace(
        slow,
        name=label,
        total_bytes=total,
        free_bytes=total,
        compute_capability=max(gpu.facts().compute_capability or (0, 0) for gpu in nearest),
        multiprocessors=max(gpu.multiprocessors for gpu in nearest),
    )
    return Target(facts=facts, slow=slow, fast=fast, label=label)


def _this_machine() -> Target:
    """The GPU with the least free memory that nvidia-smi names, else this machine's memory."""
    rows = _nvidia_smi()
    if not rows:
        facts = host_facts()
        return one_device(facts, f"this machine's CPU with {facts.total_bytes / GIB:.1f} GiB")
    name, mib, capability, used_mib = min(rows, key=lambda row: row[1] - row[3])
    sheet = data_sheet(name, mib)
    facts = DeviceFacts(
        kind="cuda",
        name=name,
        total_bytes=mib * MIB,
        free_bytes=(mib - used_mib) * MIB,
        compute_capability=_capability(capability),
        multiprocessors=sheet.multiprocessors if sheet else None,
        bandwidth_gb_s=sheet.bandwidth_gb_s if sheet else None,
        matmul_tflops=sheet.matmul_tflops if sheet else None,
    )
    return msgspec.structs.replace(one_device(facts, name), installed=len(rows))


def data_sheet(name: str, mib: int) -> Gpu | None:
    """The data sheet that fits a driver's name of a card, whose words are more than ours: 'NVIDIA A100-SXM4-80GB'."""
    words = _words(name)
    fitting = [
        gpu
        for gpu in known_gpus()
        if _words(gpu.name) - {"sxm", "pcie", f"{round(gpu.memory_mib / 1024)}gb"} <= words
        and abs(gpu.memory_mib - mib) < 0.1 * mib
    ]
    return max(fitting, key=lambda gpu: len(_words(gpu.name) & words), default=None)


def _nvidia_smi() -> list[tuple[str, int, str, int]]:
    """Name, memory in MiB, compute capability and MiB in use of each GPU; nothing where there is no driver."""
    try:
        run = subprocess.run(NVIDIA_SMI, capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = []
    for line in run.stdout.splitlines() if run.returncode == 0 else []:
        name, total, capability, used = [*(part.strip() for part in line.split(",")), "", "", ""][:4]
        if total.isdigit():
            rows.append((name, int(total), capability, int(used) if used.isdigit() else 0))
    return rows


def host_facts() -> DeviceFacts:
    return DeviceFacts(kind="cpu", name="CPU", total_bytes=total_bytes(), free_bytes=free_bytes())


def one_device(facts: DeviceFacts, label: str) -> Target:
    return Target(facts=facts, slow=facts, fast=facts, label=label)


def _capability(text: Any) -> tuple[int, int] | None:
    parts = str(text).split(".")
    return (int(parts[0]), int(parts[1])) if len(parts) == 2 and all(part.isdigit() for part in parts) else None
