"""The grammar of an answer: what the request asked for, or the call that it requires. Checked before anything runs."""

from __future__ import annotations

from fastqwen.records import Grammar, StructuredOutputs
from fastqwen.server.answer.state import ServerState
from fastqwen.server.dialects.tools import ToolOptions, call_rules
from fastqwen.text.answer import THINK_END
from fastqwen.text.grammar import either, lark, to_grammar


async def answer_grammar(
    state: ServerState, structured: StructuredOutputs | None, tools: ToolOptions | None = None, *, opened: bool = False
) -> Grammar | None:
    """``opened``: the answer begins with thinking, which is free. Where tools may be called, an answer is calls or of its
    form; where one must be, it has no other form. Raises BadRequest for a grammar that is no good."""
    text = None if structured is None else to_grammar(structured)
    if tools is not None and tools.required:
        text = lark(f"start: start_call\n{call_rules(tools.required, tools, state.formats)}")
    elif tools is not None and tools.tools and text is not None:
        text = either(call_rules(tools.tools, tools, state.formats), text)
    if text is None:
        return None
    await state.check_grammar(text)
    return Grammar(text, after=THINK_END if opened else "")
