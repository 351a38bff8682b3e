"""From wishes to an engine that is ready to step: checkpoint, device, plan, decoder, executor, scheduler."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import llguidance
import msgspec
import torch

from fastqwen import quant
from fastqwen.build import build_decoder
from fastqwen.config import EngineConfig
from fastqwen.engine.blocks import BlockPool
from fastqwen.engine.core import EngineCore
from fastqwen.engine.executor import Executor
from fastqwen.engine.policy import StepPolicy
from fastqwen.engine.scheduler import Scheduler
from fastqwen.engine.snapshots import SnapshotPool
from fastqwen.kernels import Ops
from fastqwen.kernels.limits import TILE_TOKENS
from fastqwen.layers.decoder import Decoder
from fastqwen.layers.rotary_key import rope_key
from fastqwen.model_config import ModelConfig
from fastqwen.plan import DeviceFacts, EnginePlan, Line, Measured, compare, make_plan
from fastqwen.plan.weights import as_held
from fastqwen.runner.device import TORCH_DTYPES, choose_device, choose_ops, device_facts, has_own_kernels
from fastqwen.runner.follower import Follower, GrammarMarks
from fastqwen.runner.held import HeldWeights
from fastqwen.runner.model_runner import ModelRunner
from fastqwen.runner.structured import GrammarCompiler, StructuredOutput
from fastqwen.sharding import Alone, World
from fastqwen.weights.accounting import account
from fastqwen.weights.checkpoint import Checkpoint, open_checkpoint
from fastqwen.weights.source import DummyWeights, Weights
from fastqwen.weights.watch import MappedFiles

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
GrammarTokenizer = Callable[[ModelConfig], llguidance.LLTokenizer]


class Compiler(Protocol):
    """Of grammars, wherever they are followed. Both may be called from any thread."""

    def tokenizer(self) -> llguidance.LLTokenizer: ...

    def compile(self, grammar: str) -> object:
        """Afterwards a request with this grammar begins without waiting."""


@dataclass(frozen=True)
class Computer:
    """What computes steps, and what was found out while it was started."""

    executor: Executor
    compiler: Compiler | None  # None without a tokenizer
    plan: EnginePlan
    model: ModelConfig
    comparison: list[Line]  # what was planned on paper against what was measured
    tile_tokens: int  # steps that are multiples of this are no dearer than smaller ones
    weights: HeldWeights | None = None  # None where others hold them


@dataclass(frozen=True)
class Engine:
    core: EngineCore
    compiler: Compiler | None
    plan: EnginePlan
    model: ModelConfig
    comparison: list[Line] = field(default_factory=list)
    check: Callable[[], None] = lambda: None  # raises where what computes is gone, also while there is nothing to do
    weights: HeldWeights | None = None


def start_engine(
    config: EngineConfig,
    path: Path,
    progress: Progress = lambda done, total: None,
    on_capture: Progress = lambda done, total: None,
    grammar_tokenizer: GrammarTokenizer | None = None,
    weights: HeldWeights | None = None,
) -> Engine:
    """On one device. ``progress`` is told after each layer how many of how many are loaded, ``on_capture`` the same of CUDA
    graphs.

    ``grammar_tokenizer`` is called upon the first request for structured output. ``weights`` are an earlier engine's, of the
    same config, that were put away. Raises FastqwenError.
    """
    device = choose_device(config)
    found = start_computer(config, path, device, Alone(), progress, on_capture, grammar_tokenizer, weights)
    return engine_of(config, found)


def engine_of(config: EngineConfig, computer: Computer, check: Callable[[], None] = lambda: None) -> Engine:
    plan, model = computer.plan, computer.model
    scheduler = Scheduler(
        BlockPool(plan.num_blocks, plan.block_size),
        StepPolicy(
            max_num_batched_tokens=plan.max_num_batched_tokens,
            max_num_mixed_tokens=plan.max_num_mixed_tokens,
            tile_tokens=computer.tile_tokens,
            prompts_first=bool(config.prompts_first),
        ),
        max_num_seqs=plan.max_num_seqs,
        enable_prefix_caching=config.enable_prefix_caching,
        rope_key_of=partial(rope_key, model.rope, per_request=config.rope_per_request),
        snapshots=SnapshotPool(plan.max_state_snapshots, plan.block_size) if model.has_states else None,
    )
    core = EngineCore(scheduler, computer.executor)
    return Engine(core, computer.compiler, plan, model, computer.comparison, check, computer.weights)


def start_computer(
    config: EngineConfig,
    path: Path,
    device: torch.device,
    world: World,
    progress: Progress = lambda done, total: None,
    on_capture: Progress = lambda done, total: None,
    grammar_tokenizer: GrammarTokenizer | None = None,
    weights: HeldWeights | None = None,
) -> Computer:
    """One shard on its device. All shards of a world are started at once, and get the same plan."""
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    dummy = config.load_format == "dummy"
    checkpoint = open_checkpoint(path, with_tensors=not dummy, overrides=config.overrides)
    stored = quant.wished(checkpoint.model.quantization, config.quantization, checkpoint.source)
    checkpoint = replace(checkpoint, model=msgspec.structs.replace(checkpoint.model, quantization=stored))
    quant.find(stored, checkpoint.source)  # refused by its file's name, before it is planned for
    facts = _shared_facts(device, world)
    if device.type == "cpu":
        facts = msgspec.structs.replace(facts, unpacks=not choose_ops(device).takes_codes(torch.bfloat16))
    plan = make_plan(checkpoint.model, config, facts)
    if world.index == 0:
        for notice in plan.notices:
            log.warning("%s", notice)
    world.prepare(checkpoint.model.hidden_size, TORCH_DTYPES[plan.dtype])
    paper, ops = plan, choose_ops(device)
    if weights is None:
        weights = _load(config, checkpoint, plan, device, ops, world, progress)
    else:
        weights.bring_back()
    weights.mapped.check()
    decoder = weights.decoder
    compiler = None if grammar_tokenizer is None else GrammarCompiler(partial(grammar_tokenizer, checkpoint.model))
    structured = None if compiler is None else StructuredOutput(compiler)
    executor: ModelRunner
    if has_own_kernels(device):
        plan, executor, step_bytes = _on_gpu(config, checkpoint.model, decoder, plan, device, structured, on_capture)
    else:
        runner = ModelRunner if world.index == 0 else Follower
        executor, step_bytes = runner(checkpoint.model, decoder, plan, device, structured, weights.mapped.check), 0
    gc.collect()
    gc.freeze()  # what was loaded lives as long as the process: collections need not look at it again
    measured = Measured(
        weights_bytes=weights.num_bytes, peak_bytes=_peak_bytes(device, step_bytes), num_blocks=plan.num_blocks
    )
    return Computer(
        executor=executor,
        compiler=compiler,
        plan=plan,
        model=msgspec.structs.replace(as_held(checkpoint.model, facts), has_head=decoder.has_head),
        comparison=compare(paper, measured),
        tile_tokens=TILE_TOKENS if has_own_kernels(device) else 1,
        weights=weights if world.count == 1 else None,
    )


def _shared_facts(device: torch.device, world: World) -> DeviceFacts:
    """The same for all shards, whose plans must be one: what the fullest of their devices has free. On a CPU they share the
    memory."""
    facts = device_facts(device)
    if world.count == 1:
        return facts
    free_bytes, share = least(facts.free_bytes, device, world), 1 if device.type == "cuda" else world.count
    return msgspec.structs.replace(
        facts, free_bytes=free_bytes // share, total_bytes=least(facts.total_bytes, device, world) // share
    )


def least(number: int, device: torch.device, world: World) -> int:
    """The least of all shards' numbers."""
    return int(world.all_gather(torch.tensor([[number]], dtype=torch.int64, device=device)).min())


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
    from fastqwen.runner.cuda_follower import CudaFollower
    from fastqwen.runner.cuda_runner import CudaRunner
    from fastqwen.runner.measure import measure_room

    world = decoder.embed.world
    room = measure_room(model, config, plan, decoder, device)
    available = least(max(1, room.kv_bytes), device, world)
    plan = make_plan(model, config, _shared_facts(device, world), available_kv_bytes=available)
    if world.index == 0:
        runner = CudaRunner(model, decoder, plan, device, structured)
    else:
        runner = CudaFollower(model, decoder, plan, device, GrammarMarks())
    if not config.enforce_eager:
        runner.capture(on_capture)
    return plan, runner, room.step_bytes


def _layers_at_once(device: torch.device, checkpoint: Checkpoint) -> int:
    """On a CPU one layer is unpacked while another is packed. Made-up weights depend on their order; a GPU has no room for a
    second layer's unpacked numbers."""
    return 2 if device.type == "cpu" and checkpoint.tensors is not None and torch.get_num_threads() > 1 else 1


def _load(
    config: EngineConfig,
    checkpoint: Checkpoint,
    plan: EnginePlan,
    device: torch.device,
    ops: Ops,
    world: World,
    progress: Progress,
) -> HeldWeights:
    mapped = MappedFiles(checkpoint.tensor_files)
    dtype = TORCH_DTYPES[plan.dtype]
    if checkpoint.tensors is None:
        weights: Weights = DummyWeights(dtype, device, config.seed or 0)
    else:
        weights = Weights(checkpoint.tensors, dtype, device)
    decoder = build_decoder(
        checkpoint.model,
        weights,
        ops,
        source=checkpoint.source,
        world=world,
        progress=progress,
        at_once=_layers_at_once(device, checkpoint),
    )
    account(weights, checkpoint.model, checkpoint.source)
    return HeldWeights(decoder, weights.num_bytes, mapped)
