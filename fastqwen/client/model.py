"""A model loaded into this process: its text side, its facts, and an engine's core that nobody steps yet."""

from __future__ import annotations

import logging
from contextlib import closing
from typing import Any

from fastqwen.client.engine import Ready
from fastqwen.client.loading_bar import LoadingBar
from fastqwen.config import EngineConfig
from fastqwen.errors import BadConfig, BadRequest
from fastqwen.hub import find_checkpoint
from fastqwen.ranks.start import start_engine
from fastqwen.records import Grammar, SamplingParams
from fastqwen.text.grammar import check_grammar, to_grammar
from fastqwen.text.load import TextTools, eos_without_tokenizer, load_text
from fastqwen.text.template import Message

log = logging.getLogger(__name__)


def batch_config(model: str, options: dict[str, Any]) -> EngineConfig:
    """``options`` are EngineConfig's fields. Raises BadConfig."""
    if options.get("pipeline_parallel_size", 1) != 1:
        raise BadConfig("pipeline_parallel_size cannot be more than 1: use tensor_parallel_size instead")
    options = {name: value for name, value in options.items() if name != "pipeline_parallel_size"}
    unknown = set(options) - set(EngineConfig.__struct_fields__)
    if unknown:
        raise BadConfig(f"there is no engine option {', '.join(sorted(unknown))}")
    return EngineConfig(model=model, **options).for_batches()


class LoadedModel:
    """``text`` is None where the config wants no tokenizer."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        path, model = find_checkpoint(config)
        if config.trust_remote_code:
            log.warning("trust_remote_code has no effect: nothing needs it, a checkpoint's code is never run")
        self.text: TextTools | None = None if config.skip_tokenizer_init else load_text(path, model, config)
        with closing(LoadingBar()) as bar:
            engine = start_engine(
                config, path, bar.update, grammar_tokenizer=lambda found: self.need_text().grammar_tokenizer(found)
            )
        self.core = engine.core
        self.ready = Ready(engine.plan, engine.model, engine.comparison)
        self._compiler = engine.compiler
        self.facts = self.ready.facts(self.text.stop_token_ids if self.text else eos_without_tokenizer(path, model))
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
