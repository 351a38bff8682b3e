"""What a checkpoint's files are by their first bytes, small ones as any editor writes them, and what a failed download left
in a file's place."""

from __future__ import annotations

from pathlib import Path

from fastqwen.errors import BadCheckpoint

GGUF = b"GGUF"
LFS = b"version https://git-lfs.github.com/spec/"
XET = b"# xet version"
PAGES = (b"<!doctype html", b"<html", b"<?xml", b"<head")
# What hubs answer instead of a file, and `curl` without --fail or `wget -O` saves under its name.
ERRORS = (
    b"entry not found", b"repository not found", b"revision not found", b"invalid username or password", b"not found",
    b"access to model ", b"invalid credentials", b"unauthorized", b"forbidden", b"access denied", b"bad gateway",
    b"error code: ", b"too many requests",
)  # fmt: skip
# Files of another kind under this one's name, by what they begin with.
OTHERS = {
    b"PK\x03\x04": "is a zip archive, as torch.save writes pickled weights: those can run code when loaded, so they are refused; "
    "get the safetensors or GGUF version",
    b"\x80\x02": "holds pickled weights, which can run code when loaded, so they are refused; get the safetensors or GGUF version",
    b"\x1f\x8b": "is packed with gzip: unpack it first",
    GGUF: "is a GGUF file: give that file itself, not its folder",
}
HEAD_BYTES = 512
MAX_SMALL_BYTES = 2**28


def what_instead(path: Path) -> str | None:
    """What a file is that a download left instead of what its name says, and what to do; None: nothing of that kind."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError:
        return None
    return what_head_is(head)


def is_gguf(path: Path) -> bool:
    """Whether a file says of itself that it is GGUF, whatever it is called: Ollama's are named by their digest."""
    try:
        with path.open("rb") as file:
            return file.read(len(GGUF)) == GGUF
    except OSError:
        return False


def what_head_is(head: bytes) -> str | None:
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(LFS):
        return (
            "is a Git LFS pointer, not the file itself: run `git lfs pull` in this folder, or download the file again"
        )
    if text.startswith(XET):
        return "is a Xet pointer, not the file itself: download the file again"
    if text.lower().startswith(PAGES):
        return "is a web page (HTML), not the file itself: the download got an error or a login page; download it again"
    if len(head) < HEAD_BYTES and text.lower().startswith(ERRORS):
        said = text[:60].decode(errors="replace").splitlines()[0]
        return f"holds an error of the hub ({said!r}), not the file itself: download it again"
    if head and not head.strip(b"\0"):
        return "begins with nothing but zeros: the download did not come through; download it again"
    other = next((what for start, what in OTHERS.items() if head.startswith(start)), None)
    if other is not None:
        return other
    if not head:
        return "is empty: the download did not come through; download it again"
    return None


def is_safetensors(head: bytes) -> bool:
    """Whether a file's first bytes are a header's length and the header, an object of JSON."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**27


def decoded(data: bytes) -> str:
    """UTF-8, with or without a byte order mark, or UTF-16 with one, as Windows editors save. Raises ValueError."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16")
    return data.decode("utf-8-sig")


def read_bytes(path: Path) -> bytes:
    """Of a small file. Raises BadCheckpoint, naming it."""
    try:
        with path.open("rb") as file:
            found = file.read(MAX_SMALL_BYTES + 1)
    except OSError as error:
        raise BadCheckpoint(f"{path} cannot be read: {error.strerror}") from None
    if len(found) > MAX_SMALL_BYTES:
        raise BadCheckpoint(f"{path} is larger than {MAX_SMALL_BYTES} bytes, which no such file is")
    return found


def read_text(path: Path) -> str:
    """Lines end with \\n. Raises BadCheckpoint, naming the file."""
    data = read_bytes(path)
    what = what_head_is(data[:HEAD_BYTES]) if data else None
    if what is not None:
        raise BadCheckpoint(f"{path} {what}")
    try:
        return decoded(data).replace("\r\n", "\n").replace("\r", "\n")
    except ValueError:
        raise BadCheckpoint(f"{path} is not a text in UTF-8") from None
