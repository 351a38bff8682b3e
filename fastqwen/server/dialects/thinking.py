"""What a chat request wants of thinking: switches for the template, and how many tokens an effort may take."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastqwen.client.thinking import EARLY_STOP, ThinkingOptions
from fastqwen.errors import BadRequest
from fastqwen.server.dialects.schema import ChatRequest
from fastqwen.text.answer import THINK_END
from fastqwen.text.formats import Formats

EFFORTS = frozenset({"none", "minimal", "low", "medium", "high", "xhigh", "max"})
# For templates without an effort of their own.
EFFORT_TOKENS = {"minimal": 512, "low": 1024, "medium": 8192}
# What Qwen's own API makes of other APIs' words for the templates with an effort, which raise for words that are not theirs.
EFFORT_ALIASES = {"minimal": "low", "high": "xhigh", "max": "xhigh"}
NO_LIMIT = -1
MAX_NAMED = 16  # of the switches without an effect


def thinking_options(body: ChatRequest, formats: Formats, usual: dict[str, Any] | None = None) -> ThinkingOptions:
    """Also chat_template_kwargs, which is where other servers' users put the same switches; ``usual`` are the operator's."""
    switches = {name: value for name, value in (usual or {}).items() if formats.has_switch(name)}
    switches.update(body.chat_template_kwargs or {})
    warnings: list[str] = []
    if body.enable_thinking is not None:
        switches["enable_thinking"] = body.enable_thinking
    budget, end = body.thinking_budget, formats.thinking_end or EARLY_STOP
    if budget is None and body.thinking_token_budget not in (None, NO_LIMIT):
        budget, end = body.thinking_token_budget, formats.thinking_end or THINK_END
    effort = body.reasoning_effort
    if effort is not None and effort not in EFFORTS:
        body.warnings.unknown("reasoning_effort", f"{effort[:50]!r} is none of {', '.join(sorted(EFFORTS))}")
        effort = None
    if effort is not None and (effort == "none" or formats.has_switch("reasoning_effort")):
        switches["reasoning_effort"] = effort
    elif effort is not None and budget is None:
        budget = EFFORT_TOKENS.get(effort)
    _translate_effort(switches, formats if body.chat_template is None else replace(formats, source=body.chat_template))
    if budget == 0 and formats.has_switch("enable_thinking"):
        switches["enable_thinking"] = False
    if body.documents:
        switches["documents"] = body.documents
        if body.chat_template is None and not formats.has_switch("documents"):
            raise BadRequest(
                "this model's chat template has no place for documents: send them in messages", "documents"
            )
    own = body.chat_template is not None  # which may have any switches
    unused = [name for name in switches if not own and not formats.has_switch(name)]
    why = "has no effect: this model's chat template has no such switch"
    warnings += [f"{name[:80]} {why}" for name in unused[:MAX_NAMED]]
    if len(unused) > MAX_NAMED:
        warnings.append(f"and {len(unused) - MAX_NAMED} more of chat_template_kwargs have none")
    for name in unused:
        del switches[name]
    if not formats.reasoning and (budget is not None or (effort is not None and effort != "none")):
        warnings.append("this model does not think in a marked block, so there is no thinking to limit")
    return ThinkingOptions(switches, budget, body.loop_recovery, end, warnings)


def _translate_effort(switches: dict[str, Any], formats: Formats) -> None:
    """The same effort in the template's words, wherever the caller has put it; no effort is no thinking."""
    effort = switches.get("reasoning_effort")
    if not isinstance(effort, str) or formats.names(effort):
        return
    if effort == "none":
        del switches["reasoning_effort"]
        switches["enable_thinking"] = False
    else:
        switches["reasoning_effort"] = EFFORT_ALIASES.get(effort, effort)
