"""Worker processes for text. A worker that takes too long is killed, and another one takes its place."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from pathlib import Path

from fastqwen.config import EngineConfig
from fastqwen.errors import BadCheckpoint, BadRequest, Overloaded
from fastqwen.model_config import ModelConfig
from fastqwen.text import worker
from fastqwen.text.worker import LENGTH_BYTES, Begin, Compile, Ids, Job, Refused

log = logging.getLogger("fastqwen.server")

FIRST_GRAMMAR_S = 10.0  # a worker's first grammar has to wait for its tokenizer
ANY_GRAMMAR = Compile('start: "a"')  # so that it is not a user's grammar that gets this time
MAX_WAITING = 4096


class WorkerGone(Exception):
    """The process ended instead of answering."""


class TextPool:
    """``run`` raises BadRequest where the work is refused or takes longer than ``timeout_s``."""

    def __init__(
        self,
        config: EngineConfig,
        path: Path,
        model: ModelConfig,
        *,
        num_workers: int = 2,
        timeout_s: float = 2.0,
        start_timeout_s: float = 60.0,
        log_format: str = "text",
    ) -> None:
        self._begin = worker.encode(Begin(config, str(path), model))
        self._timeout_s = timeout_s
        self._start_timeout_s = start_timeout_s
        self._source = str(path)
        self._log_format = log_format
        self._idle: asyncio.LifoQueue[_Process | None] = asyncio.LifoQueue()
        self._num_waiting = 0
        self._all: set[_Process] = set()
        self._tasks: set[asyncio.Task[list[int]]] = set()
        for _ in range(num_workers):
            self._idle.put_nowait(None)  # started when needed

    async def start(self) -> None:
        """Start one worker now, so that the first request need not wait for it.

        Raises BadCheckpoint if tokenizer and template cannot even be read.
        """
        await self._idle.get()
        self._idle.put_nowait(await self._new())

    async def run(self, job: Job) -> list[int]:
        if self._num_waiting >= MAX_WAITING:
            raise Overloaded(
                f"{self._num_waiting} prompts wait to be read, no more are accepted: try again in a moment"
            )
        self._num_waiting += 1
        # A task of its own: a client that leaves must not leave half an answer in a worker's pipe.
        task = asyncio.create_task(self._run(job))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            return await asyncio.shield(task)
        finally:
            self._num_waiting -= 1

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for process in list(self._all):
            await self._end(process)

    async def _run(self, job: Job) -> list[int]:
        process = await self._idle.get()
        try:
            if process is None or process.ended:
                process = await self._new()
            answer = await self._ask(process, job)
        except BaseException as error:
            await self._end(process)
            process = None
            if isinstance(error, TimeoutError):
                why = f"took longer than {self._timeout_s:g} s and was given up"
            elif isinstance(error, (WorkerGone, OSError)):
                why = "ended the process that did it"
            else:
                raise
            raise BadRequest(f"reading this input {why}: make it shorter or simpler") from None
        finally:
            self._idle.put_nowait(process)
        if isinstance(answer, Refused):
            raise BadRequest(answer.message, answer.param, answer.code)
        return answer.token_ids

    async def _ask(self, process: _Process, job: Job) -> Ids | Refused:
        if isinstance(job, Compile) and not process.has_compiled:
            async with asyncio.timeout(FIRST_GRAMMAR_S):
                await process.ask(worker.encode(ANY_GRAMMAR))
            process.has_compiled = True
        async with asyncio.timeout(self._timeout_s):
            return await process.ask(worker.encode(job))

    async def _new(self) -> _Process:
        made = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # nothing in the working folder is imported
            "-m",
            "fastqwen.text.worker",
            self._log_format,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the server to act upon
        )
        process = _Process(made)
        self._all.add(process)
        try:
            async with asyncio.timeout(self._start_timeout_s):
                await process.ask(self._begin)
        except (TimeoutError, WorkerGone, OSError) as error:
            await self._end(process)
            why = "took too long" if isinstance(error, TimeoutError) else "ended the process that did it"
            raise BadCheckpoint(f"reading the tokenizer and chat template of {self._source} {why}") from None
        return process

    async def _end(self, process: _Process | None) -> None:
        if process is not None:
            self._all.discard(process)
            await process.kill()


class _Process:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.has_compiled = False

    @property
    def ended(self) -> bool:
        return self._process.returncode is not None

    async def ask(self, data: bytes) -> Ids | Refused:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(len(data).to_bytes(LENGTH_BYTES, "little") + data)
        await self._process.stdin.drain()
        try:
            head = await self._process.stdout.readexactly(LENGTH_BYTES)
            body = await self._process.stdout.readexactly(int.from_bytes(head, "little"))
        except asyncio.IncompleteReadError:
            raise WorkerGone from None
        answer: Ids | Refused = worker.answers.decode(body)
        return answer

    async def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()
