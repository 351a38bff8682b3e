"""What the operator wishes of a server. CLI flags are made from the fields that have a help text."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import msgspec

from fastqwen.config import check_bounds, option
from fastqwen.errors import BadConfig
from fastqwen.records import (
    MAX_GRAMMAR_CHARS,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_N,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
)


class FrontConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What is the same whatever answers behind the front. Raises BadConfig, naming the flag, for a value that cannot work."""

    key_flag: ClassVar[str] = "--api-key"
    key_variable: ClassVar[str] = "FASTQWEN_API_KEY"
    other_key_variables: ClassVar[tuple[str, ...]] = ("VLLM_API_KEY",)  # of scripts that started another server before

    host: Annotated[str, option("Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1"
    port: Annotated[int, option("0 takes any free port.", ge=0, le=65535)] = 8000
    uds: Annotated[str | None, option("Listen on a Unix socket at this path, in place of host and port.")] = None
    root_path: Annotated[
        str, option("Path under which a proxy shows this server; it may pass the path on or cut it off.")
    ] = ""
    ssl_certfile: Annotated[str | None, option("Certificate (PEM): serve HTTPS.")] = None
    ssl_keyfile: Annotated[str | None, option("The certificate's key, where it is not in the same file.")] = None
    ssl_ca_certs: Annotated[str | None, option("Certificates of those who sign clients' certificates.")] = None
    ssl_cert_reqs: Annotated[
        int, option("Clients' certificates: 0 asks for none, 1 checks what comes, 2 wants one.", ge=0, le=2)
    ] = 0
    ssl_ciphers: Annotated[str, option("Ciphers for TLS up to 1.2, as OpenSSL writes them.")] = "DEFAULT"
    api_keys: tuple[str, ...] = ()  # one of them must come with each request, if there are any
    insecure: Annotated[bool, option("Let other machines in without a key.", one_way=True)] = False
    allowed_hosts: Annotated[
        list[str], option("Host names that requests may use; * allows all. Default: local ones.")
    ] = []
    allowed_origins: Annotated[
        list[str], option("Web origins whose pages may call the API; * allows all. Default: none.")
    ] = []
    max_body_bytes: Annotated[int, option("Largest request body.")] = 32 * 2**20
    max_concurrent_requests: Annotated[
        int, option("Requests that may run or wait; more are answered with 429.", ge=1)
    ] = 1024
    header_timeout_s: Annotated[float, option("Seconds for a request's headers to arrive.", ge=0.1)] = 10.0
    body_timeout_s: Annotated[float, option("Seconds for a request's body to arrive.", ge=0.1)] = 30.0
    stall_timeout_s: Annotated[
        float, option("Seconds after which a stream that its client does not read is aborted.", ge=0.1)
    ] = 60.0
    drain_timeout_s: Annotated[
        float, option("Seconds that running requests get to finish after Ctrl-C or SIGTERM.", ge=0)
    ] = 60.0
    access_log: Annotated[bool, option("Log a line for each request.")] = True
    log_format: Annotated[str, option("text or json.")] = "text"

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.log_format not in ("text", "json"):
            raise BadConfig(f"--log-format is {self.log_format!r}: use text or json")
        if self.root_path and not self.root_path.startswith("/"):
            raise BadConfig(f"--root-path is {self.root_path!r}, but must begin with a slash, as /qwen")
        if self.ssl_certfile is None and (self.ssl_keyfile or self.ssl_ca_certs or self.ssl_cert_reqs):
            raise BadConfig("--ssl-keyfile, --ssl-ca-certs and --ssl-cert-reqs need --ssl-certfile")

    def __repr__(self) -> str:
        return f"{type(self).__name__}(host={self.host!r}, port={self.port})"  # keys must not get into a log

    @property
    def allowed_names(self) -> frozenset[str]:
        """``allowed_hosts`` as they are compared: names of machines know no case."""
        return frozenset(name.lower() for name in self.allowed_hosts)

    def allows_origin(self, origin: str) -> bool:
        return "*" in self.allowed_origins or origin in self.allowed_origins


class ServerConfig(FrontConfig, frozen=True, kw_only=True):
    """``fastqwen serve``, as opposed to its engine. No bound of a request can be above the schema's own."""

    max_n: Annotated[int, option("Most answers to one prompt.", ge=1, le=MAX_N)] = MAX_N
    max_logprobs: Annotated[int, option("Most alternatives for each token; -1: all.", ge=-1)] = MAX_LOGPROBS
    max_logit_bias: Annotated[int, option("Most entries of logit_bias.", ge=0, le=MAX_LOGIT_BIAS)] = MAX_LOGIT_BIAS
    max_stop_strings: Annotated[int, option("Most stop strings.", ge=0, le=MAX_STOP_STRINGS)] = MAX_STOP_STRINGS
    max_stop_chars: Annotated[int, option("Longest stop string.", ge=1, le=MAX_STOP_CHARS)] = MAX_STOP_CHARS
    max_grammar_chars: Annotated[
        int, option("Longest schema, regex or grammar of a request.", ge=1, le=MAX_GRAMMAR_CHARS)
    ] = MAX_GRAMMAR_CHARS
    text_timeout_s: Annotated[
        float, option("Seconds for rendering and tokenising a prompt, or compiling a grammar.", ge=0.1)
    ] = 2.0
    text_workers: int = 2
    mcp: Annotated[
        str | None, option("FILE of MCP servers (docs/page.md) whose tools the page offers; it asks before each call.")
    ] = None
    trust_request_chat_template: Annotated[
        bool,
        option("Accept templates that come with a request; they run in a sandbox, within the text workers' limits."),
    ] = False
    default_chat_template_kwargs: Annotated[
        dict[str, Any] | None,
        option('Switches of the chat template where a request does not set them, such as {"enable_thinking": false}.'),
    ] = None
    enable_force_include_usage: Annotated[
        bool, option("Tell usage in every chunk of every stream and at its end, whether or not it was asked for.")
    ] = False
    return_tokens_as_token_ids: Annotated[
        bool,
        option(
            "Name tokens by their ids (token_id:42) in all log-probabilities, whether or not a request asks for that."
        ),
    ] = False
    enable_per_request_metrics: Annotated[
        bool,
        option(
            "Tell each request's times in its answer (metrics): in the queue, to the first token, between tokens. Of streams "
            "with the usage at their end."
        ),
    ] = False
    strict_fields: Annotated[
        bool,
        option("Refuse fields that this server does not know, which are else answered with a warning.", one_way=True),
    ] = False
    strict_model_name: Annotated[bool, option("Answer 404 to requests that name another model.")] = False


class WebConfig(FrontConfig, frozen=True, kw_only=True):
    """``fastqwen web``: its visitors' keys are not those of the servers behind it."""

    key_flag: ClassVar[str] = "--page-key"
    key_variable: ClassVar[str] = "FASTQWEN_PAGE_KEY"
    other_key_variables: ClassVar[tuple[str, ...]] = ()

    port: Annotated[int, option("0 takes any free port.", ge=0, le=65535)] = 8008
    insecure: Annotated[bool, option("Let other machines in without a page key.", one_way=True)] = False
    allowed_origins: Annotated[
        list[str], option("Other web origins whose pages may ask through this one. Default: none.")
    ] = []
    access_log: Annotated[bool, option("Log a line for each request.")] = False
