"""The published Qwen models: from a name to its sizes, without asking anyone."""

from __future__ import annotations

import functools
import re
from typing import Any

import msgspec

from fastqwen.errors import BadConfig, Unsupported
from fastqwen.model_config import ModelConfig
from fastqwen.models import parse_config
from fastqwen.plan.gpus import DATA

_QUANTIZED = re.compile(r"-(GPTQ-Int4|GPTQ-Int8|Int4|Int8|AWQ|FP8)$")
_SIZE = re.compile(r"(?<=-)(\d+(?:[._]\d+)?)([BT])(?:-A\d+(?:\.\d+)?B)?")
QWQ_VERSION = 2.5  # QwQ-32B was made of Qwen2.5
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


_parsed: dict[str, ModelConfig] = {}


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
        if entry.name not in _parsed:
            _parsed[entry.name] = parse_config(self.config_json(entry), entry.name)
        return _parsed[entry.name]

    def find(self, name: str) -> Entry | None:
        return next((entry for entry in self.models if entry.name == name), None)


class NamedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model to plan: its sizes, and what to call it in a command line."""

    model: ModelConfig
    name: str
    entry: Entry | None = None
    notices: tuple[str, ...] = ()
    real: NamedModel | None = None  # what there is, if the model is one that nobody has published


@functools.cache
def catalog() -> Catalog:
    return msgspec.json.decode((DATA / "models.json").read_bytes(), type=Catalog)


def find_published(text: str) -> NamedModel | None:
    entry = published(text)
    return None if entry is None else named_model(entry)


def named_model(entry: Entry, *notices: str) -> NamedModel:
    return NamedModel(model=catalog().model(entry), name=entry.name, entry=entry, notices=notices)


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


def quantized_version(named: NamedModel, word: str) -> NamedModel:
    """The version that --quantization asks for: the published one where there is one, else its sizes as if."""
    if word not in QUANTIZATION_WORDS:
        raise BadConfig(f"--quantization is {word!r}; possible: {', '.join(QUANTIZATION_WORDS)}")
    wanted = QUANTIZATION_WORDS[word]
    if named.entry is not None and named.entry.quantization == wanted:
        return named
    sibling = sibling_of(named.entry, wanted) if named.entry is not None else None
    if sibling is not None:
        return named_model(sibling, f"--quantization {word}: planned for {sibling.name}")
    if _quantization_of(named.model) == wanted:
        return named
    quantization = None if wanted is None else catalog().quantizations[wanted]
    return NamedModel(
        model=msgspec.structs.replace(named.model, quantization=quantization),
        name=named.name,
        notices=(f"no published {word} version of {named.name} is known: the sizes are those that one would have",),
        real=named,
    )


def sibling_of(entry: Entry, quantization: str | None) -> Entry | None:
    """The same model in another quantization; a base model's chat version stands in for one that was not published."""
    family = _family(entry.name)
    options = [e for e in catalog().models if e.shape == entry.shape and e.quantization == quantization]
    same = [e for e in options if _family(e.name) == family]
    chat = [e for e in options if _family(e.name) in (f"{family}-Chat", f"{family}-Instruct")]
    return next(iter(same + chat), None)


def smaller_than(entry: Entry) -> list[Entry]:
    """The smaller sizes of a model, the largest first; of one size, the same quantization first, then Int4, then none."""
    line, size = _line_and_size(entry.name)
    liked = list(dict.fromkeys([entry.quantization, "gptq-int4", None]))
    found = []
    for other in catalog().models:
        name, count = _line_and_size(other.name)
        if name == line and count < size and other.quantization in liked:
            found.append((-count, liked.index(other.quantization), other))
    return [other for *_, other in sorted(found, key=lambda one: one[:2])]


class Rank(msgspec.Struct, frozen=True, order=True):
    """Sorts published models as somebody looks for one: the newest version first, models that answer before base models,
    the largest first, the newest of that size, and plain weights before packed ones."""

    version: float
    is_base: bool
    is_special: bool  # for code or mathematics, very long prompts, or a preview
    size: float
    revision: int
    is_packed: bool
    name: str


def rank(entry: Entry) -> Rank:
    family = _family(entry.name).removeprefix("Qwen/")
    match = re.match(r"(?:Code)?Qwen(\d(?:\.\d+)?)?", family)
    version = float(match[1] or 1) if match else QWQ_VERSION
    answers = bool(re.search(r"Instruct|Chat|Thinking|QwQ", family)) or (version >= 3 and not family.endswith("-Base"))
    return Rank(
        version=-version,
        is_base=not answers,
        is_special=bool(re.search(r"Code|Math|-1M|Preview|QwQ|Thinking|Embedding|Reranker|Guard", family)),
        size=-_line_and_size(entry.name)[1],
        revision=-int(found[1]) if (found := re.search(r"-(\d{4})$", family)) else 0,
        is_packed=entry.quantization is not None,
        name=entry.name,
    )


@functools.cache
def _line_and_size(name: str) -> tuple[str, float]:
    """Qwen/Qwen2.5-7B-Instruct-AWQ is 7 of the line Qwen/Qwen2.5--Instruct."""
    family = _family(name)
    match = _SIZE.search(family)
    if match is None:
        return family, 0.0
    billions = float(match[1].replace("_", ".")) * (1000 if match[2] == "T" else 1)
    return _SIZE.sub("", family, count=1), billions


def _family(name: str) -> str:
    return _QUANTIZED.sub("", name)


def _quantization_of(model: ModelConfig) -> str | None:
    if model.quantization is None:
        return None
    method = str(model.quantization.get("quant_method", "")).lower()
    return f"gptq-int{model.quantization.get('bits', 4)}" if method == "gptq" else method


def _key(name: str) -> str:
    return name.strip().lower().removeprefix("qwen/").replace("_", ".").replace(" ", "-")
