"""Qwen-1's tokenizer: a tiktoken file of 151,643 ranks, and 208 control tokens after them."""

from __future__ import annotations

import base64
import binascii
import unicodedata
from pathlib import Path

import tiktoken

from fastqwen.errors import BadCheckpoint
from fastqwen.text.tokenizer import QWEN_WORDS, Tokenizer

FILE_NAME = "qwen.tiktoken"
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]
MAX_FILE_BYTES = 64 * 2**20
MAX_CHARS = 500_000  # tiktoken fails on a run of a million spaces; 32,768 tokens of real text are far shorter


class QwenTiktoken(Tokenizer):
    """Text is normalised to NFC first, as the original does. Raises BadCheckpoint for a damaged file."""

    max_chars = MAX_CHARS

    def __init__(self, path: Path) -> None:
        ranks = read_ranks(path)
        first = len(ranks)
        self.control_tokens = {token: first + index for index, token in enumerate(CONTROL)}
        self._texts = {token_id: token.encode() for token, token_id in self.control_tokens.items()}
        self._inner = tiktoken.Encoding(
            "qwen", pat_str=QWEN_WORDS, mergeable_ranks=ranks, special_tokens=self.control_tokens
        )
        self._bytes = {rank: token for token, rank in ranks.items()}
        self.vocab_size = len(ranks) + len(CONTROL)

    def limit_length(self, max_model_len: int) -> None:
        super().limit_length(max_model_len)
        self.max_chars = min(self.max_chars, MAX_CHARS)

    def token_bytes(self, token_id: int) -> bytes:
        return self._bytes.get(token_id) or self._texts.get(token_id, b"")

    def token_id(self, token: str) -> int | None:
        return self.control_tokens.get(token)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._inner.encode(_nfc(text), allowed_special="all", disallowed_special=())
        return ids

    def encode_plain(self, text: str) -> list[int]:
        self.check(text)
        return self._guard(lambda: self._inner.encode(_nfc(text), allowed_special=set(), disallowed_special=()))


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def read_ranks(path: Path) -> dict[bytes, int]:
    """Lines of base64 token and rank; ranks must count up from 0."""
    if path.stat().st_size > MAX_FILE_BYTES:
        raise BadCheckpoint(f"{path} is larger than {MAX_FILE_BYTES} bytes, which no tokenizer file is")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines()):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise BadCheckpoint(f"{path}: line {number + 1} is not a token and its rank") from None
    if (
        len(ranks) < 256
        or set(ranks.values()) != set(range(len(ranks)))
        or not all(bytes([b]) in ranks for b in range(256))
    ):
        raise BadCheckpoint(f"{path} is damaged: its ranks are not 0 to n - 1 with all single bytes among them")
    return ranks
