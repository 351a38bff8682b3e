"""Structured output: from what a user may ask for to a grammar of llguidance, and the tokenizer that it needs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import llguidance
from llguidance.gbnf_to_lark import gbnf_to_lark

from fastqwen.errors import BadRequest
from fastqwen.records import MAX_GRAMMAR_CHARS, StructuredOutputs
from fastqwen.text.json_schema import with_bounded_integers, without_annotations
from fastqwen.text.strict_json import StrictJsonError, loads
from fastqwen.text.tokenizer import Tokenizer

MAX_CHOICES = 1024
# Free white space between a JSON's parts, but not so much that a model could write nothing else.
_JSON_OPTIONS: Any = {"whitespace_pattern": r"[ \n]{0,64}"}


def to_grammar(spec: StructuredOutputs) -> str:
    """llguidance's own text for it. Raises BadRequest, naming the field; whether it compiles is not known yet."""
    if spec.json_object:
        return _json_grammar({"type": "object"})
    if spec.json is not None:
        return _json_grammar(_schema(spec.json))
    if spec.regex is not None:
        return _limited(llguidance.LLMatcher.grammar_from_regex(_limited(spec.regex, "regex")), "regex")
    if spec.choice is not None:
        return lark(f"start: {_alternatives(spec.choice)}")
    assert spec.grammar is not None
    text = _limited(spec.grammar, "grammar")
    if "::=" in text:
        try:
            text = gbnf_to_lark(text)
        except Exception as error:  # the converter raises what its parser raises
            raise BadRequest(f"the grammar does not parse: {error}", "grammar") from None
    return lark(text)


def lark(text: str) -> str:
    return _limited(llguidance.LLMatcher.grammar_from_lark(_limited(text, "grammar")), "grammar")


def quoted(text: str) -> str:
    """A literal in a Lark grammar."""
    return json.dumps(text, ensure_ascii=False)


def check_grammar(grammar: str, tokenizer: llguidance.LLTokenizer) -> None:
    """Compile it. Raises BadRequest with the compiler's reason."""
    failed, messages = llguidance.LLMatcher.validate_grammar_with_warnings(grammar, tokenizer)
    if not failed:
        matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0)
        if matcher.is_error():
            failed, messages = True, [matcher.get_error()]
        else:
            matcher.compute_bitmask()  # the first mask finds what only shows at work
            failed, messages = matcher.is_error(), [matcher.get_error()]
    if failed:
        reason = " ".join(" ".join(messages).split())[:500]
        raise BadRequest(f"the grammar or schema for structured output cannot be used: {reason}", "structured_outputs")


class _Words:
    """What llguidance asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, stop_token_ids: Sequence[int], vocab_size: int) -> None:
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in range(vocab_size)]
        self.special_token_ids = sorted({*tokenizer.control_tokens.values(), *stop_token_ids})
        self.eos_token_id = stop_token_ids[0]
        self.bos_token_id = None
        self._encode = tokenizer.encode_plain

    def __call__(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise TypeError("give a str")
        return self._encode(text)


def grammar_tokenizer(tokenizer: Tokenizer, stop_token_ids: Sequence[int], vocab_size: int) -> llguidance.LLTokenizer:
    """Takes a second for a large vocabulary. Raises BadRequest for a model of which no end-of-text token is known."""
    if not stop_token_ids:
        raise BadRequest("this model has no end-of-text token, which structured output needs", "structured_outputs")
    words = _Words(tokenizer, stop_token_ids, vocab_size)
    return llguidance.LLTokenizer(
        llguidance.TokenizerWrapper(words), n_vocab=vocab_size, eos_token=list(stop_token_ids)
    )


def json_grammar_part(schema: Any) -> str:
    """A JSON value inside a Lark grammar, of which a call is made."""
    schema = with_bounded_integers(without_annotations(schema))
    return "%json " + json.dumps({"x-guidance": _JSON_OPTIONS, **schema} if isinstance(schema, dict) else schema)


def either(first: str, second: str) -> str:
    """A grammar for what one of two allows: ``first`` is Lark with a rule ``start_call``, the other any of llguidance's texts."""
    other = json.loads(second)["grammars"] if second.startswith("{") else [{"lark_grammar": second}]
    return json.dumps(
        {"grammars": [{"lark_grammar": f"start: start_call | @answer\n{first}"}, {**other[0], "name": "answer"}]}
    )


def _json_grammar(schema: Any) -> str:
    if schema is False:
        raise BadRequest("the schema false allows nothing", "json")
    try:
        text = _limited(json.dumps({} if schema is True else without_annotations(schema)), "json")
        return _limited(llguidance.LLMatcher.grammar_from_json_schema(text, overrides=_JSON_OPTIONS), "json")
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the JSON schema cannot be used: {error}", "json") from None


def _schema(value: Any) -> Any:
    if isinstance(value, str):
        try:
            value = loads(_limited(value, "json"))
        except StrictJsonError as error:
            raise BadRequest(f"the JSON schema is not JSON: {error}", "json") from None
    if not isinstance(value, (dict, bool)):
        raise BadRequest("a JSON schema must be an object", "json")
    return value


def _alternatives(choices: Sequence[str]) -> str:
    if not 1 <= len(choices) <= MAX_CHOICES or not all(choices):
        raise BadRequest(f"choice must have 1 to {MAX_CHOICES} texts, none of them empty", "choice")
    return " | ".join(quoted(one) for one in choices)


def _limited(grammar: str, field: str) -> str:
    if len(grammar) > MAX_GRAMMAR_CHARS:
        raise BadRequest(f"{field} has {len(grammar)} characters, at most {MAX_GRAMMAR_CHARS} are allowed", field)
    return grammar
