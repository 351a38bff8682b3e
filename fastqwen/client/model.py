"""A model loaded into this process: its text side, its limits, and an engine's core that nobody steps yet."""

from __future__ import annotations

import logging
from typing import Any

from tqdm import tqdm

from fastqwen.client.engine import Ready
from fastqwen.config import EngineConfig
from fastqwen.errors import BadConfig, BadRequest
from fastqwen.hub import resolve
from fastqwen.model_config import ModelConfig
from fastqwen.records import Grammar, SamplingParams
from fastqwen.runner.start import start_engine
from fastqwen.text.grammar import check_grammar, grammar_tokenizer, to_grammar
from fastqwen.text.load import TextTools, eos_without_tokenizer, load_text
from fastqwen.text.template import Message
from fastqwen.weights.checkpoint import open_checkpoint

log = logging.getLogger(__name__)


def batch_config(model: str, options: dict[str, Any]) -> EngineConfig:
    """``options`` are EngineConfig's fields. Raises BadConfig."""
    unknown = set(options) - set(EngineConfig.__struct_fields__)
    if unknown:
        raise BadConfig(f"there is no engine option {', '.join(sorted(unknown))}")
    return EngineConfig(model=model, **options).for_batches()


class LoadedModel:
    """``text`` is None where the config wants no tokenizer."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        path = resolve(config.model, revision=config.revision, weights=config.load_format != "dummy")
        if config.trust_remote_code:
            log.warning("trust_remote_code has no effect: nothing needs it, a checkpoint's code is never run")
        facts = open_checkpoint(path, with_tensors=False).model
        self.text: TextTools | None = None if config.skip_tokenizer_init else load_text(path, facts, config)
        with tqdm(desc="Loading layers", unit="layer", leave=False, delay=1.0, disable=None) as bar:
            engine = start_engine(
                config, path, lambda done, total: _advance(bar, done, total), grammar_tokenizer=self._grammar_tokenizer
            )
        self.core = engine.core
        self.ready = Ready(engine.plan, engine.model, engine.comparison)
        self._compiler = engine.compiler
        self.limits = self.ready.limits(self.text.stop_token_ids if self.text else eos_without_tokenizer(path, facts))
        if self.text is not None:
            self.text.tokenizer.limit_length(engine.plan.max_model_len)

    def need_text(self) -> TextTools:
        if self.text is None:
            raise BadRequest("there is no tokenizer (skip_tokenizer_init): give prompts as token ids", "prompt")
        return self.text

    def chat_token_ids(self, messages: list[Message], **options: Any) -> list[int]:
        """The prompt that the chat template makes. Raises BadRequest."""
        text = self.need_text()
        if text.template is None:
            raise BadRequest(f"{self.config.model} has no chat template: give one with chat_template=...", "messages")
        return text.template.encode(text.tokenizer, messages, **options)

    def grammar(self, sampling: SamplingParams) -> Grammar | None:
        """Compiled once here, so that a bad one is refused before anything runs. Raises BadRequest."""
        if sampling.structured_outputs is None:
            return None
        self.need_text()
        grammar = to_grammar(sampling.structured_outputs)
        assert self._compiler is not None
        check_grammar(grammar, self._compiler.tokenizer())
        return Grammar(grammar)

    def _grammar_tokenizer(self, model: ModelConfig) -> Any:
        text = self.need_text()
        return grammar_tokenizer(text.tokenizer, text.stop_token_ids, model.vocab_size)


def _advance(bar: Any, done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)
