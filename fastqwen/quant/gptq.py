"""GPTQ checkpoints in the layout of AutoGPTQ and GPTQModel (arXiv 2210.17323 for the method).

Weights stay packed in 4 or 8 bits; those of 2 and 3 bits are held in 4. Each linear of the checkpoint has qweight int32
[in * bits / 32, out], qzeros int32 [groups, out * bits / 32], scales [groups, out], and perhaps g_idx int32 [in] and
bias [out]; of 3 bits, 32 numbers lie in three words. Format ``gptq`` stores each zero minus one, ``gptq_v2`` as it is. A
module that has a plain ``weight`` instead was left as it was, and is loaded so.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from fastqwen.errors import BadCheckpoint, Unsupported
from fastqwen.kernels import GroupedWeight, Ops
from fastqwen.layers.linear import GroupedLinear, Linear
from fastqwen.model_config import Fields, short
from fastqwen.quant import ExpertsSpec, LinearSpec, tell_unknown
from fastqwen.quant.dense import of_modules, one_by_one, stacked, stays_packed
from fastqwen.sharding import Part, Ranges

if TYPE_CHECKING:
    from torch import Tensor

    from fastqwen.layers.moe import Experts
    from fastqwen.weights.source import Weights

log = logging.getLogger(__name__)

ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}
ZERO_BYTES, SCALE_BYTES = 2, 2  # zeros are held as int16, scales as the file has them, which is float16
ORDER_BYTES = 8  # the group of each input as int64, where they are out of order


class Gptq:
    preferred_dtype = "float16"  # that of the scales

    def __init__(
        self,
        *,
        bits: int,
        group_size: int,
        desc_act: bool,
        zero_offset: int | None,
        symmetric: bool = False,
        notices: tuple[str, ...] = (),
    ) -> None:
        """``zero_offset`` is what the file's zeros lack; None: they say nothing, for all are in the middle. ``symmetric``:
        so says the configuration, too."""
        self.symmetric = symmetric
        self._told_of_zeros = False
        self.notices = notices
        self.file_bits = bits
        self.bits = max(4, bits)
        self.group_size = group_size  # -1: one group for all inputs
        self.desc_act = desc_act
        self.zero_offset = zero_offset
        self._told = False

    def held_bytes(self, in_size: int, out_size: int, *, element: int, is_expert: bool) -> int:
        if is_expert:
            return in_size * out_size * element  # unpacked while loading
        groups = self._num_groups(in_size)
        order = ORDER_BYTES * in_size if self.desc_act else 0
        return in_size * out_size * self.bits // 8 + groups * out_size * (SCALE_BYTES + ZERO_BYTES) + order

    def linear(self, weights: Weights, spec: LinearSpec, ops: Ops) -> Linear:
        def make(index: int, name: str, bias: Tensor | None) -> Linear | None:
            if weights.has(f"{name}.weight") and not weights.has(f"{name}.qweight"):
                return None
            outputs = None if spec.outputs is None else spec.outputs[index]
            sizes = spec.in_size, spec.out_sizes[index]
            return GroupedLinear(ops, self._weight(weights, name, *sizes, spec.inputs, outputs, bias))

        has_bias = spec.adds_bias and (spec.bias or any(weights.has(f"{name}.bias") for name in spec.names))
        return of_modules(weights, spec, ops, has_bias, make)

    def experts(self, weights: Weights, spec: ExpertsSpec, ops: Ops) -> Experts:
        is_packed = weights.has(f"{spec.down.format(expert=0)}.qweight")
        if is_packed and stays_packed(weights, spec, ops):
            router = self._plain(weights, spec.router, (spec.num_experts, spec.hidden_size), None)
            return one_by_one(weights, spec, ops, self.linear, router)
        if is_packed and not self._told:
            self._told = True
            log.warning("the experts' %d-bit weights are unpacked to %s while loading", self.file_bits, weights.dtype)
        return stacked(weights, spec, ops, lambda name, shape, part: self._plain(weights, name, shape, part))

    def _plain(self, weights: Weights, name: str, shape: tuple[int, int], part: Part | None) -> Tensor:
        """One matrix as plain numbers in the model's type, [out, in] or the part of it."""
        from fastqwen.kernels.reference import unpack_grouped

        if not weights.has(f"{name}.qweight"):
            return weights.tensor(f"{name}.weight", shape, part=part)
        outputs, inputs = (part.ranges if part is not None and part.dim == dim else None for dim in (0, 1))
        weight = self._weight(weights, name, shape[1], shape[0], inputs, outputs, None)
        return unpack_grouped(weight, 0, weight.out_size).to(weights.dtype)

    def _num_groups(self, in_size: int) -> int:
        return 1 if self.group_size == -1 else -(-in_size // self.group_size)

    def _weight(
        self,
        weights: Weights,
        name: str,
        in_size: int,
        out_size: int,
        inputs: Ranges | None,
        outputs: Ranges | None,
        bias: Tensor | None,
    ) -> GroupedWeight:
        from fastqwen.weights.source import cut  # torch, which the planner does without
        from fastqwen.weights.words import numbers_of_unit, words_of_unit

        unit = numbers_of_unit(self.file_bits)
        group_size = in_size if self.group_size == -1 else self.group_size
        if in_size % unit or out_size % unit:
            raise weights.fault(
                f"{name}.qweight", f"cannot hold {in_size} x {out_size} numbers of {self.file_bits} bits"
            )
        num_groups = self._num_groups(in_size)
        words = words_of_unit(self.file_bits)
        height = weights.height(f"{name}.qweight")
        if height is not None and height != in_size // unit * words and height * 32 % in_size == 0:
            raise weights.fault(
                f"{name}.qweight", f"holds {height * 32 // in_size} bits a number, but bits is {self.file_bits}"
            )
        check_groups(weights, name, self.group_size, num_groups)
        groups = self._groups(weights, name, in_size, group_size, num_groups)
        zeros = self._zeros(weights.words(f"{name}.qzeros", (num_groups, out_size // unit * words)))
        codes = scales = None  # which part of them; None: all
        if outputs is not None:
            codes = scales = Part(1, outputs)
        elif inputs is not None:
            units = divided(weights, name, inputs, unit, "numbers of a word")
            codes = Part(0, tuple((start * words, stop * words) for start, stop in units))
            if groups is None and self.group_size != -1 and not _is_whole(inputs, group_size):
                groups = _in_order(zeros, in_size, group_size)  # a shard's edge is within a group: say which
            if groups is not None:
                groups, scales = _groups_of(groups, inputs, num_groups)
            elif self.group_size != -1:
                scales = Part(0, divided(weights, name, inputs, group_size, "inputs of a group"))
        return GroupedWeight(
            codes=self._codes(weights.words(f"{name}.qweight", (in_size // unit * words, out_size), part=codes)),
            scales=weights.tensor(f"{name}.scales", (num_groups, out_size), keep_type=True, part=scales),
            zeros=cut(zeros, scales),
            group_of=groups,
            bits=self.bits,
            group_size=group_size if inputs is None or self.group_size != -1 else Part(0, inputs).size,
            bias=bias,
        )

    def _zeros(self, packed: Tensor) -> Tensor:
        import torch

        from fastqwen.weights.words import unpack

        zeros = unpack(packed.T, self.file_bits).T.to(torch.int16).contiguous()
        middle = 2 ** (self.file_bits - 1)
        if self.zero_offset is None:
            return zeros.fill_(middle)
        zeros += self.zero_offset
        if self.symmetric and not self._told_of_zeros and bool((zeros != middle).any()):
            self._told_of_zeros = True
            log.warning(
                "sym is true, but the zeros, read as checkpoint_format says, are not all %d: if answers are nonsense, the "
                "checkpoint_format (gptq or gptq_v2) is wrong",
                middle,
            )
        return zeros

    def _codes(self, words: Tensor) -> Tensor:
        from fastqwen.weights.words import pack, unpack

        return words if self.bits == self.file_bits else pack(unpack(words, self.file_bits), self.bits)

    def _groups(self, weights: Weights, name: str, in_size: int, group_size: int, num_groups: int) -> Tensor | None:
        if not self.desc_act and not weights.has(f"{name}.g_idx"):
            return None
        groups = weights.words(f"{name}.g_idx", (in_size,)).long()
        if int(groups.min()) < 0 or int(groups.max()) >= num_groups:
            raise weights.fault(f"{name}.g_idx", f"names groups outside 0 to {num_groups - 1}")
        if num_groups > 1 and not groups.any():  # some tools leave them empty where inputs are in order
            return None
        return None if groups.equal(_in_order(groups, in_size, group_size)) else groups


def check_groups(weights: Weights, name: str, group_size: int, num_groups: int) -> None:
    """That a matrix's scales are as many as ``group_size`` makes of its inputs."""
    found = weights.height(f"{name}.scales")
    if found not in (None, num_groups):
        raise weights.fault(
            f"{name}.scales", f"has {found} groups of inputs, but group_size is {group_size}, which makes {num_groups}"
        )


def _in_order(like: Tensor, in_size: int, group_size: int) -> Tensor:
    """The group of each input where they are not shuffled, int64 [in]"""
    import torch

    return torch.arange(in_size, device=like.device) // group_size


def _groups_of(groups: Tensor, inputs: Ranges, num_groups: int) -> tuple[Tensor, Part | None]:
    """The groups of a shard's inputs, and which groups it must hold: all, and where inputs are filled up with zeros one more
    group for them, whose scale is 0."""
    import torch

    pieces = [
        groups[start:stop] if start >= 0 else groups.new_full((stop - start,), num_groups) for start, stop in inputs
    ]
    filled = any(start < 0 for start, _ in inputs)
    return torch.cat(pieces), Part(0, ((0, num_groups), (-1, 0))) if filled else None


def _is_whole(ranges: Ranges, unit: int) -> bool:
    return all(edge % unit == 0 for pair in ranges for edge in pair)


def divided(weights: Weights, name: str, ranges: Ranges, unit: int, what: str) -> Ranges:
    if not _is_whole(ranges, unit):
        raise weights.fault(
            f"{name}.qweight", f"cannot be split at {ranges}: the edges must be multiples of the {unit} {what}"
        )
    return tuple((start // unit, stop // unit) for start, stop in ranges)


# Keys of how the weights were found, and of what they are called; null and false are no others.
SILENT = frozenset((
    "quant_method", "sym", "damp_percent", "damp_auto_increment", "true_sequential", "static_groups", "model_name_or_path",
    "model_file_base_name", "dataset", "tokenizer", "meta", "backend", "model_seqlen", "block_name_to_quantize",
    "module_name_preceding_first_block", "batch_size", "pad_token_id", "max_input_length", "cache_block_outputs",
    "modules_in_block_to_quantize", "act_group_aware", "use_cuda_fp16", "use_exllama", "exllama_config", "disable_exllama",
    "parallel_packing", "offload_to_disk", "offload_to_disk_path", "mse", "hyb_act", "quantizer", "version", "iters", "lr",
    "minmax_lr", "nsamples", "seqlen", "autoround_version", "enable_quanted_input", "enable_minmax_tuning", "data_type",
    "amp", "scale_dtype", "low_gpu_mem_usage", "low_cpu_mem_usage", "enable_norm_bias_tuning", "gradient_accumulate_steps",
    "to_quant_block_names", "quant_block_list", "seed", "awq_gemm_checkpoint", "is_marlin_format", "lm_head", "dynamic",
    "pack_dtype", "vram_opt_memory_cleanup_interval", "vram_opt_ignore_modules", "gptaq", "gptaq_alpha", "v2", "v2_alpha",
    "v2_memory_device", "failsafe", "fail_safe", "process", "parameters_to_quantize", "super_group_size", "super_bits",
    "act_bits", "act_data_type", "act_group_size", "act_sym", "act_dynamic", "device", "device_map", "supported_types",
))  # fmt: skip
NUM_BITS = (2, 3, 4, 8)


def from_config(config: dict[str, Any], source: str) -> Gptq:
    """Raises Unsupported for a variant whose numbers would come out wrong, BadCheckpoint for a value that cannot be."""
    fields = Fields(config, f"{source}: quantization_config")
    layout = str(fields.get("checkpoint_format", "format") or "gptq").lower()
    if layout not in ZERO_OFFSETS or fields.flag("is_marlin_format"):
        word = short("marlin" if fields.flag("is_marlin_format") else layout)
        raise Unsupported(
            f"{fields.source}: checkpoint_format {word} is not supported; supported: {', '.join(ZERO_OFFSETS)}"
        )
    return from_fields(fields, ZERO_OFFSETS[layout], desc_act=fields.flag("desc_act"))


def from_fields(fields: Fields, zero_offset: int | None, *, desc_act: bool) -> Gptq:
    """What all that is packed so has in common."""
    bits = fields.int("bits")
    if bits not in NUM_BITS:
        raise Unsupported(f"{fields.source}: {bits} bits are not supported; supported: {', '.join(map(str, NUM_BITS))}")
    fields.require("pack_dtype", ("int32",))
    fields.require("lm_head", (False,))
    for key in ("rotation", "adapter"):  # they change what the packed numbers mean, or add to it
        fields.require(key, ())
    group_size = fields.int("group_size", default=128, low=-1)
    if group_size == 0:
        raise BadCheckpoint(f"{fields.source}: group_size is 0, expected -1 or at least 1")
    _check_rules(fields, bits, group_size, desc_act)
    tell_unknown(fields, SILENT)
    return Gptq(
        bits=bits,
        group_size=group_size,
        desc_act=desc_act,
        zero_offset=zero_offset,
        symmetric=fields.flag("sym"),
        notices=tuple(fields.notices),
    )


def _check_rules(fields: Fields, bits: int, group_size: int, desc_act: bool) -> None:
    """``dynamic`` may leave modules as they are, which the tensors show; others of its rules must say the usual."""
    rules = fields.get("dynamic") or {}
    if not isinstance(rules, dict):
        raise BadCheckpoint(f"{fields.source}: dynamic is {short(rules)}, expected an object")
    usual = {"bits": bits, "group_size": group_size, "desc_act": desc_act}
    for rule, changes in rules.items():
        if rule.startswith("-"):
            continue
        if not isinstance(changes, dict) or any(changes.get(key, value) != value for key, value in usual.items()):
            raise Unsupported(
                f"{fields.source}: dynamic gives modules other bits or groups ({short(rule)}), which is not supported"
            )
        fields.tell(f"dynamic's rule {short(rule)} changes nothing that is read")
