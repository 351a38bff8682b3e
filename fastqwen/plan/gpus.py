"""From what the user calls a GPU to its facts: a name, an amount of memory, or what this machine has."""

from __future__ import annotations

import functools
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import msgspec

from fastqwen.errors import BadConfig
from fastqwen.plan.facts import GIB, MIB, DeviceFacts
from fastqwen.plan.generations import generation_of, hindrance, torch_build
from fastqwen.plan.host import host_facts, measure_bandwidth

DATA = Path(__file__).parent.parent / "data"
NVIDIA_SMI = ("nvidia-smi", "--query-gpu=name,memory.total,compute_cap,memory.used", "--format=csv,noheader,nounits")
NVIDIA_SMI_DRIVER = ("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
NVIDIA_SMI_TIMEOUT_S = 10
NOMINAL_SLACK = 0.93  # a "24 GB" card shows 22.5 to 24 GiB
MOST_BARE_GIGABYTES = 640  # a larger number alone is a card's
MAKERS = {"nvidia", "geforce", "tesla", "quadro"}
PLAIN_WORDS = {
    "pascal", "volta", "turing", "ampere", "hopper", "blackwell", "generation", "workstation", "edition", "gpu", "superchip",
}  # fmt: skip
# Words that name another card than the one without them; people leave out the last three.
OTHER_CARD_WORDS = {"ti", "super", "laptop", "d", "server", "sff"}
TELLING_WORDS = {*OTHER_CARD_WORDS, "nvl", "ada", "pro"}
OTHER_MAKERS = {
    "AMD": r"amd|radeon|rx|instinct|mi\d{2,3}[ax]?",
    "Intel": r"intel|arc|iris|gaudi|max 1\d00",
    "Apple": r"apple|m[1-9]( (pro|max|ultra))?",
}
ALIASES = {"dgx spark": "gb10", "gtx titan": "titan", "6000 blackwell": "pro 6000"}
FORM_WORDS = {"sxm", "pcie", "hbm"}


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """A card's data sheet."""

    name: str
    memory_mib: int
    bandwidth_gb_s: float
    compute_capability: str
    matmul_tflops: float
    multiprocessors: int
    source: str
    usual: bool = False  # is meant if a name fits several

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

    def hindrance(self, build: str | None) -> str | None:
        """Why fastqwen does not compute there with this build of torch (generations.torch_build)."""
        return hindrance(self.name, _capability(self.compute_capability), build)


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """What to plan for. ``slow`` and ``fast`` differ if only an amount of memory is known: the range of such cards."""

    facts: DeviceFacts
    slow: DeviceFacts
    fast: DeviceFacts
    label: str
    installed: int = 1  # how many of them this machine has
    hindrance: str | None = None  # why fastqwen does not compute there, and what to do
    notices: tuple[str, ...] = ()


@functools.cache
def known_gpus() -> tuple[Gpu, ...]:
    values = msgspec.json.decode((DATA / "gpus.json").read_bytes())
    return tuple(msgspec.convert(values["gpus"], list[Gpu]))


def find_target(gpu: str) -> Target:
    """Raises BadConfig for a name that no known card has."""
    text = gpu.strip()
    if text.lower() == "auto":
        return _this_machine()
    if text.lower() == "cpu":
        return _this_cpu()
    memory = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(g|gb|gib)?", text.lower())
    if memory and (memory[2] or float(memory[1]) <= MOST_BARE_GIGABYTES):
        return _any_card(float(memory[1]), text)
    found, others = _by_name(text)
    notices = (f"{text} is taken for the {found.name}; there is also {', '.join(others)}",) if others else ()
    return msgspec.structs.replace(one_device(found.facts(), found.name), notices=notices)


def _by_name(text: str) -> tuple[Gpu, list[str]]:
    """The card whose name has all the words, and the names of others that have them: those with the fewest words go before
    (3090 is the RTX 3090, not the Ti), then the usual one."""
    words, gigabytes = _split(text)
    fitting = _fitting(words, gigabytes) or _fitting(words - FORM_WORDS, gigabytes)
    if not fitting:
        raise BadConfig(_unknown(text))
    fewest = min(len(_split(gpu.name)[0]) for gpu in fitting)
    plain = [gpu for gpu in fitting if len(_split(gpu.name)[0]) == fewest]
    usual = [gpu for gpu in plain if gpu.usual] or (plain if len(plain) == 1 else [gpu for gpu in fitting if gpu.usual])
    if len(usual) != 1:
        raise BadConfig(f"--gpu is {text!r}, which could be {_named(fitting)}: give more of the name, or the memory")
    return usual[0], [gpu.name for gpu in fitting if gpu is not usual[0]]


def _fitting(words: set[str], gigabytes: float | None) -> list[Gpu]:
    """But not those with a further word that makes another card of it: who means the Ti says so."""
    return [
        gpu
        for gpu in known_gpus()
        if words
        and words <= (ours := _split(gpu.name)[0])
        and not (ours - words) & OTHER_CARD_WORDS
        and (gigabytes is None or _has_gigabytes(gpu, gigabytes))
    ]


def _has_gigabytes(gpu: Gpu, gigabytes: float) -> bool:
    return NOMINAL_SLACK * gigabytes <= gpu.memory_mib / 1024 + 0.5 and gpu.memory_mib / 1024 <= 1.05 * gigabytes


def _unknown(text: str) -> str:
    for maker, pattern in OTHER_MAKERS.items():
        if re.search(rf"\b({pattern})\b", " ".join(re.split(r"[\s-]+", text.lower()))):
            return (
                f"--gpu is {text!r}: fastqwen computes on NVIDIA's GPUs only; on a machine with one of {maker}'s it computes "
                "on the CPU (--gpu cpu here, --device cpu for serve)"
            )
    import difflib

    names = {gpu.name.lower(): gpu.name for gpu in known_gpus()}
    alike = [names[name] for name in difflib.get_close_matches(text.lower(), names)]
    return f"--gpu is {text!r}, which is not in the list of GPUs: give its memory instead, for example 24GB" + (
        f", or a name like {', '.join(alike)}" if alike else ""
    )


def _named(gpus: list[Gpu]) -> str:
    names = [gpu.name for gpu in gpus]
    return f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else names[0]


def _split(name: str) -> tuple[set[str], float | None]:
    """The words of a card's name without those that all have, and the gigabytes that it names."""
    text = re.sub(r"[-_()]", " ", name.lower())
    for word, meaning in ALIASES.items():
        text = text.replace(word, meaning)
    text = re.sub(r"(\d)\s+(gb|gib|g)\b", r"\1gb", text)
    text = re.sub(r"\b(rtx|gtx|titan)(?=[\dxvr])", r"\1 ", text)
    text = re.sub(r"(\d)(ti|super|d)\b", r"\1 \2", text)
    text = re.sub(r"\b(sxm|hbm)\d\b", r"\1", text)
    words = set(text.split()) - MAKERS - PLAIN_WORDS
    sizes = {word for word in words if re.fullmatch(r"\d+(gb|gib|g)", word)}
    return words - sizes, float(re.sub(r"\D", "", min(sizes))) if sizes else None


def _any_card(gigabytes: float, text: str) -> Target:
    """Planned for the card of that size that leaves the engine least, so that the answer holds for all of them on which an
    ordinary installation computes."""
    if not 1 <= gigabytes <= 4096:
        raise BadConfig(f"--gpu is {text!r}: give between 1GB and 4096GB")
    total = int(gigabytes * GIB)
    running = [gpu for gpu in known_gpus() if gpu.hindrance(None) is None]
    alike = [gpu for gpu in running if NOMINAL_SLACK * total <= gpu.memory_mib * MIB <= 1.01 * total]
    nearest = alike or [min(running, key=lambda gpu: abs(gpu.memory_mib * MIB - total))]
    timed = [gpu for gpu in nearest if generation_of(gpu.facts().compute_capability).read is not None] or nearest
    slow = min(timed, key=lambda gpu: gpu.bandwidth_gb_s).facts()
    fast = max(timed, key=lambda gpu: gpu.bandwidth_gb_s).facts()
    label = f"{gigabytes:g} GiB GPU"
    facts = msgspec.structs.replace(
        slow,
        name=label,
        total_bytes=total,
        free_bytes=total,
        compute_capability=max(gpu.facts().compute_capability or (0, 0) for gpu in nearest),
        multiprocessors=max(gpu.multiprocessors for gpu in nearest),
        matmul_tflops=max(gpu.matmul_tflops for gpu in nearest),
    )
    return Target(facts=facts, slow=slow, fast=fast, label=label)


def _this_machine() -> Target:
    """The GPU with the least free memory that nvidia-smi names, else this machine's memory."""
    rows = _nvidia_smi()
    if not rows:
        return _this_cpu()
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


def _this_cpu() -> Target:
    facts = msgspec.structs.replace(host_facts(), bandwidth_gb_s=measure_bandwidth())
    return one_device(facts, f"this machine's CPU with {facts.total_bytes / GIB:.1f} GiB")


def data_sheet(name: str, mib: int) -> Gpu | None:
    """The data sheet that fits a driver's name of a card, whose words are more than ours: 'NVIDIA A100-SXM4-80GB'."""
    words, _ = _split(name)
    fitting = [
        gpu
        for gpu in known_gpus()
        if (ours := _split(gpu.name)[0]) - {"sxm", "pcie"} <= words
        and ours & TELLING_WORDS == words & TELLING_WORDS
        and abs(gpu.memory_mib - mib) < 0.1 * mib
    ]
    return max(fitting, key=lambda gpu: (len(_split(gpu.name)[0] & words), gpu.usual), default=None)


def _nvidia_smi() -> list[tuple[str, int, str, int]]:
    """Name, memory in MiB, compute capability and MiB in use of each GPU; nothing where there is no driver."""
    rows = []
    for name, total, capability, used in _ask_driver(NVIDIA_SMI, 4):
        if total.isdigit():
            rows.append((name, int(total), capability, int(used) if used.isdigit() else 0))
        elif total.startswith("[") and _capability(capability) is not None:  # it shares the CPU's memory
            host = host_facts()
            rows.append((name, host.total_bytes // MIB, capability, (host.total_bytes - host.free_bytes) // MIB))
    return rows


def installed_driver() -> tuple[str, str] | None:
    """Name of the first GPU, and its driver's version; None where there is none."""
    found = next(iter(_ask_driver(NVIDIA_SMI_DRIVER, 2)), None)
    return (found[0], found[1]) if found is not None else None


def _ask_driver(question: tuple[str, ...], num_fields: int) -> list[list[str]]:
    """An answer for each GPU that this process may use; none where there is no driver."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return _run(question, num_fields)
    if visible.strip() in ("", "-1"):
        return []
    # Names that only CUDA knows, such as a part of a GPU, stand for all that the driver names.
    return _run((*question, f"--id={visible}"), num_fields) or _run(question, num_fields)


def _run(command: tuple[str, ...], num_fields: int) -> list[list[str]]:
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = run.stdout.splitlines() if run.returncode == 0 else []
    return [[*(part.strip() for part in line.split(",")), *([""] * num_fields)][:num_fields] for line in lines]


def one_device(facts: DeviceFacts, label: str) -> Target:
    stops = hindrance(facts.name, facts.compute_capability, torch_build()) if facts.kind == "cuda" else None
    return Target(facts=facts, slow=facts, fast=facts, label=label, hindrance=stops)


def _capability(text: Any) -> tuple[int, int] | None:
    parts = str(text).split(".")
    return (int(parts[0]), int(parts[1])) if len(parts) == 2 and all(part.isdigit() for part in parts) else None
