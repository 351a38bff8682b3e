"""A model's small files on their way from a worker to a front end: tokenizer, template, stop tokens, default sampling.

So a front end needs neither the checkpoint nor a hub, only the token of its cluster. What comes out of a parcel is written to a
folder of this user alone, under names that cannot leave it.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import msgspec

from fastqwen.client.engine import Ready
from fastqwen.config import EngineConfig
from fastqwen.errors import BadCheckpoint
from fastqwen.hub import resolve
from fastqwen.text.load import generation_config_file
from fastqwen.text_files import read_text
from fastqwen.weights.gguf_file import without_tensors

SUFFIXES = (".json", ".txt", ".jinja", ".tiktoken")
NO_TEXT = ".safetensors.index.json"  # says only where tensors are
MAX_BYTES = 192 * 2**20
NAME = re.compile(r"(model|tokenizer|generation)(/[A-Za-z0-9_][A-Za-z0-9_.+-]{0,200}){1,2}")
MODEL, TOKENIZER, GENERATION = "model", "tokenizer", "generation"


def pack(config: EngineConfig, path: Path) -> tuple[EngineConfig, dict[str, bytes]]:
    """The files, and the config that goes with them: without a name of a file on this machine."""
    files = _small_files(MODEL, path)
    if config.tokenizer is not None:
        files |= _small_files(TOKENIZER, resolve(config.tokenizer, weights=False))
        config = msgspec.structs.replace(config, tokenizer=TOKENIZER)
    if config.chat_template is not None and "{" not in config.chat_template:
        config = msgspec.structs.replace(config, chat_template=read_text(Path(config.chat_template)))
    if config.generation_config not in ("auto", "none"):
        file = generation_config_file(Path(config.generation_config))
        files[f"{GENERATION}/{file.name}"] = file.read_bytes()
        config = msgspec.structs.replace(config, generation_config=GENERATION)
    num_bytes = sum(map(len, files.values()))
    if num_bytes > MAX_BYTES:
        raise BadCheckpoint(f"{path}: its text files have {num_bytes} bytes, more than {MAX_BYTES}")
    return config, files


def _small_files(folder: str, path: Path) -> dict[str, bytes]:
    if path.is_file():
        found = {f"{folder}/model.gguf": without_tensors(path)}
        beside = generation_config_file(path)
        return found | ({f"{folder}/{beside.name}": beside.read_bytes()} if beside.is_file() else {})
    files = [*path.glob("*"), *path.glob("*/*")]
    wanted = [one for one in files if one.suffix in SUFFIXES and not one.name.endswith(NO_TEXT) and one.is_file()]
    named = {f"{folder}/{one.relative_to(path).as_posix()}": one for one in sorted(wanted)}
    return {name: one.read_bytes() for name, one in named.items() if NAME.fullmatch(name)}


def identity_of(config: EngineConfig, ready: Ready, files: dict[str, bytes]) -> str:
    """What must be equal for one replica to go on where another stopped, as far as can be told without reading weights."""
    digest = hashlib.blake2b(digest_size=16)
    plan = ready.plan
    facts = (plan.dtype, plan.kv_cache_dtype, plan.max_model_len, plan.weights_bytes, config.rope_per_request)
    digest.update(msgspec.json.encode([facts, ready.model, config.chat_template, config.skip_tokenizer_init]))
    for name, data in sorted(files.items()):
        digest.update(f"{name}:{len(data)}:".encode() + data)
    return digest.hexdigest()


def unpack(config: EngineConfig, files: dict[str, bytes], folder: Path) -> tuple[EngineConfig, Path]:
    """Into the folder. Gives the config as it holds here, and the checkpoint's path. Raises BadCheckpoint."""
    for name, data in files.items():
        if not NAME.fullmatch(name):
            raise BadCheckpoint(f"a worker sent a file with the name {ascii(name)[:100]}")
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
    here = config
    for where in (MODEL, TOKENIZER, GENERATION):
        (folder / where).mkdir(exist_ok=True)
    if config.tokenizer is not None:
        here = msgspec.structs.replace(here, tokenizer=str(_checkpoint(folder / TOKENIZER)))
    if config.generation_config not in ("auto", "none"):
        here = msgspec.structs.replace(here, generation_config=str(folder / GENERATION))
    return here, _checkpoint(folder / MODEL)


def _checkpoint(folder: Path) -> Path:
    gguf = folder / "model.gguf"
    return gguf if gguf.is_file() else folder
