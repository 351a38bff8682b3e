"""Decoding steps in which half of the rows are held to a JSON schema, beside steps of rows without one; on a GPU.

python bench/gpu_schemas.py OUT.json [MODEL] [ROWS]

Dummy weights, greedy, 1024 prompt tokens each. No model's tokenizer is at hand where this runs, so the vocabulary is made of
the words and pieces of words of this repository's documents: as many tokens as the model has, shaped like a real one's.
"""

from __future__ import annotations

import json
import random
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from fastqwen.benchmark.report import commit
from fastqwen.config import EngineConfig
from fastqwen.records import EngineRequest, Grammar, SamplingParams, StructuredOutputs
from fastqwen.runner.start import Engine, start_engine
from fastqwen.text.grammar import grammar_tokenizer, to_grammar
from fastqwen.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
CONTEXT, STEPS, END = 1024, 192, 256
SCHEMA = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {"name": {"type": "string"}, "count": {"type": "integer"}, "kind": {"enum": ["a", "b", "c"]}},
        "required": ["name", "count", "kind"],
        "additionalProperties": False,
    },
}


class Words(Tokenizer):
    """All bytes, the end, and then words and their beginnings, the most frequent first."""

    def __init__(self, vocab_size: int) -> None:
        self.control_tokens = {"<|endoftext|>": END}
        text = "".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
        words = dict.fromkeys(re.findall(r"\s?\w+|[^\w\s]+", text))
        pieces = dict.fromkeys(
            word[start:end] for word in words for start in range(len(word)) for end in range(start + 2, len(word) + 1)
        )
        self._tokens = [bytes([value]) for value in range(256)] + [b"<|endoftext|>"]
        self._tokens += [piece.encode() for piece in pieces][: vocab_size - len(self._tokens)]
        self._tokens += [b""] * (vocab_size - len(self._tokens))

    @property
    def vocab_size(self) -> int:
        return len(self._tokens)

    def token_bytes(self, token_id: int) -> bytes:
        return self._tokens[token_id]

    def token_id(self, token: str) -> int | None:
        return self.control_tokens.get(token)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(text.encode())

    def encode_plain(self, text: str) -> list[int]:
        return list(text.encode())


def measure(engine: Engine, rows: int, held: int, vocab_size: int) -> dict[str, float]:
    """Milliseconds between two tokens of a row: of all, of those without a schema, and of those with one."""
    chance = random.Random(0)
    params = SamplingParams(temperature=0.0, ignore_eos=True)
    grammar = Grammar(to_grammar(StructuredOutputs(json=SCHEMA)))
    for index in range(rows):
        engine.core.add(
            EngineRequest(
                request_id=f"{'held' if index < held else 'free'}-{index}",
                prompt_token_ids=[chance.randrange(vocab_size) for _ in range(CONTEXT)],
                sampling=params,
                stop_token_ids=[],
                max_tokens=STEPS + rows,
                seed=index,
                grammar=grammar if index < held else None,
            )
        )
    counts, begun_s, ended = {"held": 0, "free": 0}, None, False
    seen: set[str] = set()
    while engine.core.has_work:
        deltas = engine.core.step()
        if begun_s is None:
            seen |= {delta.request_id for delta in deltas if delta.token_ids}
            if len(seen) == rows:
                begun_s = time.perf_counter()
            continue
        if ended:
            continue
        for delta in deltas:
            counts[delta.request_id[:4]] += len(delta.token_ids)
            ended = ended or delta.finish_reason is not None
        passed_s = time.perf_counter() - begun_s
    found = {"all": rows, "free": rows - held, "held": held}
    tokens = {"all": sum(counts.values()), **counts}
    return {f"{name}_ms": passed_s * 1e3 * number / tokens[name] for name, number in found.items() if number}


def main() -> None:
    out = Path(sys.argv[1])
    name = sys.argv[2] if len(sys.argv) > 2 else "qwen3-0.6b"
    rows = int(sys.argv[3]) if len(sys.argv) > 3 else 64
    config = EngineConfig(model=name, load_format="dummy", enable_prefix_caching=False, prompts_first=True)
    engine = start_engine(
        config,
        ROOT / "tests" / "configs" / name,
        grammar_tokenizer=lambda model: grammar_tokenizer(Words(model.vocab_size), [END], model.vocab_size),
    )
    results: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "commit": commit(),
    }
    for held in (0, rows // 2, 0, rows // 2):
        found = measure(engine, rows, held, engine.model.vocab_size)
        results.setdefault(f"{held} of {rows} rows", []).append(found)
        print(f"{held} of {rows} rows", {key: round(value, 3) for key, value in found.items()}, flush=True)
    out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
