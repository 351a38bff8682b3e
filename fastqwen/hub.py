"""From what the user calls a model to files on this machine: the demo, a folder, a .gguf file, or a hub name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from fastqwen import quant
from fastqwen.config import EngineConfig
from fastqwen.demo import demo_path
from fastqwen.errors import BadConfig, FastqwenError, ModelNotFound
from fastqwen.model_config import ModelConfig, read_json
from fastqwen.models import parse_config
from fastqwen.names import DEMO, advice, is_hub_name, known_name, split_hub_name
from fastqwen.paths import check_regular
from fastqwen.plan.catalog import published
from fastqwen.text_files import is_gguf, what_instead
from fastqwen.weights.checkpoint import open_checkpoint

# Pickled weights and a checkpoint's code are never fetched: nothing here would run them.
WANTED_FILES = ["*.safetensors", "*.json", "*.jinja", "*.tiktoken", "merges.txt", "vocab.txt"]
TEMPLATES_FOLDER = "additional_chat_templates/"
NO_MODELS = ("mmproj", "imatrix")  # GGUF files beside a model's: what sees, and what a quantization was made with
LISTING_S = 10.0  # a hub may take to say which files there are
_OTHER_WORD = {"f16": "fp16", "fp16": "f16"}
_SHARD = re.compile(r"-(\d{5})-of-\d{5}(?=\.)")


def resolve(model: str, *, revision: str | None = None, weights: bool = True, folder: str | None = None) -> Path:
    """The folder or .gguf file of a model, fetched if need be. ``weights=False`` leaves the large files out; ``folder`` is
    where they are kept, in place of the hub's cache.

    Raises ModelNotFound, saying what to do, and BadCheckpoint if the demo's file is not the expected one.
    """
    model = known_name(model)
    path = Path(model).expanduser()
    if path.exists() and not path.is_file():
        check_regular(path)
    if path.is_dir() or (path.is_file() and (path.suffix.lower() == ".gguf" or is_gguf(path))):
        return path
    if path.is_file():
        what = what_instead(path) or "is a file, but not a GGUF file: give the folder that holds config.json"
        if path.suffix == ".safetensors":
            what = "is one of a model's files: give the folder that holds it and config.json"
        raise ModelNotFound(f"{model} {what}")
    if model == DEMO:
        return demo_path()
    if not is_hub_name(model):
        raise ModelNotFound(f"{model!r} is not a hub name like Qwen/Qwen3-0.6B")
    repository, choice = split_hub_name(model)
    if use_modelscope():
        return _from_modelscope(repository, choice, revision, weights, folder)
    return _from_hugging_face(repository, choice, revision, weights, folder)


def find_checkpoint(config: EngineConfig) -> tuple[Path, ModelConfig]:
    """Where the configured model lies, fetched if need be, and what it says of itself. Raises as ``resolve`` does."""
    path = resolve(
        config.model, revision=config.revision, weights=config.load_format != "dummy", folder=config.download_dir
    )
    return path, open_checkpoint(path, with_tensors=False, overrides=config.overrides).model


def use_modelscope() -> bool:
    """Whether an environment variable, fastqwen's or the one that Qwen's guides name, asks for ModelScope."""
    return any(
        os.environ.get(name, "").lower() in ("1", "true", "yes")
        for name in ("FASTQWEN_USE_MODELSCOPE", "VLLM_USE_MODELSCOPE")
    )


def _from_hugging_face(
    repository: str, choice: str | None, revision: str | None, weights: bool, cache: str | None
) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download

    with _hub_errors(repository, revision, choice):
        names = _listed(repository, revision)
        if choice is None and (names is None or _has_weights(names)):
            if weights and published(repository) is None:
                _check_served(repository, revision, cache)
            patterns = _wanted_files(weights) if names is None else _needed(names, weights)
            return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns, cache_dir=cache))
        if names is None:
            folder = Path(
                snapshot_download(
                    repository, revision=revision, allow_patterns=["*.gguf"], local_files_only=True, cache_dir=cache
                )
            )
            here = [str(path.relative_to(folder)) for path in folder.rglob("*.gguf")]
            return folder / choose_gguf(here, repository, choice)[0]
        wanted = choose_gguf(names, repository, choice)
        fetched = [Path(hf_hub_download(repository, name, revision=revision, cache_dir=cache)) for name in wanted]
        return fetched[0]


def _listed(repository: str, revision: str | None) -> list[str] | None:
    """The names of a repository's files; None where only the cache can say."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        # one question: list_repo_files asks again for half a minute where there is no network
        asked = HfApi().model_info(repository, revision=revision, timeout=LISTING_S)
        return [file.rfilename for file in asked.siblings or []]
    except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError):
        raise
    except Exception:  # no network, or a mirror that does not list
        return None


def _has_weights(names: list[str]) -> bool:
    """Whether a repository is a folder that can be served, or at least no collection of GGUF files."""
    return any(name.endswith(".safetensors") for name in names) or not any(
        name.lower().endswith(".gguf") for name in names
    )


def _needed(names: list[str], weights: bool) -> list[str]:
    """Of a repository's files those that a model is loaded from: not what lies in folders, nor the weights a second time."""
    own = [name for name in names if "/" not in name or name.startswith(TEMPLATES_FOLDER)]
    small = [name for name in own if any(fnmatch(name, pattern) for pattern in _wanted_files(weights=False))]
    files = [name for name in own if name.endswith(".safetensors")] if weights else []
    shards = [name for name in files if _SHARD.search(name)]
    if "model.safetensors" in files:
        files = ["model.safetensors"]
    elif "model.safetensors.index.json" in names and shards:
        files = [name for name in shards if name.startswith("model-")] or shards
    return [*small, *files]


def choose_gguf(names: list[str], repository: str, choice: str | None) -> list[str]:
    """The file, or the parts of the file, that ``choice`` (Q4_K_M, or a file's name) means. Raises ModelNotFound, with
    those that there are, where that is not one."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        if name.lower().endswith(".gguf") and not Path(name).name.lower().startswith(NO_MODELS):
            found.setdefault(_SHARD.sub("", name), []).append(name)
    wanted = list(found)
    if choice is not None:
        words = [choice, _OTHER_WORD.get(choice.lower(), choice)]
        wanted = next((some for word in words if (some := _called(list(found), word))), [])
    if len(wanted) == 1:
        return found[wanted[0]]
    what = f"no GGUF file {choice!r}" if choice and not wanted else "several GGUF files"
    if not found:
        raise ModelNotFound(f"{repository} holds no GGUF files; without {choice!r} behind the colon it is a folder")
    words = [_quantization(one).upper() for one in wanted or found]
    if len(set(words)) < len(words):  # of several models
        words = [Path(one).stem for one in wanted or found]
    raise ModelNotFound(
        f"{repository} holds {what}; choose one: " + ", ".join(f"{repository}:{word}" for word in sorted(words)[:40])
    )


def _called(files: list[str], choice: str) -> list[str]:
    """Those of ``files``, names without the number of a part, that are called so: in full, by their quantization, or by
    words that stand in their names."""
    word = _SHARD.sub("", choice).lower()
    named = [one for one in files if word in (one.lower(), Path(one).name.lower(), Path(one).stem.lower())]
    named = named or [one for one in files if _quantization(one) == word]
    return named or [one for one in files if re.search(rf"(^|[-._/]){re.escape(word)}($|[-._/])", one.lower())]


def _quantization(name: str) -> str:
    """q4_k_m of Qwen3-0.6B-Q4_K_M.gguf and of Q4_K_M/part.gguf, ud-q4_k_xl of X-UD-Q4_K_XL.gguf; else the file's name."""
    path = Path(name.lower())
    for word in (path.stem, path.parent.name):
        found = re.search(r"(?:^|[-._])((?:ud-)?(?:i?q\d\w*|tq\d\w*|bf16|f16|fp16|f32|mxfp4\w*))$", word)
        if found is not None:
            return found[1]
    return path.stem


def _check_served(model: str, revision: str | None, cache: str | None) -> None:
    """Raises Unsupported for an architecture that is not served, or weights that are packed in a way that is not read, before
    gigabytes of them are fetched."""
    file = _config_file(model, revision, cache)
    if file is not None:
        source = f"{model}: config.json"
        quant.find(parse_config(read_json(file), source).quantization, source)


def config_from_hub(model: str) -> dict[str, Any]:
    """Only config.json, from the cache or the hub. Raises ModelNotFound, saying what to do."""
    file = _config_file(model, None, None)
    if file is None:
        raise ModelNotFound(f"{model} holds no config.json, which says what sizes it has")
    return read_json(file)


def _config_file(model: str, revision: str | None, cache: str | None) -> Path | None:
    """None: the repository has none, as those that hold only .gguf files."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with _hub_errors(model, revision):
        try:
            return Path(hf_hub_download(model, "config.json", revision=revision, cache_dir=cache))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            return None


@contextmanager
def _hub_errors(model: str, revision: str | None = None, choice: str | None = None) -> Iterator[None]:
    """What the hub's client raises as ModelNotFound that says what to do."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    what = model if choice is None else f"the GGUF file {choice} from {model}"
    try:
        yield
    except FastqwenError:
        raise
    except GatedRepoError:
        raise ModelNotFound(f"{model} asks for an account: accept its terms on the hub and set HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise ModelNotFound(
            f"there is no model {model!r} on the hub (a private one needs HF_TOKEN){advice(model)}"
        ) from None
    except RevisionNotFoundError:
        raise ModelNotFound(f"{model} has no revision {revision!r}") from None
    except Exception as error:  # the client raises its own errors and those of whichever HTTP library it uses
        raise ModelNotFound(
            f"{what} is not in the cache and cannot be fetched from the hub ({_first_line(error)}): check the network, "
            f"HF_ENDPOINT and HF_HUB_OFFLINE, or give a local folder; `demo` is a model that needs no hub{advice(model)}"
        ) from None


def _wanted_files(weights: bool) -> list[str]:
    return [pattern for pattern in WANTED_FILES if weights or pattern != "*.safetensors"]


def _from_modelscope(
    repository: str, choice: str | None, revision: str | None, weights: bool, cache: str | None
) -> Path:
    try:
        from modelscope import snapshot_download
    except ImportError:
        raise BadConfig("ModelScope is asked for, but not installed: pip install 'fastqwen[modelscope]'") from None
    patterns = _wanted_files(weights) if choice is None else [f"*{choice}*"]
    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=patterns, cache_dir=cache))
    except Exception as error:  # modelscope raises many types; each means that the model is not there
        raise ModelNotFound(f"ModelScope could not give {repository}: {_first_line(error)}") from None
    if choice is None:
        return folder
    return (
        folder / choose_gguf([str(path.relative_to(folder)) for path in folder.rglob("*.gguf")], repository, choice)[0]
    )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
