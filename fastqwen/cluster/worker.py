"""``fastqwen worker``: the engine that ``serve`` runs, for the front ends of a cluster."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import time
import uuid
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import msgspec

from fastqwen.client.engine import Ready
from fastqwen.client.loading_bar import LoadingBar
from fastqwen.cluster.beacon import Beacon
from fastqwen.cluster.config import CONTROLLER_PORT, RANKS_PORT, WorkerConfig
from fastqwen.cluster.engine_over_hosts import COMMAND
from fastqwen.cluster.machine import this_machine
from fastqwen.cluster.parcel import identity_of, pack
from fastqwen.cluster.places import Places, check_even
from fastqwen.cluster.port import EnginePort
from fastqwen.cluster.secret import VARIABLE, read_token
from fastqwen.cluster.sockets import address_of_worker, endpoint, free_port, own_address, split_address, written
from fastqwen.cluster.wire import PROTOCOL, Card, Files, Member
from fastqwen.config import EngineConfig
from fastqwen.errors import FastqwenError
from fastqwen.hub import find_checkpoint
from fastqwen.ipc.engine_process import ENGINE_COMMAND
from fastqwen.ipc.process_engine import ProcessEngine
from fastqwen.lifeline import end_with_starter
from fastqwen.logs import configure_logging
from fastqwen.server.http.listen import run_loop
from fastqwen.version import __version__

log = logging.getLogger("fastqwen.cluster")

LOOK_EVERY_S = 0.05
# An engine that is silent for so long hangs. Between two words lies a step: on a GPU a second at most, on a CPU as long as it takes
# to compute a chunk of a large model's prompt.
HUNG_AFTER_S, HUNG_ON_A_CPU_AFTER_S = 60.0, 600.0
ON_THE_WAY_S = 0.5  # requests that were sent before the front ends heard of the drain
FAREWELL_S = 0.3  # for the last news to reach the front ends


def work(
    engine_config: EngineConfig,
    config: WorkerConfig,
    token_file: Path | None = None,
    *,
    engine_command: Sequence[str] = ENGINE_COMMAND,
) -> int:
    """Runs until a signal. Returns the exit status. Raises FastqwenError for what the user must change."""
    end_with_starter()
    configure_logging(config.log_format)
    token = read_token(token_file)
    if config.rank_hosts:
        engine_command = over_hosts(engine_config, config, token)
    path, model = find_checkpoint(engine_config)
    portable, files = pack(engine_config, path)
    return run_loop(_work(engine_config, config, token, path, Files(model, files), portable, engine_command))


async def _work(
    engine_config: EngineConfig,
    config: WorkerConfig,
    token: str,
    path: Path,
    files: Files,
    portable: EngineConfig,
    command: Sequence[str],
) -> int:
    controller = split_address(config.controller, CONTROLLER_PORT, "--controller")
    host = config.host or own_address(*controller)
    with closing(LoadingBar()) as bar:

        def on_ready(ready: Ready) -> None:
            bar.close()
            port.files = files
            port.card = Card(PROTOCOL, portable, ready, identity_of(portable, ready, files.files))
            port.tell_all()

        engine = ProcessEngine(
            engine_config, path, on_loading=bar.update, on_ready=on_ready, command=command, log_format=config.log_format
        )
        port = EnginePort(engine, token)
        number = port.bind(host, config.port)
        address = address_of_worker(host, number, config.worker_address)
        worker = Worker(engine, port, address, engine_config.served_names, config.drain_timeout_s)
        beacon = Beacon(token, endpoint(*controller), worker.describe, worker.drain)
        log.info("worker of %s at %s", ", ".join(engine_config.served_names), address)
        try:
            await worker.run()
        finally:
            await port.close()
            await beacon.close()
            await engine.stop()
    if engine.failure:
        raise FastqwenError(engine.failure)
    return 0


class Worker:
    """An engine and its port, from their start until the last request after the word to drain."""

    def __init__(
        self, engine: ProcessEngine, port: EnginePort, address: str, names: list[str], drain_timeout_s: float
    ) -> None:
        self._engine, self._port = engine, port
        self._drain_timeout_s = drain_timeout_s
        self._aborts = False
        self._waking: asyncio.Task[None] | None = None
        self._member = Member(
            key=uuid.uuid4().hex,
            address=address,
            names=names,
            kind="engine",
            state="loading",
            host=socket.gethostname(),
            pid=os.getpid(),
            version=__version__,
            started_s=time.time(),
        )

    def describe(self) -> Member:
        stats, ready = self._engine.stats(), self._engine.ready
        found = msgspec.structs.replace(
            self._member,
            state=self._engine.state,
            is_draining=self._port.is_draining,
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            kv_usage=stats.kv_usage,
            machine=this_machine(),
        )
        if ready is None:
            return found
        plan = ready.plan
        return msgspec.structs.replace(
            found,
            device=plan.device,
            max_model_len=plan.max_model_len,
            weights_bytes=plan.weights_bytes,
            kv_bytes=plan.num_blocks * plan.block_size * plan.kv_bytes_per_token,
        )

    def drain(self) -> None:
        """Take nothing new, finish what runs, end. A second signal aborts."""
        if not self._port.is_draining:
            log.info(
                "finishing %d running requests; a second signal hands them to other workers", self._port.num_requests
            )
            self._port.is_draining = True
            self._port.tell_all()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        self._port.start()
        self._engine.start()
        drained_s: float | None = None
        told: object = None
        while self._engine.state != "failed" and not self._aborts:
            if self._engine.state != told:
                told = self._engine.state
                self._port.tell_all()
            if self._port.is_draining:
                drained_s = loop.time() if drained_s is None else drained_s
                drains_for_s = loop.time() - drained_s
                if (
                    not self._port.num_requests and drains_for_s > ON_THE_WAY_S
                ) or drains_for_s > self._drain_timeout_s:
                    break
            if self._hangs:
                await self._start_again()
            await asyncio.sleep(LOOK_EVERY_S)
        await self._hand_over()

    @property
    def _hangs(self) -> bool:
        engine = self._engine
        if engine.state != "ready" or engine.ready is None:
            return False
        limit_s = HUNG_ON_A_CPU_AFTER_S if engine.ready.plan.device.endswith("CPU") else HUNG_AFTER_S
        return engine.silent_for_s > limit_s

    async def _start_again(self) -> None:
        """Requests of an engine that hangs go on at other workers, while this one gets another process."""
        log.error("the engine has been silent for %.0f s: it is ended and started again", self._engine.silent_for_s)
        await self._engine.sleep()
        self._waking = asyncio.create_task(self._engine.wake_up())  # how it ends is seen by the engine's state
        self._waking.add_done_callback(lambda task: task.cancelled() or task.exception())

    def _on_signal(self) -> None:
        self._aborts = self._port.is_draining
        self.drain()

    async def _hand_over(self) -> None:
        """What still runs ends here as "closed", which front ends take as the word to go on elsewhere."""
        if self._port.num_requests:
            log.warning("%d requests go on at other workers, if there are any", self._port.num_requests)
        await self._engine.stop()
        self._port.tell_all()
        await asyncio.sleep(FAREWELL_S)


def over_hosts(engine_config: EngineConfig, config: WorkerConfig, token: str) -> tuple[str, ...]:
    """The command of an engine whose ranks are on several hosts. Raises BadConfig."""
    check_even(engine_config.tensor_parallel_size, 1 + len(config.rank_hosts))
    host, port = next(split_address(one, RANKS_PORT, "--rank-hosts") for one in config.rank_hosts)
    os.environ[VARIABLE] = token  # for the ranks, which are started by the engine; never in a command line
    here = config.host or own_address(host, port, "--rank-hosts")
    meeting = written(here, config.ranks_port or free_port(here))
    return (*COMMAND, msgspec.json.encode(Places(config.rank_hosts, meeting)).decode())
