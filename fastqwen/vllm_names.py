"""Options of vLLM's users: each means the same here, is our default, or is refused. One table for flags and keywords.

Names are those of vLLM 0.33 (tests/cli/vllm_flags.txt) and of a few older releases. An option that ours has is ours; the tables
below hold all others. What is accepted without effect is said in one line, so that nobody relies on it.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from fastqwen.config import EngineConfig
from fastqwen.errors import BadConfig

SHORT = {
    "-tp": "tensor-parallel-size", "-pp": "pipeline-parallel-size", "-dp": "data-parallel-size", "-q": "quantization",
    "-ep": "enable-expert-parallel", "-sc": "speculative-config", "-cc": "compilation-config", "-O": "optimization-level",
    "-n": "nnodes", "-r": "node-rank", "-asc": "api-server-count", "-ac": "attention-config", "-dc": "diffusion-config",
    "-dpl": "data-parallel-size-local", "-dpr": "data-parallel-start-rank", "-dpa": "data-parallel-address",
    "-dpp": "data-parallel-rpc-port", "-dpb": "data-parallel-backend", "-dpn": "data-parallel-rank",
    "-dpm": "data-parallel-multi-port-external-lb", "-dph": "data-parallel-hybrid-lb", "-dpe": "data-parallel-external-lb",
    "-dcp": "decode-context-parallel-size", "-pcp": "prefill-context-parallel-size",
}  # fmt: skip
# Another name of ours.
RENAMED = {
    "model-path": "model", "model-tag": "model", "shutdown-timeout": "drain-timeout",
    "disable-uvicorn-access-log": "no-access-log", "device-memory-utilization": "gpu-memory-utilization",
}  # fmt: skip
# Values that ours calls otherwise; None: the flag is left out, because it says what holds without it.
VALUES: dict[str, dict[str, str | None]] = {
    "dtype": {"half": "float16", "float": "float32"},
    "kv-cache-dtype": {"fp8_e4m3": "fp8"},
    "max-model-len": {"-1": None, "auto": None},
    "generation-config": {"vllm": "none"},
    "load-format": {"safetensors": "auto", "hf": "auto", "gguf": "auto", "mistral": "auto"},
    "reasoning-parser": {"deepseek_r1": "qwen3"},
    "tool-call-parser": {"qwen3_xml": "qwen3_coder"},
    "allowed-origins": {"*": "*"},
}
ACCEPTED: dict[str, tuple[str, ...]] = {
    "it is always so here": (
        "enable-auto-tool-choice", "enable-chunked-prefill", "async-scheduling", "enable-prompt-tokens-details",
        "enable-request-id-headers", "enable-tokenizer-info-endpoint", "enable-server-load-tracking", "enable-offline-docs",
        "enable-reasoning", "disable-log-requests", "enable-log-deltas",
        "scheduler-reserve-full-isl", "skip-mm-profiling", "language-model-only",
        "exclude-tools-when-tool-choice-none", "enable-sleep-mode",
    ),
    "this server chooses that itself": (
        "disable-fastapi-docs", "fail-on-environ-validation", "safetensors-load-strategy",
        "disable-custom-all-reduce", "disable-chunked-mm-input", "enable-flashinfer-autotune",
        "disable-frontend-multiprocessing", "disable-hybrid-kv-cache-manager", "interleave-mm-strings",
        "enable-mfu-metrics", "enable-cumem-allocator", "enable-ep-weight-filter", "use-tqdm-on-load",
        "use-v2-block-manager", "code-revision",
        "attention-backend", "attention-config", "all2all-backend", "linear-backend", "moe-backend", "mamba-backend",
        "gdn-prefill-backend", "kda-prefill-backend", "kda-decode-backend", "kernel-config", "compilation-config",
        "optimization-level", "performance-mode", "cudagraph-capture-sizes", "max-cudagraph-capture-size", "model-impl",
        "max-parallel-loading-workers", "safetensors-prefetch-num-threads", "safetensors-prefetch-block-size",
        "pt-load-map-location", "prefix-caching-hash-algo", "long-prefill-token-threshold", "ir-op-priority",
        "long-prefill-token-threshold-adaptive", "max-long-partial-prefills", "max-num-partial-prefills", "num-lookahead-slots",
        "disable-cascade-attn", "swap-space", "tokenizer-pool-size", "renderer-num-workers", "api-server-count",
        "sparse-indexer-topk-backend", "stream-interval", "mamba-ssu-algorithm", "sse-keep-alive-interval", "runner",
        "prefill-schedule-interval", "monokernel", "cpu-distributed-timeout-seconds", "distributed-timeout-seconds",
        "structured-outputs-config", "guided-decoding-backend", "config-format", "use-fp64-gumbel", "numa-bind",
        "numa-bind-cpus", "numa-bind-nodes", "num-gpu-blocks-override", "watermark", "max-seq-len-to-capture",
        "swa-bounded-replay", "replayssm-buffer-len", "use-replayssm", "prefix-match-unit", "prefix-cache-retention-interval",
        "enable-shm-tensor-arena", "enable-nccl-comm-suspend", "sleep-mode-backend", "sleep-mode-offload-cudagraph",
        "sleep-preserve-parameter-names", "max-num-scheduled-tokens", "watchdog-config", "watermark-config",
        # of older releases
        "num-scheduler-steps", "multi-step-stream-outputs", "scheduler-delay-factor", "preemption-mode", "engine-use-ray",
        "worker-use-ray", "disable-async-output-proc", "max-context-len-to-capture", "full-cuda-graph", "cuda-graph-sizes",
        "guided-decoding-disable-fallback", "guided-decoding-disable-any-whitespace", "logits-processor-pattern",
        "lora-extra-vocab-size", "disable-mm-preprocessor-cache",
    ),
    "what is logged is chosen with --log-format and --access-log, and prompts are never logged": (
        "uvicorn-log-level", "log-level", "enable-log-requests", "enable-log-outputs", "max-log-len", "disable-log-stats",
        "log-config-file", "logging-config", "log-error-stack", "aggregate-engine-logging", "enable-logging-iteration-details",
        "kv-cache-metrics", "kv-cache-metrics-sample", "cudagraph-metrics", "show-hidden-metrics-for-version",
        "disable-access-log-for-endpoints", "jit-monitor-mode", "jit-monitor-verbose", "custom-histogram-buckets",
        "per-request-spec-decode-metrics", "fingerprint-mode", "fingerprint-value",
    ),
    "it is for models of another kind than this server has": (
        "limit-mm-per-prompt", "mm-processor-kwargs", "mm-processor-cache-gb", "mm-processor-cache-type", "media-io-kwargs",
        "mm-encoder-tp-mode", "mm-encoder-attn-backend", "mm-encoder-attn-dtype", "mm-encoder-only", "mm-hasher-algorithm",
        "mm-device-do-normalize", "mm-encoder-fp8-scale-path", "mm-encoder-fp8-scale-save-margin", "mm-tensor-ipc",
        "mm-encoder-fp8-scale-save-path", "mm-ipc-gpu-memory-gb", "mm-processor-device", "mm-shm-cache-max-object-size-mb",
        "video-pruning-method", "video-pruning-rate", "mamba-block-size", "mamba-cache-dtype", "mamba-cache-mode",
        "mamba-cache-philox-rounds", "mamba-ssm-cache-dtype", "enable-mamba-cache-stochastic-rounding",
        "enable-mamba-shared-prefix-checkpoint", "cohere-format", "cohere-is-reasoning-model", "diffusion-config",
        "allowed-local-media-path", "allowed-media-domains", "trust-request-mm-kwargs", "enable-flash-late-interaction",
        "anthropic-disabled-thinking-effort", "engram-config",
    ),
}  # fmt: skip
# Why it cannot hold, the flags, and for each of them the values at which it says what holds anyway.
REFUSED: dict[str, dict[str, tuple[str, ...]]] = {
    "use --tensor-parallel-size instead: each GPU then computes a part of every layer": {"pipeline-parallel-size": ("1",)},
    "a model runs on the GPUs of one host, with --tensor-parallel-size: fastqwen plan shows what fits, and several servers "
    "stand behind one proxy": {
        "data-parallel-size": ("1",), "nnodes": ("1",),
        "decode-context-parallel-size": ("1",), "prefill-context-parallel-size": ("1",), "data-parallel-size-local": ("1",),
        "node-rank": ("0",), "data-parallel-start-rank": ("0",), "data-parallel-rank": ("0",), "master-addr": (),
        "master-port": (), "data-parallel-address": (), "data-parallel-rpc-port": (), "data-parallel-backend": ("mp",),
        "data-parallel-hybrid-lb": (), "data-parallel-external-lb": (), "data-parallel-multi-port-external-lb": (),
        "data-parallel-supervisor-port": (), "dp-supervisor-probe-failure-threshold": (), "dp-supervisor-probe-interval-s": (),
        "dp-supervisor-probe-timeout-s": (), "dp-sync-interval": (), "disable-nccl-for-dp-synchronization": (),
        "distributed-executor-backend": ("mp", "uni"), "headless": (), "enable-expert-parallel": (), "enable-eplb": (),
        "eplb-config": (), "expert-placement-strategy": ("linear",), "enable-elastic-ep": (), "elastic-ep-max-dp-size": (),
        "enable-dbo": (), "dbo-decode-token-threshold": (), "dbo-prefill-token-threshold": (), "ubatch-size": ("0",),
        "cp-kv-cache-interleave-size": ("1",), "dcp-kv-cache-interleave-size": ("1",), "dcp-comm-backend": (),
        "dcp-q-replicate": (), "enable-hc-sp": (), "enable-scale-out": (), "ray-workers-use-nsight": (),
        "enable-batch-sharded-sampling": (), "enable-fault-tolerance": (), "fault-tolerance-config": (), "device-ids": (),
    },
    "there are no adapters (LoRA) here: merge one into the weights and serve the result": {
        "enable-lora": (), "lora-modules": (), "max-loras": (), "max-lora-rank": (), "lora-dtype": ("auto",),
        "lora-target-modules": (), "max-cpu-loras": (), "fully-sharded-loras": (), "default-mm-loras": (),
        "enable-tower-connector-lora": (), "enable-moe-shared-loras": (), "enable-mixed-moe-lora-format": (),
        "specialize-active-lora": (), "max-lora-cls-labels": (),
    },
    "one token is sampled in each step: leave it out": {
        "speculative-model": (), "num-speculative-tokens": (),
        "speculative-config": (), "spec-method": (), "spec-model": (), "spec-tokens": (),
    },
    "weights and KV cache lie in the memory of the device that computes: fastqwen plan MODEL says what fits": {
        "cpu-offload-gb": ("0", "0.0"), "cpu-offload-params": (), "offload-backend": ("auto",), "offload-group-size": ("0",),
        "offload-num-in-group": (), "offload-params": (), "offload-prefetch-step": (), "kv-offloading-size": (),
        "kv-offloading-backend": (), "kv-transfer-config": (), "kv-events-config": (), "ec-transfer-config": (),
        "ec-manager-config": (), "weight-transfer-config": (), "kv-sharing-fast-prefill": (),
    },
    "an 8-bit KV cache has scales of its own, for each head of each token: leave it out": {
        "kv-cache-dtype-skip-layers": (), "calculate-kv-scales": (),
    },
    "a checkpoint's config.json says how its weights are quantized: leave it out": {
        "quantization-config": (), "allow-deprecated-quantization": (),
    },
    "nothing from outside is run in this process: leave it out": {
        "middleware": (), "logits-processors": (), "worker-cls": ("auto",), "worker-extension-cls": (), "scheduler-cls": (),
        "tool-parser-plugin": (), "reasoning-parser-plugin": (), "io-processor-plugin": (), "model-class-overrides": (),
        "model-loader-extra-config": ("{}",), "additional-config": ("{}",), "aux-output-config": (), "tool-server": (),
    },
    "text goes in and out as tokens of the model's own tokenizer": {
        "tokenizer-mode": ("auto", "hf", "slow"), "tokenizer-revision": (), "enable-prompt-embeds": (), "enable-mm-embeds": (),
        "tokens-only": (), "hf-config-path": (),
    },
    "put a proxy in front for that (docs/operate.md)": {
        "enable-ssl-refresh": (), "grpc": (), "grpc-port": (), "allow-credentials": (),
        "allowed-methods": ("*", '["*"]'), "allowed-headers": ("*", '["*"]'), "h11-max-header-count": (),
        "h11-max-incomplete-event-size": (),
    },
    "set the hub's variables instead: HF_TOKEN, HF_HOME, HF_HUB_CACHE": {
        "hf-token": (), "ignore-patterns": (),
    },
    "send it with each request: chat_template_kwargs, or the field of this name": {
        "reasoning-effort-map": (),
        "tool-strict-level": (), "return-sampling-mask": (), "enable-return-routed-experts": (),
    },
    "log-probabilities are the model's own, before temperature and penalties": {"logprobs-mode": ("raw_logprobs",)},
    "an answer's role is assistant": {"response-role": ("assistant",)},
    "--max-concurrent-requests bounds them": {
        "max-num-queued-reqs": (), "max-num-queued-tokens": (),
        "max-num-active-seqs": (),
    },
    "vectors come from /v1/embeddings with the model's own pooling": {
        "pooler-config": (), "override-pooler-config": (), "convert": ("auto", "none", "embed"),
        "task": ("auto", "generate", "embed", "embedding", "classify", "score", "reward"),
    },
    "full attention is what the model was trained with: leave it out": {"disable-sliding-window": ()},
    "no traces are written; each request has an id and a line of the log": {
        "otlp-traces-endpoint": (), "collect-detailed-traces": (), "profiler-config": (), "enable-trace-replay": (),
        "enable-layerwise-nvtx-tracing": (),
    },
}  # fmt: skip
_SWITCHES = (  # flags that stand alone, beside all that begin with enable- and disable-
    "allow-credentials", "allow-deprecated-quantization", "async-scheduling", "aggregate-engine-logging",
    "calculate-kv-scales", "cohere-is-reasoning-model", "cudagraph-metrics", "data-parallel-external-lb",
    "data-parallel-hybrid-lb", "dcp-q-replicate", "data-parallel-multi-port-external-lb",
    "exclude-tools-when-tool-choice-none", "fail-on-environ-validation", "fully-sharded-loras", "grpc", "headless",
    "interleave-mm-strings", "jit-monitor-verbose", "kv-cache-metrics", "kv-sharing-fast-prefill",
    "language-model-only", "log-error-stack", "long-prefill-token-threshold-adaptive", "mm-device-do-normalize",
    "mm-encoder-only", "monokernel", "numa-bind", "ray-workers-use-nsight", "return-sampling-mask",
    "scheduler-reserve-full-isl", "skip-mm-profiling", "sleep-mode-offload-cudagraph",
    "specialize-active-lora", "swa-bounded-replay", "tokens-only",
    "trust-request-mm-kwargs", "use-fp64-gumbel", "engine-use-ray", "worker-use-ray", "full-cuda-graph",
    "guided-decoding-disable-fallback", "guided-decoding-disable-any-whitespace", "multi-step-stream-outputs",
    "use-replayssm", "use-tqdm-on-load", "use-v2-block-manager",
)  # fmt: skip


class Fate(NamedTuple):
    """What happens to a flag that ours has not: ``neutral`` are the values at which even a refused one is accepted."""

    refused: bool
    why: str
    neutral: tuple[str, ...] = ()


def fate(name: str) -> Fate | None:
    """Of a flag without its dashes; None if neither vLLM nor the tables know it."""
    for why, names in ACCEPTED.items():
        if name in names:
            return Fate(False, why)
    for why, values in REFUSED.items():
        if name in values:
            return Fate(True, why, values[name])
    return None


# Of objects (JSON on a command line): the parts that say what holds here anyway.
_POOLER: dict[str, tuple[Any, ...]] = {
    "pooling_type": ("LAST",), "seq_pooling_type": ("LAST",), "tok_pooling_type": ("ALL",), "normalize": (True,),
    "use_activation": (True,), "enable_chunked_processing": (False,), "enable_flash_late_interaction": (True, False),
}  # fmt: skip
# And the parts that ours has a flag for.
PARTS = {"pooler-config": {"task": "pooling-task"}, "override-pooler-config": {"task": "pooling-task"}}
HOLDS = {"pooler-config": _POOLER, "override-pooler-config": _POOLER}


def holds_anyway(name: str, given: str, neutral: tuple[str, ...]) -> bool:
    """Whether a refused flag says with this value what holds without it."""
    if given in neutral:
        return True
    if name not in HOLDS:
        return False
    parts = _parts_of(given)
    return parts is not None and all(
        value is None or value in HOLDS[name].get(part, ()) for part, value in parts.items()
    )


def own_parts(name: str, given: str) -> tuple[dict[str, str], str]:
    """Flags of ours that a part of an object stands for, with their values; and what is left of the object."""
    parts = _parts_of(given) if name in PARTS else None
    if parts is None:
        return {}, given
    found = {ours: str(parts.pop(part)) for part, ours in PARTS[name].items() if parts.get(part) is not None}
    return found, json.dumps(parts)


def _parts_of(given: str) -> dict[str, Any] | None:
    try:
        found = json.loads(given)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def is_switch(name: str) -> bool:
    """Whether a flag of the tables stands alone, without a value."""
    return name in _SWITCHES or (
        name.startswith(("enable-", "disable-")) and name != "disable-access-log-for-endpoints"
    )


# An engine's options with vLLM that are a server's here.
OF_A_SERVER = {
    "max-logprobs": "a script gets as many log-probabilities as it asks for",
    "shutdown-timeout": "a script ends when it has its answers",
}


class Keywords(NamedTuple):
    ours: dict[str, Any]
    notices: list[str]


def keywords(given: dict[str, Any]) -> Keywords:
    """What Python passes to ``LLM`` beside the model, as EngineConfig's fields. Raises BadConfig for what cannot hold.

    ``LLM(**vars(args))`` passes a default for each option there is: what is None, False or empty says nothing.
    """
    ours, unsaid = dict[str, Any](), dict[str, list[str]]()
    for word, value in given.items():
        name = RENAMED.get(word.replace("_", "-"), word.replace("_", "-"))
        field = name.replace("-", "_")
        served = OF_A_SERVER.get(word.replace("_", "-"))
        decided = fate(name) if served is None else Fate(False, served)
        if field in EngineConfig.__struct_fields__:
            value = _as_ours(name, value)
            if value is not None:
                ours[field] = value
        elif decided is None:
            raise BadConfig(f"there is no engine option {word}")
        elif _says_nothing(value):
            continue
        elif decided.refused:
            parts, left = own_parts(name, json.dumps(value) if isinstance(value, dict) else str(value))
            ours.update({part.replace("-", "_"): one for part, one in parts.items()})
            if value is True or not holds_anyway(name, left, decided.neutral):
                raise BadConfig(f"{word}={str(value)[:80]} cannot hold here: {decided.why}")
        else:
            unsaid.setdefault(decided.why, []).append(word)
    notices = [f"{', '.join(words)} of vLLM changes nothing here: {why}" for why, words in unsaid.items()]
    return Keywords(ours, notices)


def _says_nothing(value: Any) -> bool:
    return value is None or value is False or value in ("", (), [], {})


def _as_ours(name: str, value: Any) -> Any:
    """None: as if it were not given."""
    if name == "dtype" and value is not None:
        value = str(value).removeprefix("torch.")  # a torch.dtype is taken as well as its name
    if name == "reasoning-config" and hasattr(value, "__dict__"):  # an object of vllm.config
        return vars(value)
    if name == "served-model-name" and isinstance(value, str):
        return [value]
    if isinstance(value, (str, int)) and not isinstance(value, bool):
        return VALUES.get(name, {}).get(str(value), value)
    return value
