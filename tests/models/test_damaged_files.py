"""Hundreds of damaged checkpoints of every kind: one typed line, a status that is not 0, no long wait, no great memory."""

from __future__ import annotations

import base64
import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.models.test_corrupt import small
from tests.models.tiny import make_qwen1
from tests.reliability.server import ROOT
from tests.weights.test_gguf_fuzz import FILES, corrupted

MAX_SECONDS = 5.0
MAX_RSS_BYTES = 512 * 2**20  # beside the file and what the interpreter with torch takes
EXTREMES = [0, 1, -1, 2**31, 2**63, 10**30, 0.5, 1e400, True, None, "", "64", [], {}, [None], "x" * 5000]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PART = "model-00001-of-00001.safetensors"


def copied(folder: Path, source: Path, name: str, data: bytes | None) -> Path:
    """The checkpoint with one file replaced, or left out; the others are linked, as the hub's cache does it."""
    folder.mkdir()
    for path in source.iterdir():
        if path.name != name:
            (folder / path.name).symlink_to(path)
    if data is not None:
        (folder / name).write_bytes(data)
    return folder


def bytes_damaged(data: bytes, head: int, rng: random.Random) -> bytes:
    """Cut off, or with bits turned, numbers replaced, bytes taken out, put in or moved, before ``head``."""
    return corrupted(data, head, rng)


def json_damaged(data: bytes, rng: random.Random) -> bytes:
    """A key taken out, or a value anywhere replaced by one of another kind or size."""
    values: Any = json.loads(data)
    place = values
    while True:
        key = rng.choice(sorted(place) if isinstance(place, dict) else range(len(place)))
        if isinstance(place[key], (dict, list)) and place[key] and rng.random() < 0.7:
            place = place[key]
            continue
        if isinstance(place, dict) and rng.random() < 0.3:
            del place[key]
        else:
            place[key] = rng.choice(EXTREMES)
        return json.dumps(values).encode()


def tiktoken_damaged(data: bytes, rng: random.Random) -> bytes:
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    token, rank = lines[at].split()
    kind = rng.randrange(8)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines[at] = token
    elif kind == 2:
        lines[at] = token + b" " + str(rng.choice([-1, 10**30, 255 if int(rank) != 255 else 0])).encode()
    elif kind == 3:
        lines[at] = b"\xff" + lines[at]
    elif kind == 4:
        lines[at] = lines[(at + 1) % len(lines)].split()[0] + b" " + rank
    elif kind == 5:
        lines[at] = lines[at] + b" 7"
    elif kind == 6:
        return data[: rng.randrange(len(data) // 2)]
    else:
        lines[at] = base64.b64encode(rng.randbytes(9)) + b" " + rank
    return b"\n".join(lines)


def shards_damaged(source: Path, folder: Path, rng: random.Random) -> Path:
    """An index with a fault: a file that is not there, or a name that is no name."""
    copied(folder, source, INDEX, None)
    (folder / WEIGHTS).rename(folder / PART)
    names = [
        f"model.layers.{layer}.{part}.weight" for layer in range(3) for part in ("mlp.down_proj", "input_layernorm")
    ]
    fault = rng.choice(["gone", "outside", "absolute", "nul", "number", "suffix", "directory"])
    shard = {
        "gone": f"model-{rng.randrange(2, 99999):05d}-of-00002.safetensors", "outside": "../" * rng.randint(1, 9) + WEIGHTS,
        "absolute": "/etc/passwd", "nul": "a\0.safetensors", "number": rng.randrange(9),
        "suffix": rng.choice(["model.bin", "model.pt", ".", "", "model.safetensors/"]), "directory": "shards.safetensors",
    }[fault]  # fmt: skip
    (folder / "shards.safetensors").mkdir()
    held = dict.fromkeys(names, PART)
    held[rng.choice(names)] = shard
    (folder / INDEX).write_text(json.dumps({"weight_map": held}))
    return folder


def damages(root: Path, count: int) -> Iterator[tuple[str, Path]]:
    """(kind, path) of ``count`` checkpoints of each kind."""
    rng = random.Random(17)
    plain, qwen1 = root / "plain", root / "qwen1"
    for folder, made in ((plain, small), (qwen1, make_qwen1)):
        folder.mkdir()
        made(folder)
    ranks = b"\n".join(b"%s %d" % (base64.b64encode(bytes([one])), one) for one in range(256))
    (qwen1 / "qwen.tiktoken").write_bytes(ranks)
    json_of_qwen1 = json.loads((qwen1 / "config.json").read_text())
    assert json_of_qwen1["vocab_size"] == 256
    weights = (plain / WEIGHTS).read_bytes()
    head = 8 + int.from_bytes(weights[:8], "little")
    files: dict[str, Callable[[Path], Path]] = {
        "safetensors": lambda folder: copied(folder, plain, WEIGHTS, bytes_damaged(weights, head, rng)),
        "config": lambda folder: copied(
            folder, plain, "config.json", json_damaged((plain / "config.json").read_bytes(), rng)
        ),
        "tokenizer": lambda folder: copied(
            folder, plain, "tokenizer.json", json_damaged((plain / "tokenizer.json").read_bytes(), rng)
        ),
        "tiktoken": lambda folder: copied(folder, qwen1, "qwen.tiktoken", tiktoken_damaged(ranks, rng)),
        "shards": lambda folder: shards_damaged(plain, folder, rng),
        "gguf": lambda folder: _gguf(folder, rng),
    }
    for kind, make in files.items():
        for number in range(count):
            yield kind, make(root / f"{kind}-{number}")


def _gguf(folder: Path, rng: random.Random) -> Path:
    folder.mkdir()
    raw, head = rng.choice(FILES)
    path = folder / "model.gguf"
    path.write_bytes(corrupted(raw, head, rng))
    return path


def size_bytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(os.stat(one).st_size for one in path.iterdir())


@pytest.mark.timeout(600)
@pytest.mark.parametrize("count", [pytest.param(42, id="x252"), pytest.param(400, id="x2400", marks=pytest.mark.slow)])
def test_damaged_checkpoints(tmp_path: Path, count: int):
    cases = [("whole", tmp_path / "plain"), *damages(tmp_path, count)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.models.load_each"],
        input="".join(f"{path}\n" for _, path in cases),
        cwd=ROOT, capture_output=True, text=True, timeout=580,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    whole, *found = [json.loads(line) for line in done.stdout.splitlines()]
    assert whole["status"] == 0, whole
    refused: Counter[str] = Counter()
    for (kind, path), one in zip(cases[1:], found, strict=True):
        assert one["status"] in (0, 1), one  # no crash, no bug's traceback, no signal
        assert "Traceback" not in one["said"], one
        assert one["seconds"] < MAX_SECONDS, one
        if one["status"]:  # what loads may have asked for a context of millions of tokens
            assert one["rss_bytes"] < whole["rss_bytes"] + MAX_RSS_BYTES + size_bytes(path), one
            [line] = [line for line in one["said"].splitlines() if line.startswith("fastqwen: ")]
            # A context of one token is a well-formed wish: then it is the prompt that is too long for it.
            assert (str(path) in line or "maximum context length" in line) and len(line) < 1000, one
            refused[kind] += 1
    # A turned bit in a tensor's name or in the template may pass; a file that contradicts itself must not.
    print(json.dumps({"cases": len(found), "refused": refused, "slowest_s": max(one["seconds"] for one in found)}))
    assert refused["shards"] == refused["tiktoken"] == count
    assert sum(refused.values()) > 0.8 * len(found)
