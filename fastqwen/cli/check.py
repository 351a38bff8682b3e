"""fastqwen check"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastqwen.cli.options import MODEL_HELP, ApiKey, with_engine_options
from fastqwen.paths import check_regular

if TYPE_CHECKING:
    from fastqwen.llm import LLM

PROBE = "What is the capital of France? Answer in one short sentence."
PROBE_TOKENS = 64


@with_engine_options
def check(
    engine_options: dict[str, Any],
    model: Annotated[str, typer.Argument(metavar="MODEL|URL", help=f"{MODEL_HELP} Or the address of a server.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
    api_key: ApiKey = None,
) -> None:
    """Load MODEL, show what was found out about it, and ask it one short question.

    Shows each token that ends an answer, and where that is written; how the question's answer ended; and what the
    model takes for sampling where a request does not say. Exit status 1 if the model cannot be loaded or computes
    numbers that are not finite.

    fastqwen check demo
    fastqwen check Qwen/Qwen-7B-Chat --json
    fastqwen check http://localhost:8000

    With the address of a server, ours or another, checks whether it keeps what OpenAI's API promises.
    """
    from fastqwen.client.remote import is_address

    if is_address(model):
        from fastqwen.terminal.conformance import run

        raise typer.Exit(run(model, api_key=api_key, as_json=as_json))
    path = Path(model).expanduser()
    if path.exists():
        check_regular(path)  # before torch is there, which takes longer
    from fastqwen.llm import LLM

    found = report(LLM(model, **{**engine_options, "skip_tokenizer_init": False}))
    print(json.dumps(found, ensure_ascii=False, indent=2) if as_json else as_text(found))
    if found["probe"]["finish_reason"] == "error":
        raise typer.Exit(1)


def report(llm: LLM) -> dict[str, Any]:
    """What the table shows, under the names of the JSON output."""
    text = llm.text
    assert text is not None
    return {
        "model": llm.config.model,
        "architecture": llm.model.model_type,
        "dtype": llm.plan.dtype,
        "quantization": _quantization(llm.model.quantization),
        "max_model_len": llm.plan.max_model_len,
        "chat_template": None if text.template is None else text.template.origin,
        "default_sampling": text.default_sampling,
        "stop_tokens": [{"id": stop.token_id, "text": stop.text, "origin": stop.origin} for stop in text.stops],
        "probe": _probe(llm),
    }


def _quantization(config: dict[str, Any] | None) -> str | None:
    if config is None:
        return None
    group_size = config.get("group_size", -1)
    groups = "one group" if group_size == -1 else f"groups of {group_size}"
    return f"{config.get('quant_method')}, {config.get('bits')} bits, {groups}"


def _probe(llm: LLM) -> dict[str, Any]:
    """One greedy answer. ``ended_by`` is the stop token, None if the answer was cut at its length."""
    from fastqwen.records import SamplingParams

    assert llm.text is not None
    classifier = llm.model.classifier
    if classifier is not None:
        [judged] = llm.classify(PROBE, use_tqdm=False)
        labels = dict(zip(classifier.labels, judged.outputs.probs, strict=True))
        return {"question": PROBE, "finish_reason": "labels", "labels": labels}
    if not llm.model.has_head:
        [found] = llm.embed(PROBE, use_tqdm=False)
        return {"question": PROBE, "finish_reason": "embedding", "dimensions": found.outputs.hidden_size}
    params = SamplingParams(temperature=0.0, max_tokens=PROBE_TOKENS)
    if llm.text.template is None:
        [output] = llm.generate(PROBE, params, use_tqdm=False)
    else:
        [output] = llm.chat([{"role": "user", "content": PROBE}], params, use_tqdm=False)
    answer = output.outputs[0]
    last = answer.token_ids[-1] if answer.finish_reason == "stop" else None
    return {
        "question": PROBE,
        "answer": answer.text,
        "num_tokens": len(answer.token_ids),
        "finish_reason": answer.finish_reason,
        "ended_by": None if last is None else {"id": last, "text": llm.text.tokenizer.token_text(last)},
    }


def as_text(found: dict[str, Any]) -> str:
    sampling = ", ".join(f"{name} {value}" for name, value in found["default_sampling"].items())
    lines = [
        f"model          {found['model']}",
        f"architecture   {found['architecture']}",
        f"dtype          {found['dtype']}",
        f"quantization   {found['quantization'] or 'none'}",
        f"context        {found['max_model_len']} tokens",
        f"chat template  {found['chat_template'] or 'none: this model continues texts'}",
        f"sampling       {sampling or 'the model recommends nothing'}",
        "",
        "Tokens that end an answer",
        *(f"  {stop['id']:>7}  {stop['text']:<16} {stop['origin']}" for stop in found["stop_tokens"]),
    ]
    if not found["stop_tokens"]:
        lines.append("  none was found: answers end only at max_tokens, or at stop strings of the request")
    probe = found["probe"]
    if probe["finish_reason"] == "labels":
        count = len(probe["labels"])
        return "\n".join([*lines, "", f"It classifies: {count} label{'s' * (count > 1)}, and it writes no text."])
    if probe["finish_reason"] == "embedding":
        vector = f"It holds no output head: it makes vectors of {probe['dimensions']} numbers, and no text."
        return "\n".join([*lines, "", vector])
    return "\n".join([*lines, "", f"Question  {probe['question']}", f"Answer    {probe['answer']!r}", _ending(probe)])


def _ending(probe: dict[str, Any]) -> str:
    if probe["finish_reason"] == "error":
        return "It failed: the model computed values that are not finite numbers."
    if probe["ended_by"] is None:
        return f"It was cut after {probe['num_tokens']} tokens; no stop token came by then."
    ended_by = probe["ended_by"]
    return f"It ended by itself after {probe['num_tokens']} tokens, with {ended_by['text']} ({ended_by['id']})."
