"""What a file is that cannot be read as what its name says, in words that tell people what to do. Needs no torch."""

from __future__ import annotations

import os
from pathlib import Path

from fastqwen.errors import BadCheckpoint, FastqwenError, ModelNotFound, Unsupported
from fastqwen.model_config import read_json
from fastqwen.text_files import what_instead

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
OF_OTHERS = (".h5", ".msgpack", ".onnx", ".npz", ".tflite", ".mlpackage", ".nemo")  # TensorFlow's, Flax's and so on
UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".download", ".aria2", ".!ut")
HALF = ".aria2"  # stands beside a file of full length that has holes until it is gone
SAFETENSORS = ".safetensors"
ADAPTER = "adapter_config.json"
OF_OTHER_PROGRAMS = {
    "model_index.json": "a pipeline of diffusers, which makes images",
    "params.json": "weights in their publisher's own layout",
    "Modelfile": "a recipe of Ollama's, which names a GGUF file",
    "genai_config.json": "a model of ONNX Runtime",
    "mlc-chat-config.json": "a model that MLC compiled",
    "openvino_model.xml": "a model of OpenVINO",
}


def visible(folder: Path, *endings: str) -> list[str]:
    """Names of a folder's files with these endings. macOS puts a file ._NAME beside each on other file systems."""
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    return [name for name in names if name.endswith(endings)]


def check_finished(path: Path) -> None:
    if path.with_name(path.name + HALF).is_file():
        raise BadCheckpoint(
            f"{path} is an unfinished download, for {path.name}{HALF} is there: let aria2 finish it, or fetch this file again"
        )


def not_weights(path: Path) -> BadCheckpoint | None:
    """For a file that is something else entirely."""
    if path.is_symlink() and not path.exists():
        return BadCheckpoint(f"{path} is a link to {os.readlink(path)}, which is not there; fetch this file again")
    if path.exists() and not os.access(path, os.R_OK):
        return BadCheckpoint(f"{path} cannot be read: this user has no permission")
    what = "is a folder, not a file" if path.is_dir() else what_instead(path)
    return None if what is None else BadCheckpoint(f"{path} {what}")


def damaged(path: Path, error: Exception) -> BadCheckpoint:
    text = str(error)[:300]
    if path.is_file() and path.stat().st_size == 0:
        return BadCheckpoint(f"{path} is empty: the download did not come through; fetch this file again")
    if (
        "incomplete" in text
        or "IncompleteBuffer" in text
        or "header too" in text.lower()
        or "MetadataIncomplete" in text
    ):
        return BadCheckpoint(f"{path} is damaged or an incomplete download ({text}); fetch this file again")
    return BadCheckpoint(f"{path} is damaged: {text}")


def no_weights(folder: Path) -> FastqwenError:
    """For a folder without a model's safetensors: what it holds instead, and what to do with that."""
    if (folder / ADAPTER).is_file():
        return _adapter(folder)
    ggufs = gguf_names(folder)
    if ggufs:
        return ModelNotFound(
            f"{folder} holds no .safetensors files, but {_some(ggufs)}: give that file itself, {folder / ggufs[0]}"
        )
    unfinished = visible(folder, *(SAFETENSORS + ending for ending in UNFINISHED))
    if unfinished:
        return BadCheckpoint(f"{folder / unfinished[0]} is an unfinished download: fetch this file again")
    pickled = visible(folder, *PICKLED)
    if pickled:
        return Unsupported(
            f"{folder / pickled[0]}: weights in this format can run code when loaded, so they are refused; "
            "get the safetensors version, or convert it with `transformers` on a machine where you trust the file"
        )
    return _something_else(folder)


def _something_else(folder: Path) -> FastqwenError:
    others = visible(folder, SAFETENSORS)
    if others:
        return ModelNotFound(f"{folder} holds no model's weights, only {_some(others)}")
    odd = [name for name in visible(folder, "") if name.lower().endswith(SAFETENSORS)]
    if odd:
        return ModelNotFound(f"{folder} holds {_some(odd)}, whose ending must be in small letters: rename it")
    foreign = visible(folder, *OF_OTHERS)
    if foreign:
        return Unsupported(
            f"{folder} holds no .safetensors files, but {_some(foreign)}, which is not read; get the safetensors version"
        )
    below = sorted({path.parent.name for path in folder.glob("*/*.safetensors")})
    hint = f"; {_some(below)} below it does: give that folder" if below else ""
    return ModelNotFound(f"{folder} holds no .safetensors files{hint}")


def gguf_names(folder: Path) -> list[str]:
    return [name for name in visible(folder, "") if name.lower().endswith(".gguf")]


def check_folder(folder: Path) -> None:
    """Raises, saying what it is, for a folder without a config.json."""
    if (folder / "config.json").is_file():
        return
    if not folder.is_dir():
        raise ModelNotFound(f"{folder} is no folder")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise BadCheckpoint(f"{folder} cannot be read: this user has no permission")
    if (folder / ADAPTER).is_file():
        raise _adapter(folder)
    if ggufs := gguf_names(folder):
        raise ModelNotFound(f"{folder} holds no config.json: give the file itself, for example {folder / ggufs[0]}")
    for file, what in OF_OTHER_PROGRAMS.items():
        if (folder / file).is_file():
            raise Unsupported(
                f"{folder} holds {what} ({file}), and no config.json: get the version that transformers reads"
            )
    below = [path.parent for pattern in ("*/config.json", "*/*/config.json") for path in sorted(folder.glob(pattern))]
    hint = f", but {below[0]} does: give that folder" if below else ""
    raise ModelNotFound(f"{folder} holds no config.json{hint}")


def _adapter(folder: Path) -> FastqwenError:
    base = read_json(folder / ADAPTER).get("base_model_name_or_path")
    of = f" of {str(base)[:200]}" if base else ""
    return Unsupported(
        f"{folder} holds an adapter (LoRA){of}, not a model: merge it into its base model, and give that"
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
