"""The grammar of an answer: what the request asked for, or the call that it requires. Checked before anything runs."""

from __future__ import annotations

from fastqwen.errors import BadRequest
from fastqwen.records import Grammar, StructuredOutputs
from fastqwen.server.answer.state import ServerState
from fastqwen.server.dialects.tools import ToolOptions, required_grammar
from fastqwen.text.answer import THINK_END
from fastqwen.text.grammar import to_grammar


async def answer_grammar(
    state: ServerState, structured: StructuredOutputs | None, tools: ToolOptions | None = None, *, opened: bool = False
) -> Grammar | None:
    """``opened``: the answer begins with thinking, which is free. Raises BadRequest for a grammar that is no good."""
    text = required_grammar(tools, state.formats) if tools is not None else None
    if text is not None and structured is not None:
        raise BadRequest("a required tool call and structured output exclude each other: drop one", "tool_choice")
    if text is None and structured is not None:
        text = to_grammar(structured)
    if text is None:
        return None
    await state.check_grammar(text)
    return Grammar(text, after=THINK_END if opened else "")
