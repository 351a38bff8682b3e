"""Whether tokenizer, template and weights belong together. A wrong tokenizer gives fluent nonsense, or no end."""

from __future__ import annotations

import re
from typing import Any

from fastqwen.errors import BadCheckpoint, BadRequest
from fastqwen.text.chatml import PiecewiseChatMl
from fastqwen.text.template import ChatTemplate
from fastqwen.text.tokenizer import Tokenizer

PROBE = "zyxprobe"
MAX_AROUND_CHARS = 200_000  # that a template may write around two messages
CONVERSATION = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": PROBE}]
MARKER = re.compile(r"\s*(<\|[^|<>\s]{1,64}\|>)")
REMEDY = "take the tokenizer that came with these weights, or name it with --tokenizer"


def check_vocabulary(tokenizer: Tokenizer, file: str, rows: int, config_file: str) -> None:
    """A padded embedding has more rows than there are tokens; fewer cannot be. Raises BadCheckpoint."""
    if tokenizer.vocab_size > rows:
        raise BadCheckpoint(
            f"{file} has {tokenizer.vocab_size} tokens, but the embedding of {config_file} has only {rows} rows "
            f"(vocab_size): they do not belong together; {REMEDY}"
        )


def check_eos(tokenizer: Tokenizer, file: str, eos: Any, eos_file: str) -> None:
    """The tokens that ``eos_file`` says end an answer must be ones that the tokenizer sets apart from text.

    One of them is enough, for lists name tokens of related models, too. Raises BadCheckpoint.
    """
    ids = [one for one in (eos if isinstance(eos, (list, tuple)) else [eos]) if type(one) is int]
    if not ids or not tokenizer.added_ids or not tokenizer.added_ids.isdisjoint(ids):
        return
    first = ids[0]
    inside = 0 <= first < tokenizer.vocab_size
    what = f"is the text {tokenizer.token_text(first)!r}" if inside else "does not exist"
    raise BadCheckpoint(
        f"{eos_file} says that token {first} ends an answer (eos_token_id), but in {file} that token {what}: "
        f"they do not belong together; {REMEDY}"
    )


def check_eos_token(tokenizer: Tokenizer, file: str, eos_token: str | int | None, eos_file: str) -> None:
    if isinstance(eos_token, str) and tokenizer.token_id(eos_token) is None:
        raise BadCheckpoint(
            f"{eos_file} says that {eos_token[:80]!r} ends a text (eos_token), but {file} has no such token: "
            f"they do not belong together; {REMEDY}"
        )


def check_template(tokenizer: Tokenizer, file: str, template: ChatTemplate | PiecewiseChatMl | None) -> None:
    """What a template writes behind an answer must be one token, or the model's sign for the end is never seen.

    Only that: some models were trained with other markers spelled out as text. Raises BadCheckpoint.
    """
    if not isinstance(template, ChatTemplate):
        return
    try:
        rendered = template.render(CONVERSATION, add_generation_prompt=False)
    except BadRequest:
        return  # it wants other messages: nothing can be said
    if len(rendered) > MAX_AROUND_CHARS:
        raise BadCheckpoint(
            f"the chat template of {template.origin} makes {len(rendered)} characters of two short messages, "
            f"at most {MAX_AROUND_CHARS} are read: use another one with --chat-template"
        )
    marker = MARKER.match(rendered.partition(PROBE)[2])
    if marker is not None and tokenizer.token_id(marker[1]) is None:
        raise BadCheckpoint(
            f"the chat template of {template.origin} ends an answer with {marker[1]}, but {file} has no such token: "
            f"they do not belong together; {REMEDY}, or another template with --chat-template"
        )
