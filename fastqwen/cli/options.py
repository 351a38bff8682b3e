"""Flags made from the fields of a config, so that there is one list of options."""

from __future__ import annotations

import inspect
import json
import re
import sys
import typing
from collections.abc import Callable, Container
from functools import cache
from types import UnionType
from typing import Annotated, Any

import msgspec
import typer

from fastqwen.config import EngineConfig, flag, options_of
from fastqwen.errors import BadConfig

_SUFFIXES = {"": 1, "k": 10**3, "K": 2**10, "m": 10**6, "M": 2**20, "g": 10**9, "G": 2**30}

# Under which title --help shows the flag of a field; what is not here stands first, under the command's own options.
GROUPS = {
    "The model and its files": (
        "dtype", "quantization", "device", "load_format", "download_dir", "revision", "trust_remote_code", "tokenizer",
        "skip_tokenizer_init", "chat_template", "chat_template_content_format", "tool_call_parser", "reasoning_parser",
        "reasoning_config", "pooling_task", "generation_config", "override_generation_config", "served_model_name",
        "rope_per_request", "rope_scaling", "rope_theta", "hf_overrides", "seed",
    ),
    "Memory and speed": (
        "max_model_len", "max_num_seqs", "max_num_batched_tokens", "max_num_mixed_tokens", "prompts_first", "block_size",
        "max_state_snapshots",
        "gpu_memory_utilization", "kv_cache_memory_bytes", "kv_cache_dtype", "enable_prefix_caching", "scheduling_policy",
        "enforce_eager", "num_threads", "tensor_parallel_size",
    ),
    "Who may ask, and how long it may take": (
        "insecure", "uds", "root_path", "ssl_certfile", "ssl_keyfile", "ssl_ca_certs", "ssl_cert_reqs", "ssl_ciphers",
        "allowed_hosts", "allowed_origins", "header_timeout_s", "body_timeout_s", "stall_timeout_s",
        "drain_timeout_s", "max_body_bytes", "max_concurrent_requests", "strict_model_name", "strict_fields",
        "trust_request_chat_template",
    ),
    "What a request may ask for": (
        "max_n", "max_logprobs", "max_logit_bias", "max_stop_strings", "max_stop_chars", "max_grammar_chars",
        "text_timeout_s",
    ),
}  # fmt: skip

# Other names of a field's flag.
ALIASES = {"tensor_parallel_size": ("-tp",), "num_gpus": ("--tensor-parallel-size", "-tp")}

# What several commands take.
MODEL_HELP = "demo, a folder, a .gguf file, or a hub name like Qwen/Qwen3-0.6B."


def model_names(incomplete: str) -> list[str]:
    """What a shell offers behind a command: the demo, published names, and files by the shell itself."""
    from fastqwen.plan.catalog import catalog

    names = ["demo", *(entry.name for entry in catalog().models)]
    return [name for name in names if name.lower().startswith(incomplete.lower())]


Model = Annotated[str, typer.Argument(help=MODEL_HELP, autocompletion=model_names)]
ApiKey = Annotated[
    str | None, typer.Option(envvar=["FASTQWEN_API_KEY", "VLLM_API_KEY"], help="Key of the server, if it wants one.")
]


def whole_number(text: str) -> int:
    """12, 32K (32,768), 32k (32,000), 1M, 4G: as vLLM reads them."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgG]?)", str(text).strip())
    number = float(match[1]) * _SUFFIXES[match[2]] if match else 0.5
    if number != int(number):
        raise typer.BadParameter(f"{text!r} is not a whole number (32768, 32K and 1M are fine)")
    return int(number)


def named(model: str) -> str:
    """The name that a hub knows, said where it is not what was typed. The address of a server becomes a whole one.

    Raises ModelNotFound and Unsupported, before anything heavy is imported.
    """
    from fastqwen.names import known_name, server_address

    address = server_address(model)
    if address is not None:
        return address
    found = known_name(model)
    if found != model:
        print(f"INFO:     {model} stands for {found}", file=sys.stderr)
    return found


def json_object(text: Any) -> dict[str, Any]:
    """{"rope_type": "yarn", "factor": 4.0}"""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise typer.BadParameter(f'{text!r} is not a JSON object, such as {{"rope_type": "yarn", "factor": 4.0}}')
    return found


def help_text(command: Callable[..., None]) -> str:
    """A command's docstring; a paragraph of examples keeps its lines."""
    paragraphs = (inspect.getdoc(command) or "").split("\n\n")
    return "\n\n".join(f"\b\n{one}" if _is_example(one) else one for one in paragraphs)


def _is_example(paragraph: str) -> bool:
    return all(line.startswith("fastqwen ") or " | fastqwen " in line for line in paragraph.splitlines())


def with_options(
    *, hidden: Container[str] = (), **configs: type[msgspec.Struct]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command a flag for each field with a help text; it receives those of a config as one dict of its name.

    Its own parameters keep their places and go before a field of the same name. ``hidden`` fields keep their defaults.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [one for one in inspect.signature(command, eval_str=True).parameters.values() if one.name not in configs]
        taken = {one.name for one in own}
        names = {
            name: [field for field in options_of(config) if field not in taken and field not in hidden]
            for name, config in configs.items()
        }
        added = [_parameter(configs[name], field) for name, fields in names.items() for field in fields]

        def run(**values: Any) -> None:
            if isinstance(values.get("model"), str) and not values.get("base_url"):
                values["model"] = named(values["model"])
            made = {name: {field: values.pop(field) for field in fields} for name, fields in names.items()}
            _check_a_server_is_left_alone(values.get("model"), made.get("engine_options", {}))
            command(**made, **values)

        parameters = own + added
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in parameters}
        return run

    return decorate


def _check_a_server_is_left_alone(model: Any, engine_options: dict[str, Any]) -> None:
    """Raises BadConfig for the first flag that would have to change the engine of a running server."""
    if not isinstance(model, str) or not model.startswith(("http://", "https://")):
        return
    usual = {field.name: field.default for field in msgspec.structs.fields(EngineConfig)}
    for name, value in engine_options.items():
        if value not in (usual[name], [], None):
            raise BadConfig(f"{flag(name)} is for a model that is loaded here: the server at {model} has its own")


with_engine_options = with_options(engine_options=EngineConfig)


@cache  # --help must be quick
def _parameter(config: type[msgspec.Struct], name: str) -> inspect.Parameter:
    kind, meta = options_of(config)[name]
    default = next(field.default for field in msgspec.structs.fields(config) if field.name == name)
    optional = isinstance(kind, UnionType)
    if optional:
        kind = next(one for one in typing.get_args(kind) if one is not type(None))
    extra: dict[str, Any] = {"min": meta.ge, "max": meta.le}
    panel = next((title for title, fields in GROUPS.items() if name in fields), None)
    text = flag(name)
    if typing.get_origin(kind) is dict:
        kind, extra = dict, {"parser": json_object, "metavar": "JSON"}
    if kind is bool and not meta.extra:
        text = f"{text}/--no-{text.removeprefix('--')}"
    elif kind is int and meta.ge is None:
        extra = {"parser": whole_number, "metavar": "NUMBER"}
    if default is msgspec.NODEFAULT:
        default = []
    info = typer.Option(
        text, *ALIASES.get(name, ()), help=meta.description, show_default=not optional, rich_help_panel=panel, **extra
    )
    annotation: Any = Annotated[(kind | None) if optional else kind, info]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
