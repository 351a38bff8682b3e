"""From wishes to an engine that is ready to step: checkpoint, device, plan, decoder, executor, scheduler."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import llguidance
import msgspec
import torch

from fastqwen import quant
from fastqwen.build import build_decoder
from fastqwen.config import EngineConfig
from fastqwen.engine.blocks import BlockPool
from fastqwen.engine.core import EngineCore
from fastqwen.engine.policy import StepPolicy
from fastqwen.engine.scheduler import Scheduler
from fastqwen.engine.snapshots import SnapshotPool
from fastqwen.kernels import Ops
from fastqwen.kernels.limits import TILE_TOKENS
from fastqwen.layers.decoder import Decoder
from fastqwen.layers.rotary_key import rope_key
from fastqwen.model_config import ModelConfig
from fastqwen.plan import EnginePlan, Line, Measured, compare, make_plan
from fastqwen.runner.device import TORCH_DTYPES, choose_device, choose_ops, device_facts, has_own_kernels
from fastqwen.runner.model_runner import ModelRunner
from fastqwen.runner.structured import GrammarCompiler, StructuredOutput
from fastqwen.weights.accounting import account
from fastqwen.weights.checkpoint import Checkpoint, open_checkpoint
from fastqwen.weights.source import DummyWeights, Weights
from fastqwen.weights.watch import MappedFiles

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Engine:
    core: EngineCore
    compiler: GrammarCompiler | None  # None without a tokenizer
    plan: EnginePlan
    model: ModelConfig
    comparison: list[Line] = field(default_factory=list)  # what was planned on paper against what was measured


def start_engine(
    config: EngineConfig,
    path: Path,
    progress: Progress = lambda done, total: None,
    on_capture: Progress = lambda done, total: None,
    grammar_tokenizer: Callable[[ModelConfig], llguidance.LLTokenizer] | None = None,
) -> Engine:
    """``progress`` is told after each layer how many of how many are loaded, ``on_capture`` the same of CUDA graphs.

    ``grammar_tokenizer`` is called upon the first request for structured output. Raises FastqwenError.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    dummy = config.load_format == "dummy"
    checkpoint = open_checkpoint(path, with_tensors=not dummy, overrides=config.overrides)
    quant.find(checkpoint.model.quantization, checkpoint.source)  # refused by its file's name, before it is planned for
    device = choose_device(config)
    plan = make_plan(checkpoint.model, config, device_facts(device))
    for notice in plan.notices:
        log.warning("%s", notice)
    paper = plan
    mapped = MappedFiles(checkpoint.tensor_files)
    decoder, weights_bytes = _load(config, checkpoint, plan, device, choose_ops(device), progress)
    mapped.check()
    compiler = None if grammar_tokenizer is None else GrammarCompiler(partial(grammar_tokenizer, checkpoint.model))
    structured = None if compiler is None else StructuredOutput(compiler)
    if has_own_kernels(device):
        plan, executor, step_bytes = _on_gpu(config, checkpoint.model, decoder, plan, device, structured, on_capture)
    else:
        executor, step_bytes = ModelRunner(checkpoint.model, decoder, plan, device, structured, mapped.check), 0
    scheduler = Scheduler(
        BlockPool(plan.num_blocks, plan.block_size),
        StepPolicy(
            max_num_batched_tokens=plan.max_num_batched_tokens,
            max_num_mixed_tokens=plan.max_num_mixed_tokens,
            tile_tokens=TILE_TOKENS if has_own_kernels(device) else 1,
            prompts_first=bool(config.prompts_first),
        ),
        max_num_seqs=plan.max_num_seqs,
        enable_prefix_caching=config.enable_prefix_caching,
        rope_key_of=partial(rope_key, checkpoint.model.rope, per_request=config.rope_per_request),
        snapshots=SnapshotPool(plan.max_state_snapshots, plan.block_size) if executor.states.has_fixed else None,
    )
    gc.collect()
    gc.freeze()  # what was loaded lives as long as the process: collections need not look at it again
    measured = Measured(
        weights_bytes=weights_bytes, peak_bytes=_peak_bytes(device, step_bytes), num_blocks=plan.num_blocks
    )
    model = msgspec.structs.replace(checkpoint.model, has_head=decoder.has_head)
    return Engine(EngineCore(scheduler, executor), compiler, plan, model, compare(paper, measured))


def _peak_bytes(device: torch.device, step_bytes: int) -> int | None:
    """What a GPU holds in the largest step: what it holds now, weights, cache, graphs and the process's own share, and
    what that step takes."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return total - free + step_bytes


def _on_gpu(
    config: EngineConfig,
    model: ModelConfig,
    decoder: Decoder,
    plan: EnginePlan,
    device: torch.device,
    structured: StructuredOutput | None,
    on_capture: Progress,
) -> tuple[EnginePlan, ModelRunner, int]:
    """The cache gets what the largest step leaves free; then the decode steps are recorded."""
    from fastqwen.runner.cuda_runner import CudaRunner
    from fastqwen.runner.measure import measure_room

    room = measure_room(model, config, plan, decoder, device)
    plan = make_plan(model, config, device_facts(device), available_kv_bytes=max(1, room.kv_bytes))
    runner = CudaRunner(model, decoder, plan, device, structured)
    if not config.enforce_eager:
        runner.capture(on_capture)
    return plan, runner, room.step_bytes


def _load(
    config: EngineConfig, checkpoint: Checkpoint, plan: EnginePlan, device: torch.device, ops: Ops, progress: Progress
) -> tuple[Decoder, int]:
    """The decoder, and the bytes of its weights."""
    dtype = TORCH_DTYPES[plan.dtype]
    if checkpoint.tensors is None:
        weights: Weights = DummyWeights(dtype, device, config.seed or 0)
    else:
        weights = Weights(checkpoint.tensors, dtype, device)
    decoder = build_decoder(checkpoint.model, weights, ops, source=checkpoint.source, progress=progress)
    account(weights, checkpoint.model, checkpoint.source)
    return decoder, weights.num_bytes
