"""What a file is that cannot be read as what its name says, in words that tell people what to do. Needs no torch."""

from __future__ import annotations

from pathlib import Path

from fastqwen.errors import BadCheckpoint, FastqwenError, ModelNotFound, Unsupported
from fastqwen.model_config import read_json
from fastqwen.text_files import what_instead

PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def not_weights(path: Path) -> BadCheckpoint | None:
    """For a file that is something else entirely."""
    what = what_instead(path)
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
    ggufs = gguf_names(folder)
    if ggufs:
        return ModelNotFound(
            f"{folder} holds no .safetensors files, but {_some(ggufs)}: give that file itself, {folder / ggufs[0]}"
        )
    pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
    if pickled:
        return Unsupported(
            f"{folder / pickled[0]}: weights in this format can run code when loaded, so they are refused; "
            "get the safetensors version, or convert it with `transformers` on a machine where you trust the file"
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        return ModelNotFound(f"{folder} holds no model's weights, only {_some(others)}")
    return ModelNotFound(f"{folder} holds no .safetensors files")


def gguf_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix.lower() == ".gguf")


def check_folder(folder: Path) -> None:
    """Raises, saying what it is, for a folder without a config.json."""
    if (folder / "config.json").is_file():
        return
    if (adapter := folder / "adapter_config.json").is_file():
        base = read_json(adapter).get("base_model_name_or_path")
        of = f" of {str(base)[:200]}" if base else ""
        raise Unsupported(
            f"{folder} holds an adapter (LoRA){of}, not a model: merge it into its base model, and give that"
        )
    ggufs = gguf_names(folder) if folder.is_dir() else []
    hint = f": give the file itself, for example {folder / ggufs[0]}" if ggufs else ""
    raise ModelNotFound(f"{folder} holds no config.json{hint}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
