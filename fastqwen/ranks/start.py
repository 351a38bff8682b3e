"""An engine for any ``tensor_parallel_size``: in this process for one, with a process for each rank otherwise."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import llguidance
import msgspec

from fastqwen.config import EngineConfig
from fastqwen.model_config import ModelConfig
from fastqwen.ranks.executor import RanksExecutor
from fastqwen.ranks.group import RANK_COMMAND, Group
from fastqwen.runner import start
from fastqwen.runner.held import HeldWeights
from fastqwen.runner.start import Computer, Engine, GrammarTokenizer, Progress, engine_of
from fastqwen.runner.structured import GrammarCompiler

log = logging.getLogger(__name__)


class RanksCompiler:
    """Grammars are checked here and followed in the first rank."""

    def __init__(self, group: Group, model: ModelConfig, tokenizer: GrammarTokenizer) -> None:
        self._group = group
        self._here = GrammarCompiler(partial(tokenizer, model))

    def tokenizer(self) -> llguidance.LLTokenizer:
        return self._here.tokenizer()

    def compile(self, grammar: str) -> object:
        self._group.prepare(grammar)
        return None


def start_engine(
    config: EngineConfig,
    path: Path,
    progress: Progress = lambda done, total: None,
    on_capture: Progress = lambda done, total: None,
    grammar_tokenizer: GrammarTokenizer | None = None,
    *,
    log_format: str = "text",
    command: Sequence[str] = RANK_COMMAND,
    weights: HeldWeights | None = None,
) -> Engine:
    """As runner/start.py has it; progress counts all ranks' layers. Only one that computes alone takes ``weights``. Raises
    FastqwenError."""
    count = config.tensor_parallel_size
    if count == 1:
        return start.start_engine(config, path, progress, on_capture, grammar_tokenizer, weights)
    group = Group(config, path, log_format=log_format, command=command)
    try:
        first, *_ = started = group.start(progress, on_capture)
    except BaseException:
        group.close()
        raise
    log.info("%d ranks compute: %s", count, ", ".join(one.device for one in started))
    plan = msgspec.structs.replace(first.plan, device=f"{count} x {first.plan.device}")
    computer = Computer(
        executor=RanksExecutor(group, run_ahead=first.run_ahead, patience_s=first.patience_s),
        compiler=None if grammar_tokenizer is None else RanksCompiler(group, first.model, grammar_tokenizer),
        plan=plan,
        model=first.model,
        comparison=first.comparison,
        tile_tokens=first.tile_tokens,
    )
    return engine_of(config, computer, group.check)
