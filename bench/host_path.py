"""``python bench/host_path.py [ROWS] [STEPS]``: what a step costs the engine process's processor, without a GPU.

The real loop of ipc/engine_main.py with the real scheduler and CudaRunner; only the device's part is missing: a recorded
step's replay does nothing, an event has always happened, and pinning gives the same memory. ROWS streams in a closed loop,
prompts of 512 ids, 128 output tokens. Processor time of all of the process's threads, ZeroMQ's too; one line of JSON.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import torch
import zmq

from fastqwen.engine.blocks import BlockPool
from fastqwen.engine.core import EngineCore
from fastqwen.engine.policy import StepPolicy
from fastqwen.engine.scheduler import Scheduler
from fastqwen.ipc import engine_main, wire
from fastqwen.ipc.arrivals import Arrivals
from fastqwen.plan import EnginePlan
from fastqwen.plan.catalog import find_published
from fastqwen.records import EngineRequest, Sampling
from fastqwen.runner.cuda_runner import CudaRunner
from fastqwen.runner.recording import Recording
from fastqwen.runner.structured import GrammarCompiler, StructuredOutput
from fastqwen.sharding import Alone

PROMPT_TOKENS, OUTPUT_TOKENS = 512, 128


class Parts:
    """Processor time by part; a part's own, without the parts that it calls."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner_s = [0.0]

    def watch(self, owner: Any, name: str, part: str) -> None:
        setattr(owner, name, self.watched(getattr(owner, name), part))

    def watched(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner_s.append(0.0)
            start_s = time.process_time()
            found = call(*args, **kwargs)
            took_s = time.process_time() - start_s
            self.seconds[part] += took_s - self._inner_s.pop()
            self._inner_s[-1] += took_s
            return found

        return timed


class Event:
    def record(self) -> None: ...
    def synchronize(self) -> None: ...


class Replay:
    def replay(self) -> None: ...


def make_runner(rows: int, num_blocks: int) -> CudaRunner:
    published = find_published("Qwen3-0.6B")
    assert published is not None
    model = msgspec.structs.replace(published.model, num_layers=0)  # no cache: nothing is computed
    plan = EnginePlan(
        dtype="bfloat16", kv_cache_dtype="bfloat16", block_size=64, num_blocks=num_blocks, max_model_len=40960, max_num_seqs=rows,
        max_num_batched_tokens=2048, weights_bytes=0, kv_bytes_per_token=1,
    )  # fmt: skip
    torch.Tensor.pin_memory = lambda tensor: tensor  # type: ignore[assignment,method-assign]
    torch.cuda.Event = Event  # type: ignore[assignment,misc]
    embed = SimpleNamespace(world=Alone())
    decoder: Any = SimpleNamespace(ops=SimpleNamespace(), layers=[], embed=embed, make_states=lambda room: [])
    structured = StructuredOutput(GrammarCompiler(lambda: None))  # type: ignore[arg-type,return-value]
    runner = CudaRunner(model, decoder, plan, torch.device("cpu"), structured)
    decode, prompts = runner._layouts()

    def recording(layout: Any) -> Recording:
        empty = torch.zeros(0)
        return Recording(layout, Replay(), empty, empty, torch.zeros(layout.samples, dtype=torch.int32))  # type: ignore[arg-type]

    runner._decode_steps = [recording(layout) for layout in decode]
    runner._prompt_steps = [recording(layout) for layout in prompts]
    return runner


def drain(address: str) -> None:
    """The API process's end of the socket."""
    socket = zmq.Context().socket(zmq.PAIR)
    socket.set_hwm(0)
    socket.bind(address)
    while socket.recv():
        pass


class Clients:
    """Stands for the socket that the engine reads: a new request for each that ended."""

    def __init__(self, rows: int, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self._random = random.Random(0)
        self._messages = [self._request(index, 1 + index % OUTPUT_TOKENS) for index in range(rows)]
        self._count = rows
        self.num_finished = 0

    def _request(self, index: int, max_tokens: int) -> bytes:
        request = EngineRequest(
            request_id=f"cmpl-{index:032x}-0-0",
            prompt_token_ids=[self._random.randrange(150_000) for _ in range(PROMPT_TOKENS)],
            sampling=Sampling(temperature=0.0),
            stop_token_ids=[],
            max_tokens=max_tokens,
            seed=index,
            arrival_s=time.monotonic(),
        )
        return wire.encode(wire.Add([request]))

    def poll(self, timeout_ms: int) -> int:
        self._socket.poll(0)
        return len(self._messages)

    def recv(self) -> bytes:
        return self._messages.pop()

    def ended(self, count: int) -> None:
        self.num_finished += count
        for _ in range(count):
            self._count += 1
            self._messages.append(self._request(self._count, OUTPUT_TOKENS))


def run(rows: int, steps: int) -> dict[str, Any]:
    num_blocks = rows * 12
    runner = make_runner(rows, num_blocks)
    policy = StepPolicy(max_num_batched_tokens=2048)
    scheduler = Scheduler(BlockPool(num_blocks, 64), policy, max_num_seqs=rows, enable_prefix_caching=False)
    core, arrivals, parts = EngineCore(scheduler, runner), Arrivals(None), Parts()
    gc.collect()
    gc.freeze()  # as runner/start.py does
    with tempfile.TemporaryDirectory() as folder:
        address = f"ipc://{folder}/socket"
        api = multiprocessing.get_context("spawn").Process(target=drain, args=(address,))
        api.start()
        socket = zmq.Context().socket(zmq.PAIR)
        socket.set_hwm(0)
        socket.connect(address)
        clients = Clients(rows, socket)
        turn = watch_all(parts, core, runner, socket, clients, arrivals)
        for _ in range(2 * OUTPUT_TOKENS):
            clients.ended(sum(delta.finish_reason is not None for delta in turn()))
        parts.seconds.clear()
        clients.num_finished = 0
        for _ in range(steps):
            clients.ended(sum(delta.finish_reason is not None for delta in turn()))
        socket.send(b"")
        api.join()
        socket.close()
    found = {part: round(seconds / steps * 1e6, 1) for part, seconds in sorted(parts.seconds.items())}
    return {
        "rows": rows, "steps": steps, "us_a_step": found, "all_us_a_step": round(sum(found.values()), 1),
        "requests_a_step": round(clients.num_finished / steps, 2),
    }  # fmt: skip


def watch_all(
    parts: Parts, core: EngineCore, runner: CudaRunner, socket: Any, clients: Clients, arrivals: Arrivals
) -> Callable[[], Any]:
    """One turn of the engine's loop, its parts watched."""
    scheduler = core.scheduler
    parts.watch(scheduler, "schedule", "schedule")
    parts.watch(scheduler, "commit", "commit")
    parts.watch(scheduler, "add", "add")
    parts.watch(runner.slots, "update", "slots.update")
    parts.watch(runner, "_upload", "fill and upload")
    runner_submit = parts.watched(runner.submit, "submit")

    def submit(batch: Any) -> Any:
        handle = runner_submit(batch)
        parts.watch(handle, "result", "result")
        return handle

    runner.submit = submit  # type: ignore[method-assign]
    take = parts.watched(engine_main._take_messages, "take messages")
    send = parts.watched(socket.send, "send")
    encode = parts.watched(wire.encode, "encode")
    step = parts.watched(core.step, "step")

    def turn() -> Any:
        take(clients, core, arrivals, 0)
        for request in arrivals.ready():
            core.add(request)
        deltas = step()
        send(encode(wire.Deltas(deltas, core.stats())))
        return deltas

    return turn


if __name__ == "__main__":
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 256
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else 1000
    print(json.dumps(run(rows, steps)))
