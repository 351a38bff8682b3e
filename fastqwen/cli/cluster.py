"""fastqwen controller, worker, api, status, up: the roles of many machines."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from fastqwen.cli.options import MODEL_HELP, model_names, with_options
from fastqwen.cluster.config import CONTROLLER_PORT, RANKS_PORT, RAY_PORT, WorkerConfig
from fastqwen.config import EngineConfig, flag
from fastqwen.errors import BadConfig
from fastqwen.server.config import ServerConfig

TokenFile = Annotated[
    Path | None,
    typer.Option(
        help="File with the cluster's token. Default: FASTQWEN_CLUSTER_TOKEN, else what the controller left here."
    ),
]
Controller = Annotated[str, typer.Option(help="HOST:PORT of the controller.")]
NEAR = f"127.0.0.1:{CONTROLLER_PORT}"


def controller(
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = CONTROLLER_PORT,
    ray: Annotated[
        bool, typer.Option("--ray", help="Start Ray's head here as well, so that Ray places workers.")
    ] = False,
    ray_port: Annotated[int, typer.Option(help="Port of that head.", min=1, max=65535)] = RAY_PORT,
    ray_address: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Join this Ray in the place of a head here. Its token must be ours."),
    ] = None,
    token_file: TokenFile = None,
    log_format: Annotated[str, typer.Option(help="text or json.")] = "text",
) -> None:
    """Know the workers of a cluster, so that api and web find them.

    fastqwen controller --host 0.0.0.0
    fastqwen controller --host 0.0.0.0 --ray
    """
    from fastqwen.cluster.controller import ControllerConfig, control

    config = ControllerConfig(
        host=host, port=port, ray=ray, ray_port=ray_port, ray_address=ray_address, token_file=token_file,
        log_format=log_format,
    )  # fmt: skip
    raise typer.Exit(control(config))


def node(
    controller: Controller = NEAR,
    token_file: TokenFile = None,
    log_format: Annotated[str, typer.Option(help="text or json.")] = "text",
) -> None:
    """Bring this machine into the Ray of a controller, which then places workers on it.

    fastqwen node --controller 192.0.2.1:21001
    """
    from fastqwen.cluster.ray_node import join_controllers_ray
    from fastqwen.cluster.secret import read_token
    from fastqwen.logs import configure_logging

    configure_logging(log_format)
    raise typer.Exit(join_controllers_ray(controller, read_token(token_file)))


@with_options(worker_options=WorkerConfig, engine_options=EngineConfig)
def worker(
    worker_options: dict[str, Any],
    engine_options: dict[str, Any],
    model: Annotated[str | None, typer.Argument(help=MODEL_HELP, autocompletion=model_names)] = None,
    upstream: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="In the place of MODEL: a server with an OpenAI-compatible API, like http://localhost:8001/v1.",
        ),
    ] = None,
    upstream_key: Annotated[
        str | None, typer.Option(envvar="FASTQWEN_UPSTREAM_KEY", help="Key of that server. Better: the variable.")
    ] = None,
    replicas: Annotated[int | None, typer.Option(help="Start so many workers of MODEL.", min=1)] = None,
    min_replicas: Annotated[
        int | None, typer.Option(help="As many as the load needs, at least this many,", min=1)
    ] = None,
    max_replicas: Annotated[int | None, typer.Option(help="at most this many.", min=1)] = None,
    ray: Annotated[bool, typer.Option("--ray", help="Start them where the controller's Ray has room.")] = False,
    hosts: Annotated[
        int, typer.Option(help="With --ray: hosts that share each replica's --tensor-parallel-size.", min=1)
    ] = 1,
    token_file: TokenFile = None,
) -> None:
    """Compute MODEL for the cluster of a controller. Several workers of one MODEL share its requests.

    fastqwen worker demo
    fastqwen worker Qwen/Qwen3-0.6B --controller 192.0.2.1:21001 --served-model-name Qwen
    fastqwen worker demo --replicas 2
    fastqwen worker --upstream http://localhost:8001/v1 --controller 192.0.2.1:21001
    """
    from fastqwen.cluster.replicas import ReplicasConfig, replicate
    from fastqwen.cluster.worker import work

    config = WorkerConfig(**worker_options)
    several = ReplicasConfig(
        replicas=replicas, min_replicas=min_replicas, max_replicas=max_replicas, ray=ray, hosts=hosts
    )
    if upstream is not None and model is None:
        from fastqwen.cluster.upstream import relay

        if several.is_asked:
            raise BadConfig(f"--replicas and --ray are for a model that is loaded here, and {upstream} is one server")
        if config.rank_hosts:
            raise BadConfig(f"--rank-hosts is for a model that is loaded here: the server at {upstream} has its own")
        given = {name: value for name, value in engine_options.items() if value != _usual(name)}
        names = given.pop("served_model_name", [])
        if given:
            raise BadConfig(
                f"{flag(min(given))} is for a model that is loaded here: the server at {upstream} has its own"
            )
        raise typer.Exit(relay(upstream, upstream_key, names, config, token_file))
    if model is None or upstream is not None:
        raise BadConfig("give either a MODEL to compute or --upstream URL")
    if several.is_asked:
        raise typer.Exit(replicate(EngineConfig(model=model, **engine_options), config, several, token_file))
    raise typer.Exit(work(EngineConfig(model=model, **engine_options), config, token_file))


def ranks(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Where this machine has the model. Default: under the name that the worker has for it.",
            autocompletion=model_names,
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = RANKS_PORT,
    count: Annotated[
        int | None, typer.Option(help="How many ranks at most. Default: one for each GPU, one without any.", min=1)
    ] = None,
    token_file: TokenFile = None,
    log_format: Annotated[str, typer.Option(help="text or json.")] = "text",
) -> None:
    """Compute a share of a model that is too large for one machine, for a worker on another one.

    fastqwen ranks --host 0.0.0.0
    fastqwen worker MODEL --tensor-parallel-size 2 --rank-hosts 192.0.2.7
    """
    from fastqwen.cluster.rank_host import RanksConfig, lend_ranks

    raise typer.Exit(
        lend_ranks(
            RanksConfig(host=host, port=port, count=count, model=model, token_file=token_file, log_format=log_format)
        )
    )


def _usual(name: str) -> Any:
    """What the command line gives for a field that nobody set."""
    default = next(field.default for field in msgspec.structs.fields(EngineConfig) if field.name == name)
    return [] if default is msgspec.NODEFAULT or (default == [] and isinstance(default, list)) else default


@with_options(server_options=ServerConfig, hidden=("mcp",))
def api(
    server_options: dict[str, Any],
    controller: Controller = NEAR,
    token_file: TokenFile = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="Key that requests must send; several may be given. Better: the variable FASTQWEN_API_KEY."),
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="File with one key per line.")] = None,
) -> None:
    """Serve an OpenAI-compatible API, and the chat page, over all models of a cluster.

    fastqwen api --controller 192.0.2.1:21001 --host 0.0.0.0 --port 8000
    """
    from fastqwen.cluster.front import serve_front
    from fastqwen.server.http.exposure import read_keys

    keys = read_keys(api_key, api_key_file, ServerConfig)
    raise typer.Exit(serve_front(ServerConfig(**server_options, api_keys=keys), controller, token_file))


def status(
    controller: Controller = NEAR,
    token_file: TokenFile = None,
    drain: Annotated[
        str | None,
        typer.Option(
            help="Let this worker (its address, or a model's name for all of its) finish and end.", metavar="WORKER"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per line.")] = False,
) -> None:
    """List the workers of a cluster: their models, states, load and memory.

    fastqwen status
    fastqwen status --controller 192.0.2.1:21001 --drain 192.0.2.7:21002
    """
    from fastqwen.cluster.beacon import ask_controller
    from fastqwen.cluster.secret import read_token
    from fastqwen.cluster.sockets import endpoint, split_address
    from fastqwen.cluster.status import table
    from fastqwen.cluster.wire import Ask, Drain

    address = endpoint(*split_address(controller, CONTROLLER_PORT, "--controller"))
    question = Ask() if drain is None else Drain(drain)
    found = asyncio.run(ask_controller(read_token(token_file), address, question))
    if drain is not None and not found.num_drained:
        raise BadConfig(f"--drain {drain}: no worker has that address, and no model that name")
    if as_json:
        for member, silent_s in zip(found.members, found.silent_s, strict=True):
            print(json.dumps({**msgspec.to_builtins(member), "silent_s": round(silent_s, 3)}))
        return
    print(table(found))


def up(
    file: Annotated[Path, typer.Argument(help="cluster.yaml (docs/cluster.md).")],
    token_file: TokenFile = None,
    log_format: Annotated[str, typer.Option(help="text or json.")] = "text",
) -> None:
    """Start a whole cluster from one file, start again what dies, and scale its workers.

    fastqwen up cluster.yaml
    """
    from fastqwen.cluster.cluster_file import read_cluster_file
    from fastqwen.cluster.up import up as run

    raise typer.Exit(run(read_cluster_file(file), token_file, log_format))
