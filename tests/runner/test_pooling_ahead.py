"""The GPU's executor, which launches a step before the last one was read, with vectors among its rows.

Triton's interpreter computes, and events and pinned memory are what they mean on a CPU: nothing. On a GPU
tests/test_embed.py asks the real thing.
"""

from __future__ import annotations

import itertools
import os
import random
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

from fastqwen import LLM, SamplingParams
from fastqwen.client.prepare import prepare, prepare_pooling
from fastqwen.client.vectors import vector_of
from fastqwen.kernels.triton.ops import TritonOps
from fastqwen.runner import cuda_runner, start
from tests.models.embedding import make_embedder, reference
from tests.models.tiny import prompt

GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
TEXTS = [[5], prompt(17), prompt(33), prompt(50)]


class NoEvent:
    def record(self) -> None: ...

    def synchronize(self) -> None: ...


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", NoEvent)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(start, "ModelRunner", lambda *given: cuda_runner.CudaRunner(*given[:5]))
    monkeypatch.setattr(start, "choose_ops", TritonOps)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled for the GPU here")
@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 33}], ids=["whole", "in-chunks"])
def test_vectors_and_tokens_in_the_same_steps(on_cpu: None, tmp_path: Path, options: dict[str, int]):
    base = make_embedder(tmp_path)
    llm = LLM(str(tmp_path), device="cpu", dtype="float32", block_size=16, max_num_seqs=8, **options)
    assert llm.engine.core._executor.run_ahead == 2
    [wanted] = llm.generate([prompt(9)], GREEDY)
    for _ in range(2):  # the second time only one token of the 17 and the 33 is left to compute
        requests = prepare("answer", prompt(9), GREEDY, llm.facts, seeds=random.Random(0))
        requests += [prepare_pooling(str(index), text, llm.facts, field="x") for index, text in enumerate(TEXTS)]
        tokens: list[int] = []
        vectors = {}
        with llm.engine.stream(requests) as stream:
            for delta in itertools.chain.from_iterable(stream):
                tokens += delta.token_ids
                if delta.embedding is not None:
                    vectors[delta.request_id] = torch.tensor(vector_of(delta).copy())
        assert tokens == wanted.outputs[0].token_ids
        for index, text in enumerate(TEXTS):
            torch.testing.assert_close(vectors[str(index)], reference(base, text), rtol=0, atol=1e-4)
    assert [one.num_cached_tokens for one in llm.embed(TEXTS, use_tqdm=False)] == [0, 16, 32, 48]
