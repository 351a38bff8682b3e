"""A message's content in the form that its chat template reads: one text, or a list of parts (OpenAI's form).

Some templates only walk through a list: given a text they write it letter by letter, or nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jinja2 import nodes

Content = str | list[dict[str, Any]] | None
KEY = "content"


def joined_or_parts(texts: list[str]) -> str | list[dict[str, Any]]:
    """What a message's texts are until a template is known: parts only where there are several."""
    texts = [text for text in texts if text]
    return [{"type": "text", "text": text} for text in texts] if len(texts) > 1 else "".join(texts)


def text_of(content: Content) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content)
    return content or ""


def appended(content: Content, more: str) -> Content:
    if isinstance(content, list) and content:
        return [*content[:-1], {**content[-1], "text": str(content[-1].get("text", "")) + more}]
    return text_of(content) + more


def shaped(messages: list[dict[str, Any]], wanted: str) -> list[dict[str, Any]]:
    """For a template that reads texts (``string``) or lists of parts (``openai``)."""
    if wanted == "openai":
        return [
            {**one, KEY: [{"type": "text", "text": one[KEY]}]} if isinstance(one.get(KEY), str) else one
            for one in messages
        ]
    return [{**one, KEY: text_of(one[KEY])} if isinstance(one.get(KEY), list) else one for one in messages]


def format_of(template: nodes.Template) -> str:
    """``openai`` where a loop of the template goes over a message's content, by whatever name, else ``string``."""
    names = _names_of_content(template)
    walks = any(_is_content(loop.iter, names) for loop in template.find_all(nodes.For))
    return "openai" if walks else "string"


def _names_of_content(template: nodes.Template) -> set[str]:
    """Variables and macros' arguments that stand for a content somewhere: what they are set to, until nothing is new."""
    macros = {macro.name: macro for macro in template.find_all(nodes.Macro)}
    names: set[str] = set()
    while True:
        found = {
            name
            for name, value in (*_assigned(template), *_passed(template, macros))
            if name not in names and _is_content(value, names)
        }
        if not found:
            return names
        names |= found


def _assigned(template: nodes.Template) -> Iterator[tuple[str, nodes.Node]]:
    for one in template.find_all(nodes.Assign):
        if isinstance(one.target, nodes.Name):
            yield one.target.name, one.node


def _passed(template: nodes.Template, macros: dict[str, nodes.Macro]) -> Iterator[tuple[str, nodes.Node]]:
    for call in template.find_all(nodes.Call):
        macro = macros.get(call.node.name) if isinstance(call.node, nodes.Name) else None
        if macro is not None:
            yield from ((argument.name, value) for argument, value in zip(macro.args, call.args, strict=False))
            yield from ((given.key, given.value) for given in call.kwargs)


def _is_content(value: nodes.Node | None, names: set[str]) -> bool:
    """Whether it is ``message.content``, in whatever spelling, a name that stands for one, or a slice or filter of it."""
    if isinstance(value, nodes.Name):
        return value.name in names
    if isinstance(value, nodes.Getattr):
        return value.attr == KEY
    if isinstance(value, nodes.Getitem):
        if isinstance(value.arg, nodes.Slice):
            return _is_content(value.node, names)
        return isinstance(value.arg, nodes.Const) and value.arg.value == KEY
    if isinstance(value, nodes.Filter):
        return value.name in ("list", "reverse", "selectattr", "rejectattr") and _is_content(value.node, names)
    if isinstance(value, nodes.Call) and isinstance(value.node, nodes.Getattr) and value.node.attr == "get":
        return bool(value.args) and isinstance(value.args[0], nodes.Const) and value.args[0].value == KEY
    if isinstance(value, nodes.CondExpr):
        return _is_content(value.expr1, names) or _is_content(value.expr2, names)
    return False
