"""Coding agents at our address: what each needs to be told, in its process's environment and arguments alone.

Nothing of the user's own settings is read or written; what only fits into a file goes into a folder of this run.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from fastqwen.client.own_server import own_server
from fastqwen.client.remote import RemotePartner, is_address
from fastqwen.config import EngineConfig
from fastqwen.errors import BadConfig, FastqwenError

NO_KEY = "none"  # the programs want one where the server wants none
FOLDER = "{folder}"  # stands for the folder of this run
MAX_OUTPUT_TOKENS = 32_000


@dataclass(frozen=True)
class Place:
    """The server, as the agents are told of it. ``context`` is in tokens."""

    url: str
    model: str
    context: int
    key: str = NO_KEY

    @property
    def max_output(self) -> int:
        """Half of the context at most: the other half is for what is asked."""
        return max(1, min(MAX_OUTPUT_TOKENS, self.context // 2))


@dataclass(frozen=True)
class Settings:
    """``files`` are made in the folder of the run, by their names."""

    arguments: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Agent:
    program: str
    install: str
    settings: Callable[[Place], Settings]


def _claude(place: Place) -> Settings:
    models = ("ANTHROPIC_MODEL", "ANTHROPIC_SMALL_FAST_MODEL", "ANTHROPIC_DEFAULT_OPUS_MODEL",
              "ANTHROPIC_DEFAULT_SONNET_MODEL", "ANTHROPIC_DEFAULT_HAIKU_MODEL")  # fmt: skip
    return Settings(
        environment={
            "ANTHROPIC_BASE_URL": place.url,
            "ANTHROPIC_AUTH_TOKEN": place.key,
            "ANTHROPIC_API_KEY": "",
            **dict.fromkeys(models, place.model),
            "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(place.max_output),
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        }
    )


def _codex(place: Place) -> Settings:
    told = {
        "model": place.model,
        "model_provider": "fastqwen",
        "model_context_window": place.context,
        "model_providers.fastqwen.name": "fastqwen",
        "model_providers.fastqwen.base_url": f"{place.url}/v1",
        "model_providers.fastqwen.wire_api": "responses",
        "model_providers.fastqwen.env_key": "FASTQWEN_AGENT_KEY",
    }
    arguments = [word for name, value in told.items() for word in ("-c", f"{name}={json.dumps(value)}")]
    return Settings(arguments=arguments, environment={"FASTQWEN_AGENT_KEY": place.key})


def _qwen_code(place: Place) -> Settings:
    names = {"OPENAI_BASE_URL": f"{place.url}/v1", "OPENAI_API_KEY": place.key, "OPENAI_MODEL": place.model}
    return Settings(arguments=["--auth-type", "openai"], environment=names)


def _opencode(place: Place) -> Settings:
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "fastqwen",
        "options": {"baseURL": f"{place.url}/v1", "apiKey": place.key},
        "models": {place.model: {"limit": {"context": place.context, "output": place.max_output}}},
    }
    config = {"provider": {"fastqwen": provider}, "model": f"fastqwen/{place.model}"}
    return Settings(environment={"OPENCODE_CONFIG_CONTENT": json.dumps(config)})


def _aider(place: Place) -> Settings:
    name = f"openai/{place.model}"
    known = {
        "max_input_tokens": place.context, "max_output_tokens": place.max_output, "litellm_provider": "openai",
        "mode": "chat", "input_cost_per_token": 0, "output_cost_per_token": 0,
    }  # fmt: skip
    file = "models.json"
    return Settings(
        arguments=["--model", name, "--model-metadata-file", f"{FOLDER}/{file}"],
        environment={"OPENAI_API_BASE": f"{place.url}/v1", "OPENAI_API_KEY": place.key},
        files={file: json.dumps({name: known})},
    )


AGENTS = {
    "claude": Agent("claude", "npm install -g @anthropic-ai/claude-code", _claude),
    "codex": Agent("codex", "npm install -g @openai/codex", _codex),
    "qwen-code": Agent("qwen", "npm install -g @qwen-code/qwen-code", _qwen_code),
    "opencode": Agent("opencode", "npm install -g opencode-ai", _opencode),
    "aider": Agent("aider", "python -m pip install aider-chat", _aider),
}


def launch(name: str, model: str, arguments: Sequence[str], *, api_key: str | None, only_print: bool) -> int:
    """The agent's exit status. ``model`` is a server's address, or a model to serve meanwhile. Raises FastqwenError."""
    if name not in AGENTS:
        raise BadConfig(f"{name} is none of {', '.join(AGENTS)}")
    agent = AGENTS[name]
    program = shutil.which(agent.program)
    if program is None and not only_print:
        raise BadConfig(f"{agent.program} is not installed: {agent.install}")
    with _server(model) as url:
        place = _place(url, api_key)
        settings = agent.settings(place)
        if only_print:
            if not is_address(model):
                print(
                    f"# first, and as long as it is used: fastqwen serve {shlex.quote(model)} --port {urlsplit(url).port}"
                )
            print(as_text(agent, settings, arguments))
            return 0
        with tempfile.TemporaryDirectory(prefix="fastqwen-") as folder, _interrupts_are_the_agents():
            for file, text in settings.files.items():
                (Path(folder) / file).write_text(text)
            told = [word.replace(FOLDER, folder) for word in settings.arguments]
            done = subprocess.run(
                [program or agent.program, *told, *arguments], env={**os.environ, **settings.environment}, check=False
            )
            return done.returncode


def as_text(agent: Agent, settings: Settings, arguments: Sequence[str]) -> str:
    """Lines for a shell; files stand in front as what they hold."""
    files = [f"# {FOLDER}/{name}: {text}" for name, text in settings.files.items()]
    exports = [f"export {name}={shlex.quote(value)}" for name, value in settings.environment.items()]
    return "\n".join([*files, *exports, shlex.join([agent.program, *settings.arguments, *arguments])])


def _place(url: str, api_key: str | None) -> Place:
    partner = RemotePartner(url, api_key)
    if partner.max_model_len is None:
        raise FastqwenError(f"the server at {partner.url} does not say how long its model's context is")
    return Place(partner.url, partner.name, partner.max_model_len, api_key or NO_KEY)


@contextmanager
def _server(model: str) -> Iterator[str]:
    """The address of a server that has the model: as given, or one that runs as long as this."""
    if is_address(model):
        yield model
        return
    print(f"INFO:     Starting a server for {model} ...", file=sys.stderr)
    with own_server(EngineConfig(model=model)) as url:
        yield url


@contextmanager
def _interrupts_are_the_agents() -> Iterator[None]:
    """Ctrl-C goes to all processes of a terminal; the agent alone knows what it means. (A handler, because the agent would
    inherit that a signal is ignored.)"""
    before = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
