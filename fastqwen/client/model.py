"""A model loaded into this process: its text side, its facts, and an engine's core that nobody steps yet."""

from __future__ import annotations

import functools
import logging
from contextlib import closing
from typing import Any, cast, get_args

import msgspec

from fastqwen.client.engine import Ready
from fastqwen.client.loading_bar import LoadingBar
from fastqwen.client.thinking import ThinkingOptions, token_budget
from fastqwen.config import ContentFormat, EngineConfig
from fastqwen.engine.core import EngineCore
from fastqwen.errors import BadCheckpoint, BadConfig, BadRequest
from fastqwen.hub import find_checkpoint
from fastqwen.ranks.start import start_engine
from fastqwen.records import ALL, Grammar, SamplingParams
from fastqwen.runner.held import HeldWeights, give_back
from fastqwen.text.chatml import PiecewiseChatMl
from fastqwen.text.formats import Formats, derive_formats
from fastqwen.text.grammar import check_grammar, to_grammar
from fastqwen.text.load import TextTools, eos_without_tokenizer, load_text, read_template
from fastqwen.text.template import ChatTemplate, Message
from fastqwen.vllm_names import keywords

log = logging.getLogger(__name__)

Template = ChatTemplate | PiecewiseChatMl


def batch_config(model: str, options: dict[str, Any]) -> EngineConfig:
    """``options`` are EngineConfig's fields, or vLLM's where they say what holds here. Raises BadConfig."""
    found = keywords(options)
    for notice in found.notices:
        log.info("%s", notice)
    try:
        config = msgspec.convert({"model": model, **found.ours}, EngineConfig)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, BadConfig):
            raise error.__cause__ from None
        raise BadConfig(str(error).replace(" - at `$.", ": ").rstrip("`")) from None
    return config.for_batches()


class LoadedModel:
    """``text`` is None where the config wants no tokenizer."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        path, model = find_checkpoint(config)
        if config.trust_remote_code:
            log.warning("trust_remote_code has no effect: nothing needs it, a checkpoint's code is never run")
        self.text: TextTools | None = None if config.skip_tokenizer_init else load_text(path, model, config)
        self._path = path
        self._weights: HeldWeights | None = None
        self._kept: HeldWeights | None = None  # while there is no core
        self.ready, self.core = self.start()
        stops = self.text.stop_token_ids if self.text else eos_without_tokenizer(path, model)
        self.facts = self.ready.facts(stops, takes_priorities=config.takes_priorities)
        if self.text is not None:
            self.text.tokenizer.limit_length(self.ready.plan.max_model_len)

    def start(self) -> tuple[Ready, EngineCore]:
        """Load the weights and make the cache, at first and after ``stop``; weights that were kept are not read again."""
        with closing(LoadingBar()) as bar:
            engine = start_engine(
                self.config,
                self._path,
                bar.update,
                grammar_tokenizer=lambda found: self.need_text().grammar_tokenizer(found),
                weights=self._kept,
            )
        self.core, self._weights, self._kept = engine.core, engine.weights, None
        self._compiler = engine.compiler
        return Ready(engine.plan, engine.model, engine.comparison), engine.core

    def stop(self, *, keep: bool = False) -> None:
        """Give weights and cache back; nobody else may hold ``core`` any more. ``keep``: the weights wait in host memory, where
        this process computes alone."""
        del self.core
        self._kept, self._weights = (self._weights if keep else None), None
        if self._kept is not None:
            self._kept.put_away()
        self._compiler = None
        give_back()

    def drop_kept(self) -> None:
        """What ``stop`` kept."""
        self._kept = None

    def need_text(self) -> TextTools:
        if self.text is None:
            raise BadRequest("there is no tokenizer (skip_tokenizer_init): give prompts as token ids", "prompt")
        return self.text

    def chat_token_ids(self, messages: list[Message], **options: Any) -> list[int]:
        """The prompt that the chat template makes. Raises BadRequest."""
        return self._own_template().encode(self.need_text().tokenizer, messages, **options)

    def template(self, given: str | None, content_format: str = "auto") -> Template:
        """The one for a call: ``given``, a Jinja template or a file with one, or else the model's own. Raises BadRequest for
        one that does not parse."""
        template = self._own_template() if given is None else self._other_template(given)
        if content_format not in get_args(ContentFormat):
            one_of = ", ".join(get_args(ContentFormat))
            raise BadRequest(
                f"chat_template_content_format is {content_format!r}, but must be one of {one_of}",
                "chat_template_content_format",
            )
        if content_format != "auto" and isinstance(template, ChatTemplate):
            return template.with_content_format(cast("ContentFormat", content_format))
        return template

    def _own_template(self) -> Template:
        template = self.need_text().template
        if template is None:
            raise BadRequest(f"{self.config.model} has no chat template: give one with chat_template=...", "messages")
        return template

    def _other_template(self, given: str) -> Template:
        own = self.need_text().template
        variables = own if isinstance(own, ChatTemplate) else ChatTemplate("", origin="chat_template")
        try:
            return variables.with_source(read_template(given), origin="chat_template")
        except (BadCheckpoint, BadConfig) as error:
            raise BadRequest(str(error), "chat_template") from None

    @functools.cached_property
    def formats(self) -> Formats:
        """Which words it thinks and calls tools in. Raises BadRequest without a tokenizer."""
        config = self.config
        return derive_formats(
            self.need_text().template,
            tool_call_parser=config.tool_call_parser,
            reasoning_parser=config.reasoning_parser,
            reasoning_config=config.reasoning_config,
        )

    def thinking(self, sampling: SamplingParams) -> ThinkingOptions | None:
        """Where an answer's thinking must end. Raises BadRequest."""
        budget = sampling.thinking_token_budget
        if budget is None or budget == ALL or sampling.structured_outputs is not None:
            return None
        found = token_budget(budget, self.formats)
        if found is None:
            log.warning("thinking_token_budget: this model does not think in a marked block: there is nothing to limit")
        return found

    def thinking_switch(self, sampling: SamplingParams) -> dict[str, Any]:
        """For the chat template: thinking that may take no token is not begun, where it can be switched off."""
        none = sampling.thinking_token_budget == 0 and self.formats.has_switch("enable_thinking")
        return {"enable_thinking": False} if none else {}

    def grammar(self, sampling: SamplingParams) -> Grammar | None:
        """Compiled once here, so that a bad one is refused before anything runs. Raises BadRequest."""
        if sampling.structured_outputs is None:
            return None
        self.need_text()
        grammar = to_grammar(sampling.structured_outputs)
        assert self._compiler is not None
        check_grammar(grammar, self._compiler.tokenizer())
        return Grammar(grammar)
