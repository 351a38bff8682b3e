"""From what a user calls a model to the name that a hub knows, without asking one; and the nearest names where it is none.

Ollama's names (qwen3:8b), names without their owner (Qwen3-8B) and a hub page's address become owner/name or
owner/name:QUANT. What is known not to be served is said to be so before anything is fetched.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from fastqwen.errors import BadConfig, ModelNotFound, Unsupported
from fastqwen.plan.catalog import Entry, catalog, published

DEMO = "demo"
OWNER = "Qwen"
_HUB_NAME = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*?)(:(?P<choice>[\w.-]+))?")
_NAME = re.compile(r"(?:(\w[\w.-]*)/)?(\w[\w.-]*)(?::([\w.-]+))?")
_FILE_OF_HUB = re.compile(
    r"(\w[\w.-]*/\w[\w.-]*)/(?:[\w.-]+/)?([\w.-]+\.gguf)"
)  # owner/name/FILE.gguf, perhaps in a folder
_QUANT = re.compile(r"(?:^|[-.])(i?q\d\w*|fp16|bf16|f16|f32)$", re.I)
_IN_FULL = re.compile(r"Q\w+[\w.]*-.*(?:Embedding-|Reranker-|GGUF$).*")  # of kinds that the catalogue does not list
_UNQUANTIZED = ("FP16", "F16", "BF16", "F32")
_ADDRESS = re.compile(
    r"(?:(?:https?|hf)://|(?:www\.)?(?:huggingface\.co|hf\.co|hf-mirror\.com|modelscope\.cn|ollama\.com|registry\.ollama\.ai)/)"
)
_HOST_AND_PORT = re.compile(r"(?:[\w.-]+|\[[0-9a-f:.]+\]):\d{2,5}(?:/v1)?/?", re.I)  # Ollama's tags end in a letter
_OLLAMA = ("ollama.com", "registry.ollama.ai")
_HUBS = ("huggingface.co", "hf.co", "hf-mirror.com", "modelscope.cn")
_FAMILY_OF_OLLAMA = {"qwen": "qwen1.5", "codeqwen": "codeqwen1.5"}  # whose names leave the generation out
_OTHER_KINDS = (  # Qwen's models that read or make something else than text, by a word of their names
    (re.compile(r"(?:[-.\d]vl|^qvq)(?![a-z])", re.I), "reads images"),
    (re.compile(r"-(?:audio|asr)(?![a-z])", re.I), "listens"),
    (re.compile(r"-tts(?![a-z])", re.I), "speaks"),
    (re.compile(r"-omni(?![a-z])", re.I), "reads images and listens"),
    (re.compile(r"-image(?![a-z])", re.I), "makes images"),
)
MAX_NEAREST = 3
NEAR = 0.6  # difflib's share of equal characters, below which a name is another one


def known_name(text: str) -> str:
    """``text`` itself if it is the demo or lies on this machine, else owner/name or owner/name:QUANT.

    Raises ModelNotFound, with the nearest names, and Unsupported for a model that is known and not served.
    """
    if "\0" in text:
        raise BadConfig("the model's name contains a NUL character")
    if not text.strip():
        raise ModelNotFound("the model's name is empty")
    if text == DEMO or is_here(text):
        return text
    if hub_address(text) or text.startswith(("http://", "https://")):
        return known_name(_of_address(text))
    if file := _FILE_OF_HUB.fullmatch(text):
        return f"{file[1]}:{file[2]}"
    if _looks_like_a_path(text):
        raise ModelNotFound(_missing(text))
    match = _NAME.fullmatch(text)
    if match is None or ".." in text:
        raise ModelNotFound(f"{text!r} is neither a folder or .gguf file nor a name like Qwen/Qwen3-8B")
    owner, name, tag = match.groups()
    if owner is not None and owner.lower() not in ("qwen", "library"):
        return text
    return _of_qwen(text, name, tag, owned=owner is not None)


def is_here(text: str) -> bool:
    try:
        return Path(text).expanduser().exists()
    except (OSError, RuntimeError):  # longer than a file's name can be; ~ of a user who is not there
        return False


def is_hub_name(text: str) -> bool:
    return _HUB_NAME.fullmatch(text) is not None and ".." not in text


def split_hub_name(text: str) -> tuple[str, str | None]:
    """owner/name:Q4_K_M to the repository and which of its GGUF files."""
    found = _HUB_NAME.fullmatch(text)
    assert found is not None
    return found["repository"], None if found["choice"] == "latest" else found["choice"]


def hub_address(text: str) -> bool:
    """Whether it is the address of a model's page on a hub, and so not that of a server to talk to."""
    if not _ADDRESS.match(text):
        return False
    return text.startswith("hf://") or _host(text) in (*_HUBS, *_OLLAMA)


def server_address(text: str) -> str | None:
    """The address of a server that is meant by it, None where a model is: localhost:8000 and gpu1:8000 are addresses."""
    if hub_address(text):
        return None
    if text.startswith(("http://", "https://")):
        return text
    if text == "localhost":
        return "http://localhost:8000"
    return f"http://{text}" if _HOST_AND_PORT.fullmatch(text) and not is_here(text) else None


def nearest(text: str) -> list[str]:
    """Published names that are spelled like this one, the nearest first: before all, those of which it is a longer form."""
    wanted, keys = _key(text), {_key(entry.name): entry.name for entry in catalog().models}
    shorter = sorted((key for key in keys if wanted.startswith(f"{key}-")), key=len, reverse=True)
    similar = difflib.get_close_matches(wanted, keys, MAX_NEAREST, NEAR)
    itself = [wanted] if wanted in keys else []
    return [keys[key] for key in dict.fromkeys([*itself, *shorter, *similar])][:MAX_NEAREST]


def advice(text: str) -> str:
    """What to add to an error about a name of Qwen's that nobody has published; empty for all others."""
    if not text.lower().startswith("qwen/") or catalog().find(text) is not None:
        return ""
    names = nearest(text.partition(":")[0])
    return f"; the nearest names are {', '.join(names)}" if names else ""


def _of_qwen(text: str, name: str, tag: str | None, *, owned: bool) -> str:
    if tag is None or tag == "latest":
        entry = _served(name)
        if entry is not None:
            return entry.name
        _check_kind(text, name)
        if owned or _IN_FULL.fullmatch(name):
            return f"{OWNER}/{name}"  # the catalogue need not know all; the hub decides
        sizes = _sizes_of(name)
        if len(sizes) == 1:
            return sizes[0]
        raise ModelNotFound(_unknown(text, name))
    quant = _QUANT.search(tag)
    size = tag[: quant.start()] if quant else tag
    entry = _sized(name, size) if size else _served(name)
    if entry is None:
        _check_kind(text, name)
    if entry is None and owned:
        return f"{OWNER}/{name}:{tag}"
    if entry is None:
        raise ModelNotFound(_unknown(text, f"{name}-{size}"))
    if quant is None or quant[1].upper() in _UNQUANTIZED:
        return entry.name
    return f"{entry.name}-GGUF:{quant[1].upper()}"


def _check_kind(text: str, name: str) -> None:
    for pattern, does in _OTHER_KINDS:
        if pattern.search(name):
            raise Unsupported(f"{text} {does}: fastqwen serves models that read and write text")


def _served(name: str) -> Entry | None:
    """Raises Unsupported for what is known and not served, and for its variants (Qwen3.8-Flash-Next-FP8)."""
    entry = published(name)
    if entry is None:
        for later in catalog().not_served:
            if _key(name).startswith(f"{_key(later.name)}-"):
                published(later.name)
    return entry


def _sized(family: str, size: str) -> Entry | None:
    """qwen2.5:7b is the version that chats, and 30b stands for 30B-A3B."""
    family = _FAMILY_OF_OLLAMA.get(family.lower(), family)
    bare = size.removesuffix("-base")
    endings = ("-instruct", "-chat", "") if bare == size else ("-base", "")
    for ending in endings:
        pattern = re.compile(rf"{re.escape(_key(f'{family}-{bare}'))}(?:-a[\d.]+b)?{ending}")
        for entry in catalog().models:
            if pattern.fullmatch(_key(entry.name)):
                return entry
    return _served(f"{family}-{size}")


def _unknown(text: str, name: str) -> str:
    sizes = _sizes_of(name)
    if sizes:
        return f"{text} is a family of models, so name one of them ({', '.join(sizes)}): `fastqwen plan` says which run here"
    names = nearest(name)
    found = f"the nearest names are {', '.join(names)}" if names else "`fastqwen plan` lists Qwen's by name"
    return (
        f"there is no folder, .gguf file or published Qwen model {text!r}: {found}; others have a hub name, OWNER/NAME"
    )


def _sizes_of(name: str) -> list[str]:
    family = _FAMILY_OF_OLLAMA.get(name.lower(), name)
    return [entry.name for entry in catalog().models if _is_size_of(entry, family)]


def _is_size_of(entry: Entry, family: str) -> bool:
    sized = re.fullmatch(
        rf"{re.escape(_key(family))}-(?:moe-a)?[\d.]+b(?:-a[\d.]+b)?(-instruct|-chat)?", _key(entry.name)
    )
    if sized is None or entry.quantization is not None:
        return False
    chats = any(catalog().find(f"{entry.name}-{word}") for word in ("Instruct", "Chat"))
    return sized[1] is not None or not chats


def _of_address(text: str) -> str:
    """The name that a hub page's address stands for. Raises ModelNotFound for other addresses."""
    if text.startswith("hf://"):
        return text.removeprefix("hf://")
    host = _host(text)
    parts = [part for part in urlsplit(text if "://" in text else f"https://{text}").path.split("/") if part]
    if host in _OLLAMA:
        return "/".join(parts[1:] if parts[:1] == ["library"] else parts) or text
    if host == "modelscope.cn" and parts[:1] == ["models"]:
        parts = parts[1:]
    if host not in _HUBS or len(parts) < 2 or parts[0] in ("datasets", "spaces"):
        raise ModelNotFound(
            f"{text} is no model's address on a hub; to talk to a server there: fastqwen chat {text}, "
            f"or fastqwen web --api {text}"
        )
    name, rest = "/".join(parts[:2]), parts[2:]
    revision = rest[1] if len(rest) > 1 and rest[0] in ("tree", "blob", "resolve") else "main"
    if revision not in ("main", "master"):
        raise ModelNotFound(f"{text} names the revision {revision}: give {name} --revision {revision}")
    shown = parse_qs(urlsplit(text).query).get("show_file_info", [""])[0]
    file = next((one for one in (shown, rest[-1] if rest else "") if one.endswith(".gguf")), "")
    quant = _QUANT.search(
        file.removesuffix(".gguf") if file else (rest[-1] if len(rest) > 2 and rest[0] == "tree" else "")
    )
    return f"{name}:{quant[1].upper() if quant else file}" if quant or file else name


def _host(text: str) -> str:
    """Raises ModelNotFound for what is no address at all."""
    try:
        found = urlsplit(text if "://" in text else f"https://{text}").hostname or ""
    except ValueError as error:
        raise ModelNotFound(f"{text} is no address: {error}") from None
    return found.removeprefix("www.")


def _looks_like_a_path(text: str) -> bool:
    if text.startswith((".", "/", "~", "\\")) or text.count("/") > 1 or "\\" in text:
        return True
    return text.endswith(".gguf") and not (is_hub_name(text) and ":" in text)  # owner/name:FILE.gguf is on the hub


def _missing(text: str) -> str:
    path = Path(text) if text.startswith("~") else Path(text).absolute()
    try:
        beside = [one.name for one in path.expanduser().parent.iterdir()]
    except (OSError, RuntimeError):
        return f"there is no folder or .gguf file {text}, and no folder {path.parent}"
    close = difflib.get_close_matches(path.name, beside, MAX_NEAREST, NEAR)
    found = f"there is {', '.join(sorted(close))}" if close else "and nothing there has a name like it"
    return f"there is no folder or .gguf file {text}: {path.parent} holds no {path.name}, {found}"


def _key(name: str) -> str:
    return name.strip().lower().removeprefix("qwen/").replace("_", ".").replace(" ", "-")
