"""The cluster's token: who has it is a part of the cluster, who has not cannot even begin to talk.

Every connection is encrypted by CurveZMQ. Its server's key is made from the token, so a client that does not know the token
does not know whom to encrypt for, and a server that does not know it cannot read what comes. The token itself is never sent.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path

import zmq
import zmq.asyncio
from zmq.utils import z85

from fastqwen.errors import BadConfig
from fastqwen.paths import PRIVATE_FILE, is_trusted, state_dir

VARIABLE = "FASTQWEN_CLUSTER_TOKEN"
MIN_CHARS = 16
FILE_NAME = "cluster-token"


def own_file() -> Path:
    """Where the controller of this user and machine leaves the token that it made."""
    return state_dir() / FILE_NAME


def read_token(file: Path | None, *, make: bool = False) -> str:
    """From the file, else the environment, else this user's own file, which ``make`` makes. Raises BadConfig."""
    if file is None and os.environ.get(VARIABLE):
        return _checked(os.environ[VARIABLE], VARIABLE)
    place = file or own_file()
    if file is None and not place.exists():
        if not make:
            raise BadConfig(
                f"no cluster token: set {VARIABLE} or --token-file to the controller's, which is in {place} on its machine"
            )
        _write(place, secrets.token_urlsafe(32))
    try:
        text = place.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise BadConfig(f"--token-file {place} cannot be read: {error}") from None
    if file is None and not is_trusted(place):
        raise BadConfig(f"{place} can be written by others: remove it, or give --token-file")
    return _checked(text, str(place))


def _write(place: Path, token: str) -> None:
    with open(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE_FILE), "w", encoding="utf-8") as file:
        file.write(token + "\n")


def _checked(text: str, where: str) -> str:
    token = text.strip()
    if len(token) < MIN_CHARS:
        raise BadConfig(f"the cluster token of {where} has {len(token)} characters, at least {MIN_CHARS} are needed")
    return token


def secure_server(socket: zmq.asyncio.Socket, token: str) -> None:
    """Before it is bound."""
    socket.curve_server = True
    socket.curve_secretkey = _server_secret(token)


def secure_client(socket: zmq.asyncio.Socket, token: str) -> None:
    """Before it is connected."""
    socket.curve_serverkey = zmq.curve_public(_server_secret(token))
    socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()


def ray_token(token: str) -> str:
    """The token of the cluster's Ray, from which nobody learns the cluster's own."""
    return hashlib.blake2b(token.encode(), digest_size=32, person=b"fastqwen-ray").hexdigest()


def _server_secret(token: str) -> bytes:
    digest = hashlib.blake2b(token.encode(), digest_size=32, person=b"fastqwen-cluster").digest()
    return bytes(z85.encode(digest))
