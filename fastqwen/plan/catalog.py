"""From what the user calls a model to its sizes, without its weights: a published name, a folder, a GGUF file, a hub name."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import msgspec

from fastqwen.errors import BadConfig, ModelNotFound, Unsupported
from fastqwen.model_config import ModelConfig, parse_config, read_config, read_json
from fastqwen.plan.gpus import DATA

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_QUANTIZED = re.compile(r"-(GPTQ-Int4|GPTQ-Int8|Int4|Int8|AWQ|FP8)$")
QUANTIZATION_WORDS = {
    "none": None,
    "int4": "gptq-int4",
    "gptq": "gptq-int4",
    "gptq-int4": "gptq-int4",
    "int8": "gptq-int8",
    "gptq-int8": "gptq-int8",
    "awq": "awq",
    "fp8": "fp8",
}


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A published model."""

    name: str
    shape: str
    source: str
    quantization: str | None = None
    config: dict[str, Any] = {}


class NotServed(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    model_type: str


class Catalog(msgspec.Struct, frozen=True, kw_only=True):
    about: str
    shapes: dict[str, dict[str, Any]]
    quantizations: dict[str, dict[str, Any]]
    models: list[Entry]
    not_served: list[NotServed]

    def config_json(self, entry: Entry) -> dict[str, Any]:
        values = {**self.shapes[entry.shape], **entry.config}
        if entry.quantization is not None:
            values["quantization_config"] = self.quantizations[entry.quantization]
            if entry.quantization != "fp8":
                values["torch_dtype"] = "float16"
        return values

    def model(self, entry: Entry) -> ModelConfig:
        return parse_config(self.config_json(entry), entry.name)

    def find(self, name: str) -> Entry | None:
        return next((entry for entry in self.models if entry.name == name), None)


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """A model to plan: its sizes, and what to call it in a command line."""

    model: ModelConfig
    name: str
    entry: Entry | None = None
    weights_bytes: int | None = None  # of a file, where config.json does not tell
    notices: tuple[str, ...] = ()


@functools.cache
def catalog() -> Catalog:
    return msgspec.json.decode((DATA / "models.json").read_bytes(), type=Catalog)


def find_model(text: str) -> Found:
    """Raises ModelNotFound, BadCheckpoint or Unsupported."""
    path = Path(text).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return _from_gguf(path, text)
    if path.is_dir():
        return Found(model=read_config(path), name=text)
    entry = published(text)
    if entry is not None:
        return Found(model=catalog().model(entry), name=entry.name, entry=entry)
    if not _HUB_NAME.fullmatch(text) or ".." in text:
        raise ModelNotFound(f"there is no folder, .gguf file or published Qwen model {text!r}, and it is no hub name")
    return Found(model=parse_config(_hub_config(text), f"{text}: config.json"), name=text)


def published(text: str) -> Entry | None:
    """The entry of a published name, with or without Qwen/; Qwen-7B-Int4 is Qwen-7B-Chat-Int4, and 1.8B is 1_8B.

    Raises Unsupported for a model that is known, but not served yet.
    """
    wanted = _key(text)
    names = {_key(entry.name): entry for entry in catalog().models}
    for later in catalog().not_served:
        if _key(later.name) == wanted:
            raise Unsupported(f"{later.name} is known, but not served yet: fastqwen has no {later.model_type}")
    quantized = _QUANTIZED.search(text)
    candidates = [wanted]
    if quantized:
        stem = text[: quantized.start()]
        candidates += [_key(f"{stem}-{kind}{quantized[0]}") for kind in ("Chat", "Instruct")]
    return next((names[key] for key in candidates if key in names), None)


def quantized_version(found: Found, word: str) -> Found:
    """The version that --quantization asks for: the published one where there is one, else its sizes as if."""
    if word not in QUANTIZATION_WORDS:
        raise BadConfig(f"--quantization is {word!r}; possible: {', '.join(QUANTIZATION_WORDS)}")
    wanted = QUANTIZATION_WORDS[word]
    if found.entry is not None and found.entry.quantization == wanted:
        return found
    sibling = sibling_of(found.entry, wanted) if found.entry is not None else None
    if sibling is not None:
        return Found(
            model=catalog().model(sibling),
            name=sibling.name,
            entry=sibling,
            notices=(f"--quantization {word}: planned for {sibling.name}",),
        )
    if _quantization_of(found.model) == wanted:
        return found
    quantization = None if wanted is None else catalog().quantizations[wanted]
    return Found(
        model=msgspec.structs.replace(found.model, quantization=quantization),
        name=found.name,
        notices=(f"no published {word} version of {found.name} is known: the sizes are those that one would have",),
    )


def sibling_of(entry: Entry, quantization: str | None) -> Entry | None:
    """The same model in another quantization; a base model's chat version stands in for one that was not published."""
    family = _family(entry.name)
    options = [e for e in catalog().models if e.shape == entry.shape and e.quantization == quantization]
    same = [e for e in options if _family(e.name) == family]
    chat = [e for e in options if _family(e.name) in (f"{family}-Chat", f"{family}-Instruct")]
    return next(iter(same + chat), None)


def _family(name: str) -> str:
    return _QUANTIZED.sub("", name)


def _quantization_of(model: ModelConfig) -> str | None:
    if model.quantization is None:
        return None
    method = str(model.quantization.get("quant_method", "")).lower()
    return f"gptq-int{model.quantization.get('bits', 4)}" if method == "gptq" else method


def _key(name: str) -> str:
    return name.strip().lower().removeprefix("qwen/").replace("_", ".").replace(" ", "-")


def _from_gguf(path: Path, text: str) -> Found:
    from fastqwen.weights.gguf_checkpoint import config_from_gguf
    from fastqwen.weights.gguf_file import GgufFile

    return Found(model=config_from_gguf(GgufFile(path)), name=text, weights_bytes=path.stat().st_size)


def _hub_config(name: str) -> dict[str, Any]:
    """Only config.json, from the cache or the hub. Raises ModelNotFound, saying what to do."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return read_json(Path(hf_hub_download(name, "config.json")))
    except GatedRepoError:
        raise ModelNotFound(f"{name} asks for an account: accept its terms on the hub and set HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise ModelNotFound(f"there is no model {name!r} on the hub (a private one needs HF_TOKEN)") from None
    except Exception as error:  # the hub's client raises its own errors and those of whichever HTTP library it uses
        if isinstance(error, ModelNotFound):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise ModelNotFound(
            f"{name}: config.json is not in the cache and the hub cannot be reached ({reason}): "
            "check the network, HF_ENDPOINT and HF_HUB_OFFLINE, or give a local folder"
        ) from None
