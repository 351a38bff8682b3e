"""A model's text side: tokenizer, chat template, stop tokens and default sampling, read from its files."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastqwen.collections_paused import collections_paused
from fastqwen.config import EngineConfig
from fastqwen.errors import BadCheckpoint, BadConfig, BadRequest
from fastqwen.hub import resolve
from fastqwen.model_config import ModelConfig, read_json
from fastqwen.records import SamplingParams
from fastqwen.text.belonging import check_eos, check_eos_token, check_template, check_vocabulary
from fastqwen.text.chatml import PiecewiseChatMl
from fastqwen.text.folder_templates import folder_templates
from fastqwen.text.folder_tokenizer import from_tokenizer_json, from_vocabulary, no_tokenizer, tokenizer_words
from fastqwen.text.stops import StopToken, derive_stops
from fastqwen.text.task_prompts import read_task_prompts
from fastqwen.text.template import CHATML, ChatTemplate
from fastqwen.text.tokenizer import JsonTokenizer, NoTokenizer, Tokenizer
from fastqwen.text_files import read_text

if TYPE_CHECKING:
    from llguidance import LLTokenizer

log = logging.getLogger(__name__)

GENERATION_CONFIG = "generation_config.json"
SAMPLING_KEYS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class TextTools:
    """``default_sampling`` holds what ``generation_config`` sets, under SamplingParams' names; ``max_tokens`` among it is
    how long an answer gets where a request does not say."""

    tokenizer: Tokenizer
    template: ChatTemplate | PiecewiseChatMl | None
    stops: list[StopToken]
    default_sampling: dict[str, Any] = field(default_factory=dict)
    generation_config: dict[str, Any] = field(default_factory=dict)
    task_prompts: dict[str, str] = field(default_factory=dict)  # what stands before a text to embed, by its kind

    @property
    def stop_token_ids(self) -> list[int]:
        return [stop.token_id for stop in self.stops]

    def grammar_tokenizer(self, model: ModelConfig) -> LLTokenizer:
        """What grammars are compiled with. Takes a second for a large vocabulary."""
        from fastqwen.text.grammar import grammar_tokenizer

        return grammar_tokenizer(self.tokenizer, self.stop_token_ids, model.vocab_size)


@dataclass(frozen=True)
class _TextFiles:
    tokenizer: Tokenizer
    file: str  # where it was read from, as errors name it
    template: str | None
    template_origin: str
    tokenizer_eos: str | int | None
    variables: dict[str, Any]
    tool_template: str | None = None  # for requests with tools, if there is one of its own
    ends: tuple[int, ...] = ()  # further tokens that end an answer


@collections_paused()
def load_text(path: Path, model: ModelConfig, config: EngineConfig) -> TextTools:
    """Raises BadCheckpoint, naming the files, where tokenizer and weights do not belong together."""
    where = resolve(config.tokenizer, weights=False, folder=config.download_dir) if config.tokenizer else path
    if config.skip_tokenizer_init:
        files = _TextFiles(NoTokenizer(model.vocab_size), "", None, "", None, {})
    else:
        files = _from_gguf(where) if where.is_file() else _from_folder(where)
    own = own_generation_config(path)
    file, generation = _chosen_generation_config(path, config)
    generation = {**generation, **_overrides(config)}
    template = _template(files, config)
    if not config.skip_tokenizer_init:
        _check_belonging(files, template, model, where, path)
        check_eos(files.tokenizer, files.file, generation.get("eos_token_id"), str(file))
    stops = derive_stops(
        files.tokenizer,
        template=template,
        config_eos=model.eos_token_ids,
        config_origin=f"{path.name if path.is_file() else 'config.json'}: eos_token_id",
        generation_config=own,
        chosen={str(file): generation} if generation != own else {},
        tokenizer_eos=files.tokenizer_eos,
        further=files.ends,
    )
    return TextTools(
        tokenizer=files.tokenizer,
        template=template,
        stops=stops,
        default_sampling=_default_sampling(generation, file),
        generation_config=generation,
        task_prompts=read_task_prompts(path),
    )


def _from_folder(folder: Path) -> _TextFiles:
    words = tokenizer_words(folder)
    tokenizer, file, piecewise = _folder_tokenizer(folder, words)
    templates = folder_templates(folder, words)
    origin = PiecewiseChatMl.origin if piecewise and templates.default is None else templates.origin
    variables = {name: _token_text(words.get(name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    eos = variables["eos_token"] or None
    return _TextFiles(tokenizer, str(file), templates.default, origin, eos, variables, templates.with_tools)


def _folder_tokenizer(folder: Path, words: dict[str, Any]) -> tuple[Tokenizer, Path, bool]:
    from fastqwen.text import qwen_tiktoken

    for read in (from_tokenizer_json, from_vocabulary):
        found = read(folder, words)
        if found is not None:
            return *found, False
    old = folder / qwen_tiktoken.FILE_NAME
    if old.exists():
        return qwen_tiktoken.QwenTiktoken(old), old, True
    raise no_tokenizer(folder)


def _token_text(value: Any) -> str:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _from_gguf(path: Path) -> _TextFiles:
    from fastqwen.text.gguf_tokenizer import text_facts, tokenizer_from_gguf
    from fastqwen.weights.gguf_file import GgufFile

    metadata = GgufFile(path).metadata
    tokenizer = JsonTokenizer(tokenizer_from_gguf(metadata, str(path)))
    facts = text_facts(metadata)

    def text(token_id: int | None) -> str:
        return "" if token_id is None else tokenizer.token_text(token_id)

    variables = {"bos_token": text(facts.bos_token_id), "eos_token": text(facts.eos_token_id)}
    origin = f"{path.name}: chat_template"
    return _TextFiles(
        tokenizer,
        str(path),
        facts.chat_template,
        origin,
        facts.eos_token_id,
        variables,
        facts.tool_template,
        facts.ends,
    )


def _check_belonging(
    files: _TextFiles, template: ChatTemplate | PiecewiseChatMl | None, model: ModelConfig, where: Path, path: Path
) -> None:
    """Raises BadCheckpoint that names the two files which contradict each other."""
    tokenizer, file = files.tokenizer, files.file
    config_file = str(path if path.is_file() else path / "config.json")
    check_vocabulary(tokenizer, file, model.vocab_size, config_file)
    check_eos(tokenizer, file, model.eos_token_ids, config_file)
    check_eos(tokenizer, file, own_generation_config(path).get("eos_token_id"), str(generation_config_file(path)))
    check_eos_token(tokenizer, file, files.tokenizer_eos, str(where / "tokenizer_config.json"))
    check_template(tokenizer, file, template)


def eos_without_tokenizer(path: Path, model: ModelConfig) -> list[int]:
    """Stop ids for work with token ids only: what generation_config.json and config.json say."""
    found = own_generation_config(path).get("eos_token_id")
    ids = [*(found if isinstance(found, list) else [found]), *model.eos_token_ids]
    return list(dict.fromkeys(one for one in ids if type(one) is int and 0 <= one < model.vocab_size))


def own_generation_config(path: Path) -> dict[str, Any]:
    """The checkpoint's; it says what ends an answer, wherever sampling parameters come from."""
    return _read_if_there(generation_config_file(path))


def generation_config_file(path: Path) -> Path:
    """In a checkpoint's folder, or beside a .gguf file, which has no place for it inside."""
    return (path.parent if path.is_file() else path) / GENERATION_CONFIG


def _read_if_there(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _chosen_generation_config(path: Path, config: EngineConfig) -> tuple[Path, dict[str, Any]]:
    """Where default sampling parameters come from, and what is written there."""
    if config.generation_config == "auto":
        return generation_config_file(path), own_generation_config(path)
    if config.generation_config == "none":
        return generation_config_file(path), {}
    file = Path(config.generation_config) / GENERATION_CONFIG
    if not file.is_file():
        raise BadConfig(f"--generation-config: {file} does not exist")
    return file, read_json(file)


def _overrides(config: EngineConfig) -> dict[str, Any]:
    """Raises BadConfig for a key that would change nothing, and for a value that cannot be."""
    flag = "--override-generation-config"
    given = config.override_generation_config or {}
    known = (*SAMPLING_KEYS, "max_new_tokens", "do_sample", "eos_token_id")
    for key in given:
        if key not in known:
            raise BadConfig(f"{flag}: {key[:60]!r} is none of {', '.join(known)}")
    try:
        _default_sampling(given, Path(flag))
    except BadCheckpoint as error:
        raise BadConfig(str(error)) from None
    return {"do_sample": True, **given} if "temperature" in given else given


def _default_sampling(generation: dict[str, Any], file: Path) -> dict[str, Any]:
    defaults = {key: generation[key] for key in SAMPLING_KEYS if generation.get(key) is not None}
    for key, value in (*defaults.items(), ("max_new_tokens", generation.get("max_new_tokens") or 1)):
        kinds = (int,) if key == "max_new_tokens" else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise BadCheckpoint(f"{file}: {key} is {str(value)[:60]!r}, expected a number")
    if generation.get("do_sample") is False:
        defaults["temperature"] = 0.0
    if generation.get("max_new_tokens") is not None:
        defaults["max_tokens"] = generation["max_new_tokens"]
    try:
        SamplingParams(**defaults)
    except BadRequest as error:
        raise BadCheckpoint(f"{file}: {error}") from None
    return defaults


def read_template(given: str) -> str:
    """A Jinja template's text, from a file or as it is. Raises BadConfig."""
    if os.path.isfile(given):  # Path.is_file raises for a text that is too long to be a name
        return read_text(Path(given))
    if "{" not in given:
        raise BadConfig(f"--chat-template: there is no file {given[:200]}")
    return given


def _template(files: _TextFiles, config: EngineConfig) -> ChatTemplate | PiecewiseChatMl | None:
    known: dict[str, Any] = {"variables": files.variables, "content_format": config.chat_template_content_format}
    if config.chat_template is not None:
        origin = config.chat_template if os.path.isfile(config.chat_template) else "--chat-template"
        return ChatTemplate(read_template(config.chat_template), origin=origin, **known)
    if files.template is not None:
        return ChatTemplate(
            files.template,
            origin=files.template_origin,
            tool_source=files.tool_template,
            **known,
        )
    if files.template_origin == PiecewiseChatMl.origin:
        return PiecewiseChatMl()
    if {"<|im_start|>", "<|im_end|>"} <= files.tokenizer.control_tokens.keys():
        return ChatTemplate(CHATML, origin="built-in ChatML", **known)
    return None
