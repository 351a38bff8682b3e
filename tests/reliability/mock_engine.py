"""A real engine process with a real scheduler, and an executor that computes token = f(prompt, seed, position).

Grammars hold: where one forbids the letter, another allowed token takes its place.

Run as ``python -m tests.reliability.mock_engine ADDRESS LOG_FORMAT``. MOCK_STEP_S paces its steps.
"""

from __future__ import annotations

import os
import struct
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import torch

from fastqwen.config import EngineConfig
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
from fastqwen.text.load import load_text
from fastqwen.weights.checkpoint import open_checkpoint

LETTERS = range(ord("a"), ord("z") + 1)


def token_at(prompt: list[int], seed: int, position: int) -> int:
    """A lower-case letter, in the mock model's tokens."""
    return LETTERS[
        zlib.crc32(f"{zlib.crc32(bytes(t % 256 for t in prompt))}:{seed}:{position}".encode()) % len(LETTERS)
    ]


HIDDEN_SIZE = 64  # as mock_model.py has it


class MockExecutor:
    run_ahead = 1

    def __init__(self, step_s: float, compiler: GrammarCompiler, vocab_size: int) -> None:
        self._step_s = step_s
        self._structured = StructuredOutput(compiler)
        self._vocab_size = vocab_size
        self._due_s = 0.0
        self._admissions: dict[int, Admission] = {}

    def submit(self, batch: ScheduledBatch) -> MockExecutor:
        for admission in batch.admissions:
            self._admissions[admission.slot] = admission
        self._structured.admit(batch.admissions)
        choices = choices_of(batch.rows)
        logits = torch.zeros((len(choices), self._vocab_size))
        failed: dict[int, Failure] = {}
        late = mask(self._structured, logits, choices, failed)
        found = {choice.row: logits[place] for place, choice in enumerate(choices)}
        rows = [
            SampledRow(request_id=row.request_id, error=failed.get(index), stepped_aside=index in late)
            if index in failed or index in late
            else self._row(row, found.get(index))
            for index, row in enumerate(batch.rows)
        ]
        self.late = [batch.rows[index].request_id for index in sorted(late)]
        self._output = StepOutput(step_id=batch.step_id, rows=rows)
        return self

    def is_late(self, slot: int) -> bool:
        return self._structured.is_late(slot)

    def result(self) -> StepOutput:
        now_s = time.monotonic()
        self._due_s = max(self._due_s + self._step_s, now_s)
        time.sleep(self._due_s - now_s)
        return self._output

    def _row(self, row: Row, logits: torch.Tensor | None) -> SampledRow:
        """logits [vocab], of a row that has some"""
        if row.pools or row.pools_all:
            unit = struct.pack(f"<{HIDDEN_SIZE}f", 1.0, *[0.0] * (HIDDEN_SIZE - 1))
            return SampledRow(request_id=row.request_id, embedding=unit * (row.num_tokens if row.pools_all else 1))
        if not row.num_logits:
            return SampledRow(request_id=row.request_id)
        admission = self._admissions[row.slot]
        prompt = admission.token_ids[: admission.num_prompt_tokens]
        seed = 0 if admission.sampling.greedy else admission.seed
        token = token_at(prompt, seed, row.start + row.num_tokens)
        if logits is not None and self._structured.constrains(row.slot):
            token = self._allowed(logits, token, admission)
            self._structured.take([row.slot], [token])
        asked = admission.sampling.logprobs
        others = [one for one in LETTERS if one != token][: max(0, (asked or 0) - 1)]
        logprobs = TokenLogprobs(token, -0.1, 1, [token, *others][:asked], [-0.1, *[-3.0] * len(others)][:asked])
        return SampledRow(request_id=row.request_id, token_ids=[token], logprobs=None if asked is None else [logprobs])

    @staticmethod
    def _allowed(logits: torch.Tensor, token: int, admission: Admission) -> int:
        """This token if the grammar has it, else the end if it may end here, else any."""
        for wanted in (token, *admission.stop_token_ids):
            if logits[wanted] > FORBIDDEN:
                return wanted
        allowed = (logits > FORBIDDEN).nonzero().flatten().tolist()
        return allowed[token % len(allowed)]


def start(message: wire.Start, progress: Callable[[int, int], None]) -> Engine:
    config: EngineConfig = message.config
    model = open_checkpoint(Path(message.path), with_tensors=False).model
    blocks = int(os.environ.get("MOCK_BLOCKS", "20000"))
    plan = EnginePlan(
        dtype="float32", kv_cache_dtype="float32", block_size=16, num_blocks=blocks, max_model_len=config.max_model_len or 4096,
        max_num_seqs=config.max_num_seqs or 1024, max_num_batched_tokens=4096, weights_bytes=0, kv_bytes_per_token=1,
    )  # fmt: skip
    policy = StepPolicy(max_num_batched_tokens=4096)
    scheduler = Scheduler(BlockPool(blocks, 16), policy, max_num_seqs=plan.max_num_seqs)
    text = load_text(Path(message.path), model, config)
    compiler = GrammarCompiler(lambda: grammar_tokenizer(text.tokenizer, text.stop_token_ids, model.vocab_size))
    executor = MockExecutor(float(os.environ.get("MOCK_STEP_S", "0.005")), compiler, model.vocab_size)
    return Engine(core=EngineCore(scheduler, executor), compiler=compiler, plan=plan, model=model)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], start))
