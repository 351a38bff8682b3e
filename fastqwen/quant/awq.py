"""AWQ checkpoints (arXiv 2306.00978) in AutoAWQ's layout ``gemm``.

Each linear has qweight int32 [in, out / 8], qzeros int32 [groups, out / 8] and scales [groups, out]. A word holds the codes
of eight outputs in an order of its own. A module that has a plain ``weight`` instead was left as it was, and is loaded so.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from fastqwen.errors import BadCheckpoint
from fastqwen.kernels import GroupedWeight, Ops
from fastqwen.layers.linear import GroupedLinear, Linear
from fastqwen.model_config import Fields
from fastqwen.quant import ExpertsSpec, LinearSpec, tell_unknown
from fastqwen.quant.dense import of_modules, one_by_one, stacked, stays_packed
from fastqwen.quant.gptq import SCALE_BYTES, ZERO_BYTES, check_groups, divided
from fastqwen.sharding import Part, Ranges

if TYPE_CHECKING:
    from torch import Tensor

    from fastqwen.layers.moe import Experts
    from fastqwen.weights.source import Weights

log = logging.getLogger(__name__)

BITS, PER_WORD = 4, 8
NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)  # where a word has its outputs, from the lowest bits on


class Awq:
    preferred_dtype = "float16"  # that of the scales

    def __init__(self, group_size: int, notices: tuple[str, ...] = ()) -> None:
        self.group_size = group_size  # -1: one group for all inputs
        self.notices = notices
        self._told = False

    def held_bytes(self, in_size: int, out_size: int, *, element: int, is_expert: bool) -> int:
        if is_expert:
            return in_size * out_size * element  # unpacked while loading
        groups = 1 if self.group_size == -1 else -(-in_size // self.group_size)
        return in_size * out_size * BITS // 8 + groups * out_size * (SCALE_BYTES + ZERO_BYTES)

    def linear(self, weights: Weights, spec: LinearSpec, ops: Ops) -> Linear:
        def make(index: int, name: str, bias: Tensor | None) -> Linear | None:
            if weights.has(f"{name}.weight") and not weights.has(f"{name}.qweight"):
                return None
            outputs = None if spec.outputs is None else spec.outputs[index]
            return GroupedLinear(
                ops, self._weight(weights, name, (spec.in_size, spec.out_sizes[index]), (spec.inputs, outputs), bias)
            )

        has_bias = spec.adds_bias and (spec.bias or any(weights.has(f"{name}.bias") for name in spec.names))
        return of_modules(weights, spec, ops, has_bias, make)

    def experts(self, weights: Weights, spec: ExpertsSpec, ops: Ops) -> Experts:
        is_packed = weights.has(f"{spec.down.format(expert=0)}.qweight")
        if is_packed and stays_packed(weights, spec, ops):
            router = self._plain(weights, spec.router, (spec.num_experts, spec.hidden_size), None)
            return one_by_one(weights, spec, ops, self.linear, router)
        if is_packed and not self._told:
            self._told = True
            log.warning("the experts' %d-bit weights are unpacked to %s while loading", BITS, weights.dtype)
        return stacked(weights, spec, ops, lambda name, shape, part: self._plain(weights, name, shape, part))

    def _plain(self, weights: Weights, name: str, shape: tuple[int, int], part: Part | None) -> Tensor:
        """One matrix as plain numbers in the model's type, [out, in] or the part of it."""
        from fastqwen.kernels.reference import unpack_grouped

        if not weights.has(f"{name}.qweight"):
            return weights.tensor(f"{name}.weight", shape, part=part)
        outputs, inputs = (part.ranges if part is not None and part.dim == dim else None for dim in (0, 1))
        weight = self._weight(weights, name, (shape[1], shape[0]), (inputs, outputs), None)
        return unpack_grouped(weight, 0, weight.out_size).to(weights.dtype)

    def _weight(
        self,
        weights: Weights,
        name: str,
        sizes: tuple[int, int],
        ranges: tuple[Ranges | None, Ranges | None],
        bias: Tensor | None,
    ) -> GroupedWeight:
        """``sizes`` and ``ranges`` (what this shard holds; None: all) are of inputs and outputs."""
        from fastqwen.weights.words import pack

        (in_size, out_size), (inputs, outputs) = sizes, ranges
        group_size = in_size if self.group_size == -1 else self.group_size
        if in_size % group_size or in_size % PER_WORD or out_size % PER_WORD:
            raise weights.fault(
                f"{name}.qweight", f"cannot hold {in_size} x {out_size} numbers in groups of {group_size}"
            )
        check_groups(weights, name, self.group_size, in_size // group_size)
        words = columns = groups = None  # which part of them; None: all
        if outputs is not None:
            words, columns = Part(1, divided(weights, name, outputs, PER_WORD, "numbers of a word")), Part(1, outputs)
        elif inputs is not None:
            words = Part(0, inputs)
            if self.group_size != -1:
                groups = Part(0, divided(weights, name, inputs, group_size, "inputs of a group"))
        shape = in_size // group_size, out_size
        zeros = weights.words(
            f"{name}.qzeros", (shape[0], out_size // PER_WORD), part=groups or (words if columns else None)
        )
        codes = weights.words(f"{name}.qweight", (in_size, out_size // PER_WORD), part=words)
        return GroupedWeight(
            codes=pack(outputs_of(codes), BITS),
            scales=weights.tensor(f"{name}.scales", shape, keep_type=True, part=groups or columns),
            zeros=outputs_of(zeros).short(),
            group_of=None,
            bits=BITS,
            group_size=group_size if inputs is None or self.group_size != -1 else Part(0, inputs).size,
            bias=bias,
        )


def outputs_of(words: Tensor) -> Tensor:
    """int32 [n, out / 8] -> uint8 [n, out]: a word's codes in the order of the outputs."""
    import torch  # which the planner does without

    pairs = words.contiguous().view(torch.uint8)
    nibbles = torch.stack([pairs & 15, pairs >> 4], dim=-1).view(words.shape[0], -1, PER_WORD)
    return nibbles[:, :, NIBBLES].flatten(1)


SILENT = frozenset((
    "quant_method", "modules_to_not_convert", "backend", "do_fuse", "exllama_config", "fuse_max_seq_len", "modules_to_fuse",
))  # fmt: skip


def from_config(config: dict[str, Any], source: str) -> Awq:
    """Raises Unsupported for a variant whose numbers would come out wrong, BadCheckpoint for a value that cannot be."""
    fields = Fields(config, f"{source}: quantization_config")
    fields.require("version", ("gemm", "GEMM"))
    fields.require("zero_point", (True,))
    if fields.int("bits", "w_bit", default=BITS) != BITS:
        fields.require("bits" if "bits" in config else "w_bit", (BITS,))
    group_size = fields.int("group_size", "q_group_size", default=128, low=-1)
    if group_size == 0:
        raise BadCheckpoint(f"{fields.source}: group_size is 0, expected -1 or at least 1")
    tell_unknown(fields, SILENT)
    return Awq(group_size, tuple(fields.notices))
