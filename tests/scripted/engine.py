"""The engine's process: ``python -m tests.scripted.engine ADDRESS LOG_FORMAT``. MOCK_STEP_S paces its steps."""

from __future__ import annotations

import base64
import json
import os
import re
import struct
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fastqwen.engine.blocks import BlockPool
from fastqwen.engine.core import EngineCore
from fastqwen.engine.policy import StepPolicy
from fastqwen.engine.scheduler import Scheduler
from fastqwen.ipc import wire
from fastqwen.ipc.engine_main import main
from fastqwen.plan import EnginePlan
from fastqwen.records import Admission, Failure, Row, SampledRow, ScheduledBatch, StepOutput, TokenLogprobs
from fastqwen.runner.choices import choices_of
from fastqwen.runner.sampler import FORBIDDEN
from fastqwen.runner.start import Engine
from fastqwen.runner.structured import GrammarCompiler, StructuredOutput, mask
from fastqwen.text.grammar import grammar_tokenizer
from fastqwen.text.load import TextTools, load_text
from fastqwen.weights.checkpoint import open_checkpoint

SAY = re.compile(r"SAY:([A-Za-z0-9+/=]+):")
NUM_BLOCKS, BLOCK_SIZE, BATCH_TOKENS, MAX_SEQS = 20000, 16, 4096, 256
# Said where a grammar has no use for the script: what ends a JSON value goes before what makes it longer.
FILLERS = ('"', "}", "]", ",", "1", "0", "a", "{", "[", ":", "true", "null")
PIECES = (32, 16, 8, 4, 3, 2, 1)  # characters that the next token of a constrained answer is looked for in


class Script:
    """One sequence's text, and how far it was said."""

    def __init__(self, prompt: str, text: TextTools) -> None:
        found = SAY.findall(prompt)
        said: Any = json.loads(base64.b64decode(found[-1])) if found else "Hello."
        self._tokenizer = text.tokenizer
        self.left: str = said if isinstance(said, str) else said["text"]
        split = None if isinstance(said, str) else said.get("split")
        if split:
            pieces = [self.left[at : at + split] for at in range(0, len(self.left), split)]
            self.ids = [token for piece in pieces for token in self._tokenizer.encode_plain(piece)]
        else:
            self.ids = self._tokenizer.encode(self.left)

    def free(self, position: int, end: int) -> int:
        """The token at this position of the answer, ``end`` behind the last."""
        token = self.ids[position] if position < len(self.ids) else end
        self.left = self.left.removeprefix(self._said(token))
        return token

    def constrained(self, allowed: Callable[[int], bool]) -> int | None:
        """The longest token that the script goes on with and the grammar allows."""
        if self.left[:1].isspace() and not any(map(allowed, self._tokenizer.encode_plain(self.left[:1]))):
            self.left = self.left.lstrip()  # as a model does whose white space is not allowed here
        for size in PIECES if self.left else ():
            for token in self._tokenizer.encode_plain(self.left[:size])[:1]:
                said = self._said(token)
                if allowed(token) and self.left.startswith(said):
                    self.left = self.left[len(said) :]
                    return token
        return None

    def _said(self, token: int) -> str:
        return self._tokenizer.token_bytes(token).decode("utf-8", "replace")


class ScriptedExecutor:
    run_ahead = 1
    late: Sequence[str] = ()  # it waits for each mask, so that no row steps aside

    def __init__(self, compiler: GrammarCompiler, text: TextTools, vocab_size: int, hidden_size: int) -> None:
        self._structured = StructuredOutput(compiler)
        self._text, self._vocab_size, self._hidden_size = text, vocab_size, hidden_size
        self._admissions: dict[int, Admission] = {}
        self._scripts: dict[int, Script] = {}
        self._fillers = [token for word in FILLERS for token in text.tokenizer.encode_plain(word)[:1]]
        self._step_s = float(os.environ.get("MOCK_STEP_S", "0.0005"))

    def submit(self, batch: ScheduledBatch) -> ScriptedExecutor:
        for admission in batch.admissions:
            prompt = self._text.tokenizer.decode(admission.token_ids[: admission.num_prompt_tokens])
            self._admissions[admission.slot] = admission
            self._scripts[admission.slot] = Script(prompt, self._text)
        self._structured.admit(batch.admissions)
        self._output = StepOutput(step_id=batch.step_id, rows=[self._row(row) for row in batch.rows])
        return self

    def result(self) -> StepOutput:
        time.sleep(self._step_s)
        return self._output

    def _row(self, row: Row) -> SampledRow:
        if row.pools or row.pools_all:
            unit = struct.pack(f"<{self._hidden_size}f", 0.6, 0.8, *[0.0] * (self._hidden_size - 2))
            return SampledRow(request_id=row.request_id, embedding=unit * (row.num_tokens if row.pools_all else 1))
        admission, script = self._admissions[row.slot], self._scripts[row.slot]
        scored = self._scored(row, admission) if row.prompt_logprobs else None
        if not row.num_logits:
            return SampledRow(request_id=row.request_id, prompt_logprobs=scored)
        if self._structured.constrains(row.slot):
            logits = torch.zeros((1, self._vocab_size))
            failed: dict[int, Failure] = {}
            while mask(self._structured, logits, choices_of([row]), failed):
                pass
            if failed:
                return SampledRow(request_id=row.request_id, error=failed[0])
            token = self._pick(logits[0], script, admission)
            self._structured.take([row.slot], [token])
        else:
            token = script.free(row.end - admission.num_prompt_tokens, self._end(admission))
        asked = admission.sampling.logprobs
        listed = None if asked is None else [_logprobs(token, asked)]
        return SampledRow(request_id=row.request_id, token_ids=[token], logprobs=listed, prompt_logprobs=scored)

    def _end(self, admission: Admission) -> int:
        return (admission.stop_token_ids or self._text.stop_token_ids)[0]

    def _scored(self, row: Row, admission: Admission) -> list[TokenLogprobs]:
        last = min(row.end, admission.num_prompt_tokens - 1)
        count = admission.sampling.prompt_logprobs or 0
        return [_logprobs(token, count) for token in admission.token_ids[row.start + 1 : last + 1]]

    def _pick(self, logits: torch.Tensor, script: Script, admission: Admission) -> int:
        def allowed(token: int) -> bool:
            return bool(logits[token] > FORBIDDEN)

        token = script.constrained(allowed)
        if token is not None:
            return token
        for wanted in (*admission.stop_token_ids, *self._fillers):
            if allowed(wanted):
                return wanted
        return int((logits > FORBIDDEN).nonzero().flatten()[0])


def _logprobs(token: int, count: int) -> TokenLogprobs:
    others = [one for one in range(1, count + 1) if one != token][: max(0, count - 1)]
    listed = [token, *others][:count]
    return TokenLogprobs(token, -0.1, 1, listed, [-0.1, *[-3.0] * len(others)][:count])


def start(message: wire.Start, progress: Callable[[int, int], None]) -> Engine:
    path, config = Path(message.path), message.config
    model = open_checkpoint(path, with_tensors=False).model
    plan = EnginePlan(
        dtype="float32", kv_cache_dtype="float32", block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS,
        max_model_len=config.max_model_len or model.max_position_embeddings, max_num_seqs=MAX_SEQS,
        max_num_batched_tokens=BATCH_TOKENS, weights_bytes=0, kv_bytes_per_token=1,
    )  # fmt: skip
    policy = StepPolicy(max_num_batched_tokens=BATCH_TOKENS)
    scheduler = Scheduler(BlockPool(NUM_BLOCKS, BLOCK_SIZE), policy, max_num_seqs=MAX_SEQS)
    text = load_text(path, model, config)
    compiler = GrammarCompiler(lambda: grammar_tokenizer(text.tokenizer, text.stop_token_ids, model.vocab_size))
    executor = ScriptedExecutor(compiler, text, model.vocab_size, model.hidden_size)
    return Engine(core=EngineCore(scheduler, executor), compiler=compiler, plan=plan, model=model)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], start))
