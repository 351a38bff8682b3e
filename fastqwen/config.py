"""EngineConfig: what the user wishes, and nothing that was measured. CLI flags are made from its fields."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, Literal, get_args, get_type_hints

import msgspec

from fastqwen.errors import BadConfig
from fastqwen.records import PoolingTask

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]
LoadFormat = Literal["auto", "dummy"]
ContentFormat = Literal["auto", "string", "openai"]
KvCacheDtype = Literal["auto", "bfloat16", "float16", "int8", "fp8"]
KV_CACHE_DTYPES: tuple[str, ...] = get_args(KvCacheDtype)
JUDGING_KEYS = frozenset({"architectures", "classifier_from_token", "is_original_qwen3_reranker", "method"})


def option(text: str, *, ge: float | None = None, le: float | None = None, one_way: bool = False) -> type:
    """Attach what the CLI shows and checks for a field. ``one_way``: there is no --no- form of the flag."""
    extra = {"one_way": True} if one_way else None
    return msgspec.Meta(description=text, ge=ge, le=le, extra=extra)  # type: ignore[return-value]


POLICIES = ("priority", "fcfs")


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Frozen wishes under vLLM's names. Raises BadConfig, naming the flag, for a value that cannot work."""

    model: str
    dtype: Annotated[Dtype, option("auto takes bfloat16 where the device supports it, else float16.")] = "auto"
    quantization: Annotated[
        str | None,
        option(
            "fp8, int8 or int4: quantize a plain checkpoint's weights while they are loaded. Default: as they are stored."
        ),
    ] = None
    device: Annotated[Device, option("auto takes the GPU if there is one.")] = "auto"
    load_format: Annotated[LoadFormat, option("dummy makes random weights from config.json alone, for benchmarks.")] = (
        "auto"
    )
    max_model_len: Annotated[
        int | None, option("Longest sequence, prompt and answer together. Default: what the model was made for.")
    ] = None
    max_num_seqs: Annotated[
        int | None, option("Most sequences that run at once. Default: 64 on a CPU, 256 on a GPU.")
    ] = None
    max_num_batched_tokens: Annotated[
        int | None,
        option(
            "Most tokens in one step; long prompts are cut into chunks of this. Default: 512 on a CPU, on a GPU what takes "
            "about 1 s, at most 8192."
        ),
    ] = None
    max_num_mixed_tokens: Annotated[
        int | None,
        option(
            "Most tokens in a step that computes prompts beside running streams: fewer make them pause less. Default: 16 "
            "on a CPU, on a GPU what takes about 50 ms, at most 2048."
        ),
    ] = None
    prompts_first: Annotated[
        bool | None,
        option(
            "Compute prompts that wait before running streams go on: the streams pause longer, and more is computed in all. "
            "Default: for batches, which nobody watches, and not in serve."
        ),
    ] = None
    block_size: Annotated[int | None, option("Tokens in a KV cache block. Default: 16 on a CPU, 64 on a GPU.")] = None
    gpu_memory_utilization: Annotated[float, option("Share of the GPU's memory that fastqwen may use.")] = 0.9
    kv_cache_memory_bytes: Annotated[
        int | None, option("Size of the KV cache in bytes. Default: from free memory, at most 4 GiB on a CPU.")
    ] = None
    max_state_snapshots: Annotated[
        int | None,
        option(
            "For models whose layers keep a state of fixed size: most copies of it that the prefix cache keeps. Default: "
            "two for each conversation whose keys and values find room beside those of running ones, at most 1024."
        ),
    ] = None
    kv_cache_dtype: Annotated[
        KvCacheDtype,
        option(
            "Type of the numbers in the KV cache: auto (the weights' own), or 8 bits, for nearly twice the tokens: int8 changes "
            "answers less than fp8 does."
        ),
    ] = "auto"
    enable_prefix_caching: Annotated[bool, option("Reuse the KV blocks of equal prompt beginnings.")] = True
    scheduling_policy: Annotated[
        str,
        option(
            "priority: requests with a smaller priority run first. fcfs: all run in the order in which they came, and one "
            "with a priority is refused."
        ),
    ] = "priority"
    enforce_eager: Annotated[bool, option("Do not use CUDA graphs.")] = False
    num_threads: Annotated[int | None, option("CPU threads for computing. Default: all cores.")] = None
    tensor_parallel_size: Annotated[
        int, option("GPUs that share the model, a process each; on a CPU so many processes.")
    ] = 1
    tokenizer: Annotated[str | None, option("Folder or hub name of the tokenizer. Default: the model's own.")] = None
    skip_tokenizer_init: Annotated[bool, option("Work with token ids only.")] = False
    chat_template: Annotated[str | None, option("File with a Jinja chat template, or the template itself.")] = None
    chat_template_content_format: Annotated[
        ContentFormat,
        option("How the chat template gets contents: string, openai (a list of parts), or auto: as its loops tell."),
    ] = "auto"
    tool_call_parser: Annotated[
        str, option("How the model writes tool calls: hermes, qwen3_coder, react or none. auto: from its template.")
    ] = "auto"
    reasoning_parser: Annotated[str, option("qwen3 or none. auto: <think> blocks if the template knows them.")] = "auto"
    reasoning_config: Annotated[
        dict[str, Any] | None,
        option(
            "What ends thinking that has reached its budget, for example "
            '{"reasoning_end_str": "I have to answer now.</think>"}. Default: Qwen\'s sentence, or </think> for '
            "thinking_token_budget."
        ),
    ] = None
    pooling_task: Annotated[
        PoolingTask | None,
        option(
            "What /pooling gives where a request does not say: embed, classify, or for each token token_embed or "
            "token_classify. Default: classify of a model with such a head, else embed."
        ),
    ] = None
    generation_config: Annotated[
        str,
        option(
            "Where default sampling parameters come from: auto (the model), none, or a folder with a "
            "generation_config.json, whose eos_token_id end answers as well."
        ),
    ] = "auto"
    override_generation_config: Annotated[
        dict[str, Any] | None,
        option(
            'Keys that replace generation_config.json\'s, for example {"temperature": 0.6, "max_new_tokens": 4096}.'
        ),
    ] = None
    rope_per_request: Annotated[
        bool,
        option(
            "YaRN by request: prompts within the trained length are computed unscaled, longer ones with the smallest "
            "factor that covers prompt and answer."
        ),
    ] = False
    rope_scaling: Annotated[
        dict[str, Any] | None,
        option('rope_scaling for config.json, for example {"rope_type": "yarn", "factor": 4.0}: longer sequences.'),
    ] = None
    rope_theta: Annotated[float | None, option("rope_theta for config.json.")] = None
    hf_overrides: Annotated[
        dict[str, Any] | None, option("Keys for config.json that replace its own; they are checked as those are.")
    ] = None
    served_model_name: Annotated[list[str], option("Name(s) of the model in the API. Default: MODEL.")] = []
    trust_remote_code: Annotated[
        bool, option("Accepted for compatibility. Nothing needs it: a checkpoint's code is never run.")
    ] = False
    download_dir: Annotated[
        str | None, option("Folder to keep downloaded models in. Default: the hub's cache (HF_HUB_CACHE).")
    ] = None
    revision: Annotated[str | None, option("Branch, tag or commit on the hub.")] = None
    seed: Annotated[
        int | None, option("Makes requests that bring no seed repeatable, in their order; seeds dummy weights as well.")
    ] = None

    def __post_init__(self) -> None:
        positive = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "max_num_mixed_tokens")
        check_positive(self, *positive, "num_threads", "kv_cache_memory_bytes", "tensor_parallel_size")
        if self.max_state_snapshots is not None and self.max_state_snapshots < 0:
            raise BadConfig(f"--max-state-snapshots is {self.max_state_snapshots}, but must be at least 0")
        if self.scheduling_policy not in POLICIES:
            raise BadConfig(f"--scheduling-policy is {self.scheduling_policy!r}, but must be {' or '.join(POLICIES)}")
        if self.block_size is not None and (self.block_size < 8 or self.block_size & (self.block_size - 1)):
            raise BadConfig(f"--block-size is {self.block_size}, but must be a power of two, at least 8")
        check_utilization(self.gpu_memory_utilization)

    def for_batches(self) -> EngineConfig:
        """The same, with prompts first unless something else was asked for: nobody watches a batch's streams pause."""
        return self if self.prompts_first is not None else msgspec.structs.replace(self, prompts_first=True)

    @property
    def takes_priorities(self) -> bool:
        return self.scheduling_policy == "priority"

    @property
    def overrides(self) -> dict[str, Any]:
        """What replaces keys of config.json: the flags for positions, and --hf-overrides, which count less."""
        rope = {"rope_scaling": self.rope_scaling, "rope_theta": self.rope_theta}
        given = dict(self.hf_overrides or {})
        if "classifier_from_token" in given:  # vLLM's users say so which model judges by two words (client/scores.py)
            given = {key: value for key, value in given.items() if key not in JUDGING_KEYS}
        return {**given, **{key: value for key, value in rope.items() if value is not None}}

    @property
    def served_names(self) -> list[str]:
        return self.served_model_name or [self.model]


def flag(field: str) -> str:
    """--text-timeout for text_timeout_s: its help says that it counts in seconds."""
    return "--" + field.removesuffix("_s").replace("_", "-")


@cache
def options_of(config: type[msgspec.Struct]) -> dict[str, tuple[Any, msgspec.Meta]]:
    """Type, and what ``option`` attached, of each field that has a help text."""
    hints = get_type_hints(config, include_extras=True)
    args = {name: get_args(hints[name]) for name in config.__struct_fields__}
    return {name: (found[0], found[1]) for name, found in args.items() if found and isinstance(found[1], msgspec.Meta)}


def check_positive(config: msgspec.Struct, *names: str) -> None:
    """Raises BadConfig, naming the flag, for a field that is given and less than 1."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise BadConfig(f"{flag(name)} is {value}, but must be at least 1")


def check_utilization(share: float) -> None:
    if not 0.01 <= share <= 1.0:
        raise BadConfig(f"--gpu-memory-utilization is {share}, but must be at least 0.01 and at most 1")


def check_bounds(config: msgspec.Struct) -> None:
    """What the CLI checks, for a config that was made without it. Raises BadConfig, naming the flag."""
    for name, (_, meta) in options_of(type(config)).items():
        value = getattr(config, name)
        if meta.ge is not None and value < meta.ge:
            raise BadConfig(f"{flag(name)} is {value}, but must be at least {meta.ge}")
        if meta.le is not None and value > meta.le:
            raise BadConfig(f"{flag(name)} is {value}, but must be at most {meta.le}")
