"""Write docs/from_vllm.md from the tables that decide: which of vLLM's flags, keywords and fields mean what here.

python scripts/from_vllm.py            # writes the page
python scripts/from_vllm.py --check    # exit status 1 if it is not up to date
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fastqwen.config import EngineConfig, flag, options_of
from fastqwen.server.config import ServerConfig
from fastqwen.server.dialects.body import CHANGES_THE_ANSWER, WITHOUT_EFFECT
from fastqwen.server.dialects.chat_batch import ELSEWHERE, ChatBatchRequest
from fastqwen.server.dialects.classify import ClassifyRequest
from fastqwen.server.dialects.embeddings import CohereEmbedRequest, EmbeddingRequest
from fastqwen.server.dialects.pooling import PoolingRequest
from fastqwen.server.dialects.responses_request import ResponsesRequest
from fastqwen.server.dialects.schema import ChatRequest, CompletionRequest
from fastqwen.server.dialects.scores import RerankRequest, ScoreRequest
from fastqwen.vllm.sampling_params import ADVICE, NEUTRAL
from fastqwen.vllm_names import ACCEPTED, HOLDS, PARTS, REFUSED, RENAMED, VALUES

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "from_vllm.md"
FLAGS = ROOT / "tests" / "cli" / "vllm_flags.txt"

HEAD = """# Coming from vLLM

Made by `scripts/from_vllm.py` from the tables that the program itself decides by; a test holds it up to date.

## A command line

Put `fastqwen serve` where `vllm serve` stood. A flag is ours, or says what holds here anyway (one line tells so), or is refused
with a reason; none is ignored. `--config FILE.yaml` is read, and flags of the command line go before it. `VLLM_API_KEY` protects.
`fastqwen run-batch -i IN -o OUT --model M`, `fastqwen bench serve --base-url URL` and `fastqwen complete` are there under their
names.

## A script

One import line changes:

```python
from fastqwen.vllm import LLM, SamplingParams

llm = LLM(model="demo", dtype="half", tensor_parallel_size=1, max_model_len=1024)
for output in llm.generate(["The capital of France is"], SamplingParams(temperature=0.8, top_p=0.95, max_tokens=8)):
    print(output.prompt, output.outputs[0].text)
```

`fastqwen.vllm` has `LLM` (`generate`, `chat`, `embed`, `encode`, `classify`, `reward`, `score`, `beam_search`,
`enqueue`, `enqueue_chat`, `wait_for_completion`, `get_tokenizer`, `reset_prefix_cache`, `get_metrics`, `sleep`, `wake_up`),
`AsyncLLM` (`generate`, `encode`), `LLMEngine`, `EngineArgs`, `AsyncEngineArgs`, `SamplingParams`, `PoolingParams`,
`BeamSearchParams`, `StructuredOutputsParams`, `TextPrompt`, `TokensPrompt`, and the modules that scripts import them from:
`config`, `engine.arg_utils`, `entrypoints.llm`, `exceptions`, `inputs`, `outputs`, `sampling_params`, `utils`,
`v1.engine.async_llm` and more.
`LLM` takes the flags below as keywords. `sleep` gives weights and cache back: at level 1 the weights wait in host
memory for `wake_up`, at level 2 they are read again (as they are where several GPUs share them), at level 0 nothing is
given back. So do `/sleep?level=1` and `/wake_up` of a server; with `mode=abort` or `mode=wait` running requests are no
hindrance.
`thinking_token_budget` is how many tokens may lie between `<think>` and `</think>`, for scripts as for the server. What is said
when they are used up is `reasoning_end_str` of `reasoning_config`, and else the mark alone.

Not there: adapters (LoRA), images and sound, speculative decoding, plugins.

## Scores

`/v1/score`, `/v1/rerank` and `LLM.score` ask a reranker (a model with "reranker" in its name, or with `classifier_from_token`
among `--hf-overrides`) for its yes and no, with the prompt of Qwen3-Reranker's model card, or the one that `--chat-template` makes of
the roles `query` and `document`. A checkpoint with a sequence-classification head (`Qwen2ForSequenceClassification`, `Qwen3...`) with
one label reads query and document one behind the other, or, with "reranker" in its name, in the same prompt. Of any other model
the score is the cosine of both texts' embeddings. `/classify`, `/pooling`, `LLM.classify`, `LLM.reward` and `LLM.encode` give what a
head says of a text's last token. `/pooling` with `task` and `LLM.encode` with
`pooling_task` of `token_embed` or `token_classify` give a line of numbers for each token.

## Operation

`/ping`, `/load`, `/server_info`, `/sleep`, `/wake_up`, `/is_sleeping` and `/reset_prefix_cache` are there; they want the key, if there
is one, and a server open to all (`--insecure`) refuses those that change it. Metrics have vLLM's names. `X-Request-Id` comes back.
`/invocations` is whichever of the other routes the fields of its body ask for.
"""


def page() -> str:
    return "\n".join([HEAD, *_fields(), *_parameters(), *_flags()]).rstrip() + "\n"


def _fields() -> list[str]:
    lines = ["## Fields of a request", ""]
    for path, kind in (
        ("/v1/chat/completions", ChatRequest),
        ("/v1/chat/completions/batch", ChatBatchRequest),
        ("/v1/completions", CompletionRequest),
        ("/v1/responses", ResponsesRequest),
        ("/v1/embeddings", EmbeddingRequest),
        ("/v2/embed", CohereEmbedRequest),
        ("/classify", ClassifyRequest),
        ("/pooling", PoolingRequest),
        ("/v1/score", ScoreRequest),
        ("/v1/rerank", RerankRequest),
    ):
        refused = ELSEWHERE if kind is ChatBatchRequest else ()
        acting = sorted(name for name in kind.model_fields if name not in WITHOUT_EFFECT and name not in refused)
        lines += [f"`{path}` acts on: {_listed(acting)}.", ""]
    lines += [
        f"Without effect, and said in the answer's `warnings`: {_listed(sorted(WITHOUT_EFFECT))}, and all unknown ones.",
        "",
    ]
    lines += [
        "Refused, because the answer would be another one:",
        "",
        "| field | what to do | accepted as |",
        "|---|---|---|",
    ]
    for name, (neutral, advice) in CHANGES_THE_ANSWER.items():
        lines.append(f"| `{name}` | {advice} | {_listed(map(repr, neutral)) or '-'} |")
    return [*lines, ""]


def _parameters() -> list[str]:
    lines = [
        "## SamplingParams",
        "",
        "Fields that only vLLM has:",
        "",
        "| field | accepted as | otherwise |",
        "|---|---|---|",
    ]
    lines += [f"| `{name}` | {_listed(map(repr, values))} | {ADVICE[name]} |" for name, values in NEUTRAL.items()]
    return [*lines, ""]


def _flags() -> list[str]:
    """Of those that vLLM's own parser has."""
    theirs = {word.removeprefix("--") for line in FLAGS.read_text().splitlines() for word in line.split()}
    ours = {flag(name).removeprefix("--") for config in (EngineConfig, ServerConfig) for name in options_of(config)}
    same = sorted(theirs & ours)
    lines = ["## Flags that mean the same here", "", f"{_listed(f'--{name}' for name in same)}.", ""]
    lines += ["Under another name, or with other values:", "", "| vLLM | here |", "|---|---|"]
    lines += [f"| `--{name}` | `--{other}` |" for name, other in sorted(RENAMED.items())]
    for name, values in VALUES.items():
        for value, other in values.items():
            if value != other:
                lines.append(f"| `--{name} {value}` | {'leave it out' if other is None else f'`--{name} {other}`'} |")
    lines += ["", "## Flags that are accepted and change nothing", ""]
    lines += [f"- {why}: {_listed(f'--{name}' for name in names)}" for why, names in ACCEPTED.items()]
    lines += ["", "## Flags that are refused", "", "Values in brackets say what holds anyway, and are accepted.", ""]
    for why, names in REFUSED.items():
        told = [f"`--{name}`" + (f" [{', '.join(values)}]" if values else "") for name, values in names.items()]
        lines.append(f"- {why}: {', '.join(told)}")
    for name, parts in HOLDS.items():
        told = [f"{part} {' or '.join(json.dumps(one) for one in values)}" for part, values in parts.items()]
        told += [f"{part}, which is `--{ours}`" for part, ours in PARTS[name].items()]
        lines += ["", f"Of `--{name}`, what holds anyway is {', '.join(told)}."]
    return [*lines, ""]


def _listed(words: object) -> str:
    return ", ".join(f"`{word}`" for word in words)  # type: ignore[attr-defined]


def main() -> int:
    made = page()
    if "--check" in sys.argv[1:]:
        return 0 if PAGE.exists() and PAGE.read_text(encoding="utf-8") == made else 1
    PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
