"""Where fastqwen keeps what it can make or fetch again, and what it remembers."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from fastqwen.errors import BadCheckpoint, BadConfig

PRIVATE_FOLDER, PRIVATE_FILE = 0o700, 0o600
WRITE_OF_OTHERS = 0o022


def cache_dir() -> Path:
    """$FASTQWEN_CACHE, or fastqwen/ in the user's cache folder. Made if it is not there; raises BadConfig where it cannot be."""
    return _folder("FASTQWEN_CACHE", "XDG_CACHE_HOME", ".cache")


def state_dir() -> Path:
    """$FASTQWEN_STATE, or fastqwen/ in the user's folder for what programs remember. Made if it is not there."""
    return _folder("FASTQWEN_STATE", "XDG_STATE_HOME", ".local/state")


def _folder(own_variable: str, users_variable: str, usual: str) -> Path:
    own = os.environ.get(own_variable)
    folder = Path(own) if own else Path(os.environ.get(users_variable) or Path.home() / usual) / "fastqwen"
    try:
        return private_folder(folder)
    except OSError as error:
        raise BadConfig(
            f"{folder} cannot be made ({error.strerror}): set {own_variable} to a folder that can be written"
        ) from None


def private_folder(folder: Path) -> Path:
    """Made if it is not there, whatever the umask for this user alone: what lies here is loaded again."""
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid == os.getuid() and (made or found.st_mode & WRITE_OF_OTHERS):
        folder.chmod(PRIVATE_FOLDER if made else stat.S_IMODE(found.st_mode) & ~WRITE_OF_OTHERS)
    return folder


def is_trusted(file: Path) -> bool:
    """Whether nobody but this user, or the machine's own administrator, can have written the file."""
    return all(
        found.st_uid in (os.getuid(), 0) and not found.st_mode & WRITE_OF_OTHERS
        for found in (file.stat(), file.parent.stat())
    )


def check_regular(path: Path) -> None:
    """Raises BadCheckpoint for a pipe, a device or a socket at ``path`` or, where that is a folder, in it: reading such a
    file may never end. A link is what it leads to."""
    for one in [path, *(path.iterdir() if path.is_dir() else ())]:
        try:
            mode = one.stat().st_mode
        except OSError:
            continue  # a link to nothing: whoever needs the file says so
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise BadCheckpoint(f"{one} is {_KINDS.get(stat.S_IFMT(mode), 'a special file')}, not a regular file")


_KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket"}
