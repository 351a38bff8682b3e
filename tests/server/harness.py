"""The whole application in one process: real routes over HTTP's own protocol, a real scheduler, a made-up model.

The model speaks a script: the text that the test gives for the request, or one derived from the seed.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import llguidance
import msgspec
import numpy as np
import torch

from fastqwen.client.engine import Ready
from fastqwen.config import EngineConfig
from fastqwen.engine.blocks import BlockPool
from fastqwen.engine.core import EngineCore
from fastqwen.engine.policy import StepPolicy
from fastqwen.engine.scheduler import Scheduler
from fastqwen.engine.snapshots import SnapshotPool
from fastqwen.model_config import Classifier, ModelConfig, RopeConfig
from fastqwen.plan import EnginePlan
from fastqwen.records import Failure, SampledRow, ScheduledBatch, StepOutput, TokenLogprobs
from fastqwen.runner.choices import choices_of
from fastqwen.runner.sampler import FORBIDDEN
from fastqwen.runner.structured import GrammarCompiler, StructuredOutput, mask
from fastqwen.server.answer.cache_story import CacheStories
from fastqwen.server.answer.metrics import Metrics
from fastqwen.server.answer.state import ServerState
from fastqwen.server.app import create_app
from fastqwen.server.config import ServerConfig
from fastqwen.server.dialects import checking
from fastqwen.text.formats import derive_formats
from fastqwen.text.grammar import check_grammar, grammar_tokenizer
from fastqwen.text.load import TextTools
from fastqwen.text.stops import StopToken
from fastqwen.text.template import ChatTemplate
from fastqwen.text.tokenizer import Tokenizer
from fastqwen.text.worker import Check, Checked, Compile, Encode, TextJob
from tests.client.fake_engine import FakeEngine

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]
END = 256 + 2
VOCAB = 256 + len(CONTROL)
QWEN3 = (
    "{%- if tools %}<|im_start|>system\n<tools>{{ tools | tojson }}</tools> answer with <tool_call></tool_call><|im_end|>\n"
    "{%- endif %}{%- for m in messages %}<|im_start|>{{ m.role }}\n"
    "{%- set text = m.content.split('</think>')[-1] if m.role == 'assistant' else m.content %}{{ text }}"
    "{%- for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{%- endfor %}<|im_end|>\n"
    "{%- endfor %}{%- if add_generation_prompt %}<|im_start|>assistant\n"
    "{%- if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{%- endif %}{%- endif %}"
)


class ByteTokenizer(Tokenizer):
    """A token for each byte, then the control tokens."""

    def __init__(self) -> None:
        self.control_tokens = {token: 256 + index for index, token in enumerate(CONTROL)}

    @property
    def vocab_size(self) -> int:
        return VOCAB

    def token_bytes(self, token_id: int) -> bytes:
        if token_id < 256:
            return bytes([token_id])
        return CONTROL[token_id - 256].encode() if token_id < VOCAB else b""

    def token_id(self, token: str) -> int | None:
        return self.control_tokens.get(token)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = []
        while text:
            starts = [(text.find(token), token) for token in CONTROL if token in text]
            start, token = min(starts, default=(len(text), ""))
            ids += text[:start].encode()
            ids += [self.control_tokens[token]] if token else []
            text = text[start + len(token) :]
        return ids

    def encode_plain(self, text: str) -> list[int]:
        return list(text.encode())


Script = Callable[[str, int], str | bytes]


class Speaker:
    """The executor: row by row the script's next byte, or the byte that a grammar allows; adjusted logits are honoured."""

    run_ahead = 1

    def __init__(self, script: Script, tokenizer: llguidance.LLTokenizer) -> None:
        self.script = script
        self.structured = StructuredOutput(GrammarCompiler(lambda: tokenizer))
        self.admissions: dict[int, Any] = {}
        self.tokens: dict[int, list[int]] = {}
        self.batches: list[ScheduledBatch] = []

    def submit(self, batch: ScheduledBatch) -> Speaker._Done:
        self.batches.append(batch)
        self.structured.admit(batch.admissions)
        for admission in batch.admissions:
            self.admissions[admission.slot] = admission
            self.tokens[admission.slot] = list(admission.token_ids)
        return self._Done(StepOutput(step_id=batch.step_id, rows=[self._row(row) for row in batch.rows]))

    def is_late(self, slot: int) -> bool:
        return self.structured.is_late(slot)

    def _row(self, row: Any) -> SampledRow:
        admission, tokens = self.admissions[row.slot], self.tokens[row.slot]
        scored = None
        if row.prompt_logprobs:
            last = min(row.start + row.num_tokens, admission.num_prompt_tokens - 1)
            scored = [self._logprobs(tokens[i + 1], admission.sampling.prompt_logprobs) for i in range(row.start, last)]
        if row.pools or row.pools_all:
            ends = range(row.start + 1, row.end + 1) if row.pools_all else [row.end]
            told = [[hash((tuple(tokens[:end]), place)) % 997 - 498 for place in range(8)] for end in ends]
            return SampledRow(request_id=row.request_id, embedding=np.array(told, dtype=np.float32).tobytes())
        if not row.num_logits:
            return SampledRow(request_id=row.request_id, prompt_logprobs=scored)
        logits = self._logits(admission, tokens)
        failed: dict[int, Failure] = {}
        late = mask(self.structured, logits, choices_of([row]), failed)
        if failed:
            return SampledRow(request_id=row.request_id, error=failed[0])
        if late:
            return SampledRow(request_id=row.request_id, prompt_logprobs=scored, stepped_aside=True)
        token = int(logits.argmax())
        self.structured.take([row.slot], [token])
        tokens.append(token)
        asked = admission.sampling.logprobs
        if admission.sampling.allowed_token_ids == [token]:  # asked how likely it is: another number for each prompt
            told = [TokenLogprobs(token, -float(sum(tokens) * token % 17), 1, [], [])]
            return SampledRow(request_id=row.request_id, token_ids=[token], logprobs=told)
        return SampledRow(
            request_id=row.request_id,
            token_ids=[token],
            logprobs=None if asked is None else [self._told(token, admission.sampling)],
            prompt_logprobs=scored,
        )

    def _logits(self, admission: Any, tokens: list[int]) -> torch.Tensor:
        prompt = bytes(t for t in admission.token_ids[: admission.num_prompt_tokens] if t < 256).decode(
            errors="replace"
        )
        said = tokens[admission.num_prompt_tokens :]
        said_by_script = self.script(prompt, admission.seed)
        wanted = said_by_script if isinstance(said_by_script, bytes) else said_by_script.encode()
        logits = torch.zeros((1, VOCAB))
        logits[0, [ord("\n"), ord(" ")]] = -1.0  # where a grammar leaves a choice, it does not dawdle
        logits[0, [END, ord("}")]] = 1.0
        logits[0, wanted[len(said)] if len(said) < len(wanted) else END] = 10.0
        sampling = admission.sampling
        for token_id, bias in (sampling.logit_bias or {}).items():
            logits[0, token_id] += bias
        if sampling.allowed_token_ids is not None:
            kept = logits[0, sampling.allowed_token_ids]
            logits.fill_(FORBIDDEN)
            logits[0, sampling.allowed_token_ids] = kept
        if len(said) < sampling.min_tokens:
            logits[0, admission.stop_token_ids] = FORBIDDEN
        return logits

    def _told(self, token: int, sampling: Any) -> TokenLogprobs:
        if sampling.logprob_token_ids:
            ids = sampling.logprob_token_ids
            return TokenLogprobs(token, -0.5, 1, ids, [-float(one) for one in ids], [one + 1 for one in ids])
        return self._logprobs(token, sampling.logprobs)

    @staticmethod
    def _logprobs(token: int, count: int) -> TokenLogprobs:
        return TokenLogprobs(token, -0.5, 1, [token, 1, 2, 3][:count], [-0.5, -1.0, -2.0, -3.0][:count])

    class _Done:
        def __init__(self, output: StepOutput) -> None:
            self._output = output
            self.late = [row.request_id for row in output.rows if row.stepped_aside]

        def result(self) -> StepOutput:
            return self._output


class LocalWorkers:
    """The pool's face without processes."""

    def __init__(self, text: TextTools, words: llguidance.LLTokenizer) -> None:
        self._text, self._words = text, words

    async def check(self, job: Check, body: bytes | bytearray) -> Checked:
        return checking.check(job, body)

    async def run(self, job: TextJob) -> list[int]:
        if isinstance(job, Compile):
            check_grammar(job.grammar, self._words)
            return []
        if isinstance(job, Encode):
            return self._text.tokenizer.encode(job.text, add_special_tokens=job.add_special_tokens)
        assert self._text.template is not None
        return job.run(self._text.tokenizer, self._text.template)


def make_state(
    script: Script = lambda prompt, seed: "Hello",
    *,
    template: str = QWEN3,
    max_model_len: int = 4096,
    blocks: int | None = None,
    snapshots: int | None = None,
    engine: dict[str, Any] | None = None,
    **server: Any,
) -> ServerState:
    """``snapshots``: copies of states, as if the model's layers had such of fixed size; None: they have none."""
    tokenizer = ByteTokenizer()
    text = TextTools(
        tokenizer=tokenizer,
        template=ChatTemplate(template, origin="test"),
        stops=[StopToken(END, "<|im_end|>", "test"), StopToken(256, "<|endoftext|>", "test")],
        default_sampling={"temperature": 0.0},
    )
    tokenizer.limit_length(max_model_len)
    config = EngineConfig(model="mock", **(engine or {}))
    plan = EnginePlan(
        dtype="float32", kv_cache_dtype="float32", block_size=16,
        num_blocks=blocks or 8 * max_model_len // 16, max_model_len=max_model_len,
        max_num_seqs=64, max_num_batched_tokens=512, weights_bytes=0, kv_bytes_per_token=1,
        max_state_snapshots=snapshots or 0, states_bytes=0 if snapshots is None else 1,
    )  # fmt: skip
    scheduler = Scheduler(
        BlockPool(plan.num_blocks, plan.block_size),
        StepPolicy(max_num_batched_tokens=plan.max_num_batched_tokens),
        max_num_seqs=plan.max_num_seqs,
        enable_prefix_caching=config.enable_prefix_caching,
        snapshots=None if snapshots is None else SnapshotPool(snapshots, plan.block_size),
    )
    words = grammar_tokenizer(tokenizer, text.stop_token_ids, VOCAB)
    return ServerState(
        engine=FakeEngine(EngineCore(scheduler, Speaker(script, words)), Ready(plan, model_config())),
        engine_config=config,
        text=text,
        formats=derive_formats(text.template),
        workers=LocalWorkers(text, words),
        config=ServerConfig(**server),
        metrics=Metrics(),
        seeds=random.Random(0),
        cache_stories=CacheStories(enabled=config.enable_prefix_caching),
    )


def model_config() -> ModelConfig:
    return ModelConfig(
        model_type="qwen2", dtype="float32", vocab_size=VOCAB, hidden_size=8, intermediate_size=8, num_layers=1,
        num_heads=1, num_kv_heads=1, head_dim=8, rms_norm_eps=1e-6, tie_word_embeddings=True,
        max_position_embeddings=4096, rope=RopeConfig(theta=1e4),
    )  # fmt: skip


@asynccontextmanager
async def client_of(state: ServerState, **headers: str) -> Any:
    """An HTTP client whose requests go straight into the application while the engine runs."""
    engine: Any = state.engine
    running = asyncio.create_task(engine.run())
    transport = httpx.ASGITransport(create_app(state), raise_app_exceptions=False)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers) as client:
            yield client
    finally:
        running.cancel()


def ask(state: ServerState, path: str, body: Any, **headers: str) -> httpx.Response:
    async def run() -> httpx.Response:
        async with client_of(state, **headers) as client:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            return await client.post(path, content=data)

    return asyncio.run(run())


def get(state: ServerState, path: str, **headers: str) -> httpx.Response:
    async def run() -> httpx.Response:
        async with client_of(state, **headers) as client:
            return await client.get(path)

    return asyncio.run(run())


def chunks(response: httpx.Response) -> list[dict[str, Any]]:
    """A stream's events; it must have ended with [DONE]."""
    events = [event.removeprefix("data: ") for event in response.text.split("\n\n") if event]
    assert events[-1] == "[DONE]", events[-1]
    return [json.loads(event) for event in events[:-1]]


def assembled(response: httpx.Response) -> dict[int, dict[str, Any]]:
    """The messages that a client puts together from a chat stream."""
    found: dict[int, dict[str, Any]] = {}
    for chunk in chunks(response):
        for choice in chunk["choices"]:
            entry = found.setdefault(
                choice["index"], {"content": "", "reasoning_content": "", "calls": [], "finish": []}
            )
            delta = choice["delta"]
            entry["content"] += delta.get("content", "")
            entry["reasoning_content"] += delta.get("reasoning_content", "")
            entry["calls"] += [call["function"] for call in delta.get("tool_calls", [])]
            entry["finish"] += [choice["finish_reason"]] if choice["finish_reason"] else []
    return found


def chat(content: str = "hi", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], **more}


TESTS = Path(__file__).parents[1]


def classifying(state: Any = None, labels: int = 8) -> Any:
    """A state whose engine says that it has a head; the numbers are the mock's."""
    state = make_state() if state is None else state
    ready = state.engine.ready
    model = msgspec.structs.replace(
        ready.model, has_head=False, classifier=Classifier(tuple(f"L{index}" for index in range(labels)), "softmax")
    )
    state.engine.ready = msgspec.structs.replace(ready, model=model)
    return state
