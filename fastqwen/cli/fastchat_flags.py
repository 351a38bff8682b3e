"""Command lines that were written for FastChat's controller, vllm_worker, openai_api_server and gradio_web_server."""

from __future__ import annotations

from typing import NamedTuple

from fastqwen.errors import BadConfig

COMMANDS = ("controller", "worker", "api", "web")
RENAMED = {
    "controller-address": "controller", "controller-url": "controller", "model-names": "served-model-name",
    "num-gpus": "tensor-parallel-size", "api-keys": "api-key", "allowed-origins": "allowed-origins",
}  # fmt: skip
LISTS = ("model-names", "api-keys", "allowed-origins")  # a,b there is one flag for each here
CHECKPOINT = "the checkpoint says it"
# What changes nothing here, and why; those that stand alone end in "!".
ACCEPTED = {
    "conv-template": "the checkpoint's own template is used", "dispatch-method": "requests go where least waits for them",
    "model-list-mode": "the list is always current", "stream-interval": "each token is sent at once",
    "concurrency-count": "--max-concurrent-requests bounds requests", "limit-worker-concurrency": "an engine queues what it "
    "cannot run yet, and front ends refuse what is too much", "show-terms-of-use!": "the page shows none",
    "add-chatgpt!": "other APIs join as workers", "gradio-root-path": "the page works under any path",
    "gptq-wbits": CHECKPOINT, "gptq-groupsize": CHECKPOINT, "gptq-act-order!": CHECKPOINT, "awq-wbits": CHECKPOINT,
    "awq-groupsize": CHECKPOINT, "debug!": "all that is known is logged", "allow-credentials!": "no cookies are used",
    "allowed-methods": "browsers may use those that the API has", "allowed-headers": "browsers may send those that the API reads",
}  # fmt: skip
REFUSED = {
    "no-register": "a worker without a controller is fastqwen serve",
    "share": "the page is shown where --host says, and by nobody else",
    "gpus": "set CUDA_VISIBLE_DEVICES to them",
    "max-gpu-memory": "--gpu-memory-utilization says which share of a GPU may be used",
    "load-8bit": "--quantization int8 does that",
    "cpu-offloading": "a model must fit into its devices: --quantization int4, or --tensor-parallel-size over more of them",
    "gptq-ckpt": "name the quantized checkpoint as MODEL",
    "awq-ckpt": "name the quantized checkpoint as MODEL",
    "embed-in-truncate": "a text that is too long for the model is refused, so that nobody takes a part's vector for its own",
    "ssl": "put a proxy in front for that (docs/operate.md)",
    "moderate": "no text is sent to anybody else",
    "gradio-auth-path": "give visitors keys: --page-key",
    "register-api-endpoint-file": "other servers join as workers: fastqwen worker --upstream URL",
}


class Translated(NamedTuple):
    words: list[str]
    notices: list[str]


def _listed(value: str) -> list[str]:
    """a,b or ["a", "b"], as FastChat's servers read them."""
    return [one.strip().strip("'\"") for one in value.strip("[] ").split(",")]


def translated(words: list[str]) -> Translated:
    """FastChat's flags as ours; others are left as they are. Raises BadConfig for one that cannot hold."""
    found, notices, index = list[str](), list[str](), 0
    while index < len(words):
        flag, equals, value = words[index].partition("=")
        name = flag.removeprefix("--").replace("_", "-") if flag.startswith("--") else ""
        index += 1
        if name in REFUSED:
            raise BadConfig(f"--{name} of FastChat cannot hold here: {REFUSED[name]}")
        if name not in RENAMED and name not in ACCEPTED and f"{name}!" not in ACCEPTED:
            found.append(words[index - 1])
            continue
        if not equals and f"{name}!" not in ACCEPTED and index < len(words):
            value = words[index]
            index += 1
        if name in RENAMED:
            for one in _listed(value) if name in LISTS else [value]:
                found += [f"--{RENAMED[name]}", one.strip()]
        else:
            why = ACCEPTED.get(name) or ACCEPTED[f"{name}!"]
            notices.append(f"--{name} of FastChat changes nothing here: {why}")
    return Translated(found, notices)
