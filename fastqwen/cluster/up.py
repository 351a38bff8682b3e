"""``fastqwen up cluster.yaml``: starts all roles, starts again what dies, scales the workers, and ends them in order.

Controller, API and page run here. Workers run here as well, or where Ray puts them (on_ray.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from fastqwen.cluster.beacon import Watcher
from fastqwen.cluster.cluster_file import ClusterFile, Group, Needs
from fastqwen.cluster.config import CONTROLLER_PORT
from fastqwen.cluster.controller import until_signal
from fastqwen.cluster.ray_node import RayNode, head_words, ray_environment
from fastqwen.cluster.scaling import Load, Scaler
from fastqwen.cluster.secret import VARIABLE, read_token
from fastqwen.cluster.sockets import endpoint, split_address, written
from fastqwen.cluster.wire import Member, Members
from fastqwen.errors import FastqwenError
from fastqwen.lifeline import PARENT_VARIABLE
from fastqwen.logs import configure_logging
from fastqwen.server.http.listen import run_loop

LOOK_EVERY_S = 0.5
NOTHING = Needs(cpus=0)
PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0  # before a role that died is started again; doubled each time
MISTAKE, USAGE = 1, 2  # exit statuses of the command line
FIRST_START_S, FIRST_LOAD_S = 10.0, 60.0
STEADY_S = 60.0  # one that ran so long dies for the first time again
END_WITHIN_S = 75.0  # longer than --drain-timeout

log = logging.getLogger("fastqwen.cluster")


class Running(Protocol):
    """A process of a role, wherever it runs."""

    def poll(self) -> int | None:
        """Its exit status, or None while it runs."""

    def terminate(self) -> None: ...

    def kill(self) -> None: ...


class Launcher(Protocol):
    def launch(self, words: list[str], needs: Needs) -> Running:
        """``fastqwen`` with these words."""


class Here:
    """Processes on this machine. Each replica with GPUs gets its own."""

    def __init__(self, token: str) -> None:
        self._token = token
        self._gpus: dict[int, subprocess.Popen[bytes]] = {}

    def launch(self, words: list[str], needs: Needs) -> Running:
        environment = {**os.environ, VARIABLE: self._token, PARENT_VARIABLE: str(os.getpid())}
        taken: list[int] = []
        if needs.gpus:
            free = (
                number for number in range(1024) if number not in self._gpus or self._gpus[number].poll() is not None
            )
            taken = [next(free) for _ in range(needs.gpus)]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, taken))
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "fastqwen.cli.main", *words], stdin=subprocess.DEVNULL, env=environment
        )
        self._gpus.update(dict.fromkeys(taken, process))
        return process


@dataclass
class Kept:
    """A role that is to run, and is started again when it ends."""

    name: str
    words: list[str]
    needs: Needs = NOTHING
    running: Running | None = None
    started_s: float = 0.0
    pause_s: float = PAUSE_S
    next_start_s: float = 0.0
    leaves: bool = False  # it ends on purpose


@dataclass
class Workers:
    group: Group
    scaler: Scaler
    kept: list[Kept] = field(default_factory=list)


class Supervisor:
    """``workers_controller``: where workers find the controller, if not at the address that serves on this machine."""

    def __init__(
        self, file: ClusterFile, here: Launcher, elsewhere: Launcher, workers_controller: str | None = None
    ) -> None:
        self._here, self._elsewhere = here, elsewhere
        near = ["--controller", file.controller_address]
        self.controller = None if file.controller is None else Kept("controller", ["controller", *file.controller])
        self.fronts = [Kept(name, [name, *near, *words]) for name, words in file.fronts.items()]
        self._near = ["--controller", workers_controller or file.controller_address]
        self.workers = [Workers(group, Scaler(group.min_replicas, group.max_replicas)) for group in file.groups]
        self._num_made = 0

    @property
    def roles(self) -> list[Kept]:
        """What runs once."""
        return [one for one in (self.controller, *self.fronts) if one is not None]

    def look(self, now_s: float, members: list[Member]) -> None:
        """Start what should run and does not, and as many workers as each group needs."""
        for one in self.roles:
            self._keep(one, self._here, now_s)
        for workers in self.workers:
            self._scale(workers, members, now_s)
            workers.kept = [one for one in workers.kept if not (one.leaves and _has_ended(one))]
            for one in workers.kept:
                if not one.leaves:
                    self._keep(one, self._elsewhere, now_s)

    def _scale(self, workers: Workers, members: list[Member], now_s: float) -> None:
        group, staying = workers.group, [one for one in workers.kept if not one.leaves]
        own = _members_of(group, members)
        ready = [one for one in own if one.state == "ready" and not one.is_draining]
        load = Load(
            num_ready=len(ready),
            num_loading=max(0, len(staying) - len(ready)),
            num_waiting=sum(one.num_waiting for one in ready),
            num_running=sum(one.num_running for one in ready),
            kv_usage=sum(one.kv_usage for one in ready) / max(1, len(ready)),
        )
        wanted = workers.scaler.look(load, now_s)
        while len(staying) < wanted:
            self._num_made += 1
            made = Kept(f"worker {self._num_made}", ["worker", *self._near, *group.words], group.needs)
            staying.append(made)
            workers.kept.append(made)
        for one in staying[wanted:]:
            one.leaves = True
            log.info("%s is not needed any more and finishes what it has", one.name)
            if one.running is not None:
                one.running.terminate()

    def _keep(self, one: Kept, launcher: Launcher, now_s: float) -> None:
        if one.running is not None:
            status = one.running.poll()
            if status is None:
                return
            steady = now_s - one.started_s > STEADY_S
            one.pause_s = PAUSE_S if steady else min(2 * one.pause_s, LONGEST_PAUSE_S)
            one.next_start_s = now_s + one.pause_s
            one.running = None
            told = log.info if status == 0 else log.error  # one that was drained has done what it was told
            told("%s ended with status %s and is started again in %g s", one.name, status, one.pause_s)
        if now_s >= one.next_start_s:
            one.running = launcher.launch(one.words, one.needs)
            one.started_s = now_s

    async def end(self) -> None:
        """What takes requests first, what knows the others last; each gets the time to drain."""
        every = [one for workers in self.workers for one in workers.kept]
        for roles in (self.fronts, every, [] if self.controller is None else [self.controller]):
            await _ended([one.running for one in roles if one.running is not None])


def _has_ended(one: Kept) -> bool:
    return one.running is None or one.running.poll() is not None


def _members_of(group: Group, members: list[Member]) -> list[Member]:
    names = {
        group.words[0],
        *(after for word, after in zip(group.words, group.words[1:], strict=False) if word in NAMES),
    }
    return [one for one in members if names & set(one.names)]


NAMES = ("--served-model-name", "--model-names")


async def _ended(processes: list[Running]) -> None:
    for one in processes:
        one.terminate()
    until_s = time.monotonic() + END_WITHIN_S
    while any(one.poll() is None for one in processes) and time.monotonic() < until_s:
        await asyncio.sleep(0.05)
    for one in processes:
        if one.poll() is None:
            one.kill()


def up(file: ClusterFile, token_file: Path | None, log_format: str) -> int:
    """Runs until a signal. Returns the exit status. Raises FastqwenError for what the user must change."""
    configure_logging(log_format)
    token = read_token(token_file, make=True)
    return keep(file, token)


def keep(file: ClusterFile, token: str) -> int:
    """As ``up``, with the logs and the token at hand."""
    here = Here(token)
    with contextlib.ExitStack() as stack:
        address = file.ray_address
        if file.ray_head is not None:
            host = "0.0.0.0" if file.is_open else "127.0.0.1"  # noqa: S104
            stack.enter_context(RayNode(head_words(host, file.ray_head), token))
            address = f"127.0.0.1:{file.ray_head}" if not file.is_open else "auto"
            os.environ.update(ray_environment(token))
        if address is None:
            return run_loop(_up(Supervisor(file, here, here), file, token))
        from fastqwen.cluster.on_ray import OnRay

        placing = stack.enter_context(contextlib.closing(OnRay(address, token)))
        port = split_address(file.controller_address, CONTROLLER_PORT, "controller")[1]
        seen_from_afar = written(placing.node_address, port) if file.is_open else None
        return run_loop(_up(Supervisor(file, here, placing, seen_from_afar), file, token))


async def _up(supervisor: Supervisor, file: ClusterFile, token: str) -> int:
    ending = asyncio.create_task(until_signal())
    members: list[Member] = []

    def note(told: Members) -> None:
        members[:] = told.members

    watcher = Watcher(token, endpoint(*split_address(file.controller_address, CONTROLLER_PORT, "controller")), note)
    try:
        while not ending.done():
            _check_first_start(supervisor)  # before the look, which starts again what has ended
            supervisor.look(time.monotonic(), members)
            await asyncio.wait([ending], timeout=LOOK_EVERY_S)
    finally:
        await watcher.close()
        await supervisor.end()
    return 0


def _check_first_start(supervisor: Supervisor) -> None:
    """A role that cannot start at all was told something that cannot hold: its own line says what. Workers of a cluster.yaml
    are tried again, since what they miss may come; but a flag that does not exist never will."""
    workers = [one for group in supervisor.workers for one in group.kept]
    found = [(one, FIRST_START_S, {MISTAKE, USAGE}) for one in supervisor.roles]
    found += [(one, FIRST_LOAD_S, {USAGE} if supervisor.roles else {MISTAKE, USAGE}) for one in workers]
    for one, within_s, statuses in found:
        running = one.running
        if (
            running is not None
            and running.poll() in statuses
            and one.pause_s == PAUSE_S
            and time.monotonic() - one.started_s < within_s
        ):
            raise FastqwenError(f"{one.name} could not start, its line above says why")
