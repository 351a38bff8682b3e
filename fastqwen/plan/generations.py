"""Generations of NVIDIA's GPUs: how fastqwen computes on each, which torch has code for it, how that was proven, and how
much of a data sheet its steps reach. docs/planner.md shows this table; a test holds the two together."""

from __future__ import annotations

import functools
from typing import Literal

import msgspec

from fastqwen.plan.facts import DeviceFacts

OLD_TORCH_BUILD = "cu126"  # the last build of torch with code for Pascal and Volta; published up to torch 2.14
OLD_TORCH_INSTALL = "pip install 'torch>=2.11,<2.15' --index-url https://download.pytorch.org/whl/cu126"
ORDINARY_CAPABILITY = (7, 5)  # where torch of the ordinary index starts (RELEASE.md of torch 2.11: CUDA 13)
MEASURED_CAPABILITY = (9, 0)
# For which what a start and its steps launch was compiled (tests/kernels/test_compile.py).
COMPILED_FOR = ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))

# Where a kernel computes on packed weights without unpacking them first: quantization method, and the least compute
# capability. Elsewhere a speed would be a guess, so the planner names none.
FAST_PACKED: dict[str, tuple[int, int]] = dict.fromkeys(
    ("gptq", "auto_round", "awq", "fp8", "compressed_tensors", "modelopt", "online"), (7, 5)
)


class Generation(msgspec.Struct, frozen=True, kw_only=True):
    """``read`` is the lowest and the highest share of the data sheet's bandwidth that decoding steps reach, apart from
    the kernels' starts; None: nothing is known, so no speed is named. ``compute`` is the share of the data sheet's rate that
    steps of prompts reach. ``basis`` says where both are from."""

    name: str
    capability: tuple[int, int]  # the first of it
    cards: str
    torch_build: Literal["ordinary", "cu126", "none"]
    way: str
    read: tuple[float, float] | None = None
    compute: float = 0.4
    basis: str = "no such card was measured"

    @property
    def is_torch_only(self) -> bool:
        return self.way == TORCH_ONLY

    @property
    def dotted(self) -> str:
        return f"{self.capability[0]}.{self.capability[1]}"

    @property
    def proof(self) -> str:
        if self.capability == MEASURED_CAPABILITY:
            return self.basis
        if self.is_torch_only:
            return "the same operations on CPUs"
        if self.capability in COMPILED_FOR:
            return "what it launches was compiled for it and fits"
        return "no more than the same code on other cards"


TORCH_ONLY = "torch's operations only, in float16: exact, and slow"
TURING_WAY = "torch's products, own kernels with small blocks, in float16"
OWN_KERNELS = "own kernels, recorded steps"

GENERATIONS = (
    Generation(name="Kepler, Maxwell", capability=(3, 0), cards="K80, M40, GTX 9xx", torch_build="none", way="not at all"),
    Generation(name="Pascal", capability=(6, 0), cards="P100, P40, GTX 10xx, TITAN Xp", torch_build="cu126", way=TORCH_ONLY),
    Generation(name="Volta", capability=(7, 0), cards="V100, TITAN V", torch_build="cu126", way=TURING_WAY),
    Generation(name="Turing", capability=(7, 5), cards="T4, RTX 20xx, GTX 16xx, TITAN RTX", torch_build="ordinary",
               way=TURING_WAY),
    Generation(name="Ampere", capability=(8, 0), cards="A100, A800, A30", torch_build="ordinary", way=OWN_KERNELS,
               read=(0.5, 0.85), compute=0.6, basis="from what others measured on an A100"),
    Generation(name="Ampere", capability=(8, 6), cards="RTX 30xx, A10, A40, RTX A2000 to A6000", torch_build="ordinary",
               way=OWN_KERNELS, read=(0.6, 0.8), compute=0.6, basis="from what others measured on an RTX 3090 and an A6000"),
    Generation(name="Ada", capability=(8, 9), cards="RTX 40xx, L4, L20, L40, RTX 6000 Ada", torch_build="ordinary",
               way=OWN_KERNELS, read=(0.6, 0.85), compute=0.6,
               basis="from what others measured on an RTX 4080 and a 4090"),
    Generation(name="Hopper", capability=(9, 0), cards="H100, H200, H20, H800, GH200", torch_build="ordinary",
               way=OWN_KERNELS + ", weights fetched ahead", read=(0.62, 0.88), compute=0.65,
               basis="measured on an H100 and an H200"),
    Generation(name="Blackwell", capability=(10, 0), cards="B200, GB200, B300", torch_build="ordinary", way=OWN_KERNELS,
               read=(0.5, 0.85), compute=0.6, basis="assumed from Hopper's"),
    Generation(name="Blackwell", capability=(12, 0), cards="RTX 50xx, RTX PRO, GB10", torch_build="ordinary",
               way=OWN_KERNELS, read=(0.6, 0.85), compute=0.6, basis="from what others measured on an RTX 5090"),
)  # fmt: skip
UNKNOWN = msgspec.structs.replace(
    GENERATIONS[-1], name="unknown", read=None, compute=0.6, basis="its data sheet is not known"
)


def generation_of(capability: tuple[int, int] | None) -> Generation:
    """Of a GPU; of a capability that is not in the table the next lower one, for its kernels are compiled where they run."""
    if capability is None:
        return UNKNOWN
    return next((one for one in reversed(GENERATIONS) if one.capability <= capability), GENERATIONS[0])


def card_notices(name: str, capability: tuple[int, int] | None) -> list[str]:
    """How fastqwen computes on a card on which it was not measured."""
    generation = generation_of(capability)
    if capability is None or generation.capability == MEASURED_CAPABILITY:
        return []
    proof = generation.proof
    if generation.capability != capability:
        proof += f", as of {generation.dotted}, the next below its {capability[0]}.{capability[1]}"
    return [f"no card like the {name} was at hand: it runs by {generation.way} (proof: {proof})"]


def has_fast_packed(method: str, facts: DeviceFacts) -> bool:
    """Whether weights of this quantization method (quant.method_word) are as fast as they are small there."""
    if method == "dense":
        return True
    least = FAST_PACKED.get(method)
    return least is not None and facts.kind == "cuda" and (facts.compute_capability or (0, 0)) >= least


@functools.cache
def torch_build() -> str | None:
    """Of the torch that is installed here, without importing it: cu126, cpu and so on; None without one, or if its
    version names none."""
    from importlib.metadata import PackageNotFoundError, version  # --help need not wait for it

    try:
        return version("torch").partition("+")[2] or None
    except PackageNotFoundError:
        return None


def hindrance(name: str, capability: tuple[int, int] | None, build: str | None) -> str | None:
    """Why fastqwen does not compute on this GPU with this build of torch, and what to do; None: it does."""
    generation = generation_of(capability)
    if capability is None or generation.torch_build == "ordinary":
        return None
    has = f"{name} has compute capability {capability[0]}.{capability[1]}"
    if generation.torch_build == "none":
        return f"{has}, fastqwen needs 6.0 at least: use --device cpu"
    if build == OLD_TORCH_BUILD:
        return None
    least = ".".join(str(part) for part in ORDINARY_CAPABILITY)
    return (
        f"{has}, torch of the ordinary index starts at {least}; with torch's build for CUDA 12.6 "
        f"({OLD_TORCH_INSTALL}) fastqwen runs there by {generation.way}"
    )
