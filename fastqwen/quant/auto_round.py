"""AutoRound checkpoints that are packed as GPTQ's are.

What ``packing_format`` means is in auto_round/inference/backend.py of intel/auto-round: ``auto_round:auto_gptq`` stores
zeros minus one, ``auto_round`` and ``auto_round:gptqmodel`` as they are. ``auto_round:gptq`` was written with either; where all
zeros are in the middle, it does not matter.
"""

from __future__ import annotations

from typing import Any

from fastqwen.errors import BadCheckpoint, Unsupported
from fastqwen.model_config import Fields, short
from fastqwen.quant.gptq import Gptq, from_fields

ZERO_OFFSETS = {"auto_round:auto_gptq": 1, "auto_round": 0, "auto_round:gptqmodel": 0, "auto_round:gptq": None}
PLAIN_BITS = 16


def from_config(config: dict[str, Any], source: str) -> Gptq:
    """Raises Unsupported for another packing, BadCheckpoint for a value that cannot be."""
    fields = Fields(config, f"{source}: quantization_config")
    packing = str(fields.get("packing_format", "backend") or "auto_round:gptq").lower()
    if packing == "auto":
        packing = "auto_round:gptq"
    if packing not in ZERO_OFFSETS:
        raise Unsupported(
            f"{fields.source}: packing_format {short(packing)} is not supported; supported: {', '.join(ZERO_OFFSETS)}"
        )
    offset = ZERO_OFFSETS[packing]
    if offset is None and not fields.flag("sym", True):
        raise Unsupported(
            f"{fields.source}: packing_format {packing} does not say how its zeros are stored (sym is false)"
        )
    fields.require("data_type", ("int",))
    for key in ("act_bits",):
        fields.require(key, (PLAIN_BITS, 32))
    usual = {"bits": fields.get("bits"), "group_size": fields.get("group_size"), "sym": fields.flag("sym", True)}
    _check_modules(fields, usual)
    return from_fields(fields, offset, desc_act=False)


def _check_modules(fields: Fields, usual: dict[str, Any]) -> None:
    """``extra_config`` may leave modules as they are, which the tensors show."""
    modules = fields.get("extra_config") or {}
    if not isinstance(modules, dict):
        raise BadCheckpoint(f"{fields.source}: extra_config is {short(modules)}, expected an object")
    for name, changes in modules.items():
        if not isinstance(changes, dict):
            raise BadCheckpoint(
                f"{fields.source}: extra_config of {short(name)} is {short(changes)}, expected an object"
            )
        if changes.get("bits") in (PLAIN_BITS, 32):
            continue
        if any(changes.get(key, value) != value for key, value in usual.items()):
            raise Unsupported(
                f"{fields.source}: extra_config gives {short(name)} other bits or groups, which is not supported"
            )
