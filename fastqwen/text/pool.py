"""Worker processes for text. A worker that takes too long is killed, and another one takes its place.

What the input costs is the client's matter, what happens to a worker is not: one that was stopped or killed from outside is
replaced and its work done again, and where that does not help the answer is 503. Work that may take long waits in a line
of its own, and leaves one worker to the rest.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from pathlib import Path

from fastqwen.config import EngineConfig
from fastqwen.errors import BadCheckpoint, BadRequest, Overloaded, ReadersGone
from fastqwen.lifeline import PARENT_VARIABLE
from fastqwen.model_config import ModelConfig
from fastqwen.text import worker
from fastqwen.text.worker import LENGTH_BYTES, Answer, Begin, Check, Checked, Compile, Ids, Job, Refused, TextJob

log = logging.getLogger("fastqwen.server")

# A worker's first grammar has to wait for its tokenizer, its first body for what knows the bodies: done before with a job of
# ours, so that it is not a user's that gets this time.
FIRST_OF_A_KIND_S = 20.0
Frames = tuple[bytes | bytearray, ...]
FIRST_JOBS: dict[type, Job] = {Compile: Compile('start: "a"'), Check: Check("", False, 0)}
MAX_WAITING = 4096
LAST_WORDS_S = 1.0


HEAVY_BYTES = 64 * 2**10  # a job of so many bytes may take long; one with a grammar always may
MAX_TRIES = 12  # two for each time that all of two workers are killed
RETRY_PAUSE_S = 0.05
BUSY_SHARE = 0.1  # of a timeout: a worker that computed less was stopped, or got no processor
GIVEN_UP_SIGNALS = (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE)  # what an input may bring about


class WorkerGone(Exception):
    """The process ended instead of answering."""


class TextPool:
    """``run`` raises BadRequest where the work is refused or takes longer than ``timeout_s``, ReadersGone where workers were
    stopped or killed."""

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
        checks: str = "",
    ) -> None:
        """``checks``: the module that reads requests' bodies (``fastqwen/text/worker.py``)."""
        self._begin = worker.encode(Begin(config, str(path), model))
        self._timeout_s = timeout_s
        self._start_timeout_s = start_timeout_s
        self._source = str(path)
        self._arguments = [log_format, checks]
        self._idle: asyncio.LifoQueue[_Process | None] = asyncio.LifoQueue()
        self._heavy = asyncio.Semaphore(max(1, num_workers - 1))
        self._num_waiting = 0
        self._all: set[_Process] = set()
        self._tasks: set[asyncio.Task[Answer]] = set()
        for _ in range(num_workers):
            self._idle.put_nowait(None)  # started when needed

    async def start(self) -> None:
        """Start one worker now, so that the first request need not wait for it.

        Raises BadCheckpoint if tokenizer and template cannot even be read.
        """
        await self._idle.get()
        self._idle.put_nowait(await self._new())

    async def run(self, job: TextJob) -> list[int]:
        answer = await self._answer(job)
        assert isinstance(answer, Ids)
        return answer.token_ids

    async def check(self, job: Check, body: bytes | bytearray) -> Checked:
        answer = await self._answer(job, body)
        assert isinstance(answer, Checked)
        return answer

    async def _answer(self, job: Job, *more: bytes | bytearray) -> Ids | Checked:
        if self._num_waiting >= MAX_WAITING:
            raise Overloaded(
                f"{self._num_waiting} prompts wait to be read, no more are accepted: try again in a moment"
            )
        self._num_waiting += 1
        # A task of its own: a client that leaves must not leave half an answer in a worker's pipe.
        task = asyncio.create_task(self._run(job, *more))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            answer = await asyncio.shield(task)
        finally:
            self._num_waiting -= 1
        if isinstance(answer, Refused):
            raise BadRequest(answer.message, answer.param, answer.code)
        return answer

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for process in list(self._all):
            await self._end(process)

    async def _run(self, job: Job, *more: bytes | bytearray) -> Answer:
        """``more`` is sent behind the job."""
        kind, frames = type(job), (worker.encode(job), *more)
        if kind not in FIRST_JOBS and len(frames[0]) <= HEAVY_BYTES:
            return await self._tried(kind, frames)
        async with self._heavy:
            return await self._tried(kind, frames)

    async def _tried(self, kind: type[Job], frames: Frames) -> Answer:
        """Asked again where it was not the job's fault that there was no answer."""
        for _ in range(MAX_TRIES):
            answer = await self._asked(kind, frames)
            if answer is not None:
                return answer
            await asyncio.sleep(RETRY_PAUSE_S)
        raise ReadersGone("the processes that read prompts were stopped or killed: send the request again")

    async def _asked(self, kind: type[Job], frames: Frames) -> Answer | None:
        """None where the worker was stopped, killed or could not be started."""
        process = await self._idle.get()
        answer: Answer | None = None
        try:
            if process is None or process.ended:
                await self._end(process)
                process = await self._new()
            before_s = process.computed_s()
            answer = await self._ask(process, kind, frames)
        except TimeoutError:
            assert process is not None
            if process.computed_s() - before_s >= BUSY_SHARE * self._timeout_s:
                why = f"took longer than {self._timeout_s:g} s and was given up"
                raise BadRequest(f"reading this input {why}: make it shorter or simpler") from None
        except (WorkerGone, OSError):
            if process is not None and await process.failed_by_itself():
                why = "ended the process that did it"
                raise BadRequest(f"reading this input {why}: make it shorter or simpler") from None
        except BadCheckpoint as error:
            log.error("%s", error)
        finally:
            if answer is None:
                await self._end(process)
                process = None
            self._idle.put_nowait(process)
        return answer

    async def _ask(self, process: _Process, kind: type[Job], frames: Frames) -> Answer:
        if kind in FIRST_JOBS and kind not in process.has_done:
            async with asyncio.timeout(FIRST_OF_A_KIND_S):
                await process.ask(worker.encode(FIRST_JOBS[kind]), *([b""] if kind is Check else []))
            process.has_done.add(kind)
        async with asyncio.timeout(self._timeout_s):
            return await process.ask(*frames)

    async def _new(self) -> _Process:
        made = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # nothing in the working folder is imported
            "-m",
            "fastqwen.lifeline",
            "fastqwen.text.worker",
            *self._arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            # A text that a tokenizer fails at is told its client; the library prints a line of its own, which is enough.
            env={**os.environ, PARENT_VARIABLE: str(os.getpid()), "RUST_BACKTRACE": "0"},
            start_new_session=True,  # Ctrl-C is for the server to act upon
        )
        process = _Process(made)
        self._all.add(process)
        try:
            async with asyncio.timeout(self._start_timeout_s):
                answer = await process.ask(self._begin)
        except (TimeoutError, WorkerGone, OSError) as error:
            await self._end(process)
            why = "took too long" if isinstance(error, TimeoutError) else "ended the process that did it"
            raise BadCheckpoint(f"reading the tokenizer and chat template of {self._source} {why}") from None
        if isinstance(answer, Refused):
            await self._end(process)
            raise BadCheckpoint(answer.message)
        return process

    async def _end(self, process: _Process | None) -> None:
        if process is not None:
            self._all.discard(process)
            await process.kill()


class _Process:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.has_done: set[type[Job]] = set()

    @property
    def ended(self) -> bool:
        return self._process.returncode is not None

    async def ask(self, *frames: bytes | bytearray) -> Answer:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            for frame in frames:
                self._process.stdin.write(len(frame).to_bytes(LENGTH_BYTES, "little"))
                self._process.stdin.write(frame)
            await self._process.stdin.drain()
            head = await self._process.stdout.readexactly(LENGTH_BYTES)
            body = await self._process.stdout.readexactly(int.from_bytes(head, "little"))
        except (asyncio.IncompleteReadError, OSError, RuntimeError):  # RuntimeError: uvloop's word for a closed pipe
            raise WorkerGone from None
        answer: Answer = worker.answers.decode(body)
        return answer

    def computed_s(self) -> float:
        """Processor time so far; 0 where the process is gone."""
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        except (OSError, IndexError, ValueError):
            return 0.0

    async def failed_by_itself(self) -> bool:
        """Whether what it did ended it, and not somebody's signal."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), LAST_WORDS_S)
        status = self._process.returncode
        return status is not None and (status >= 0 or -status in GIVEN_UP_SIGNALS)

    async def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()
