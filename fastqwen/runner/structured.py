"""Structured output in the sampler: which tokens a row's grammar allows next.

The matchers live on the host and see each token after it was sampled, so a step with such a row cannot run ahead of it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from threading import Lock

import llguidance
import torch
from torch import Tensor

from fastqwen.records import Admission, Failure, Grammar
from fastqwen.runner.choices import Choice
from fastqwen.runner.sampler import FORBIDDEN

MAX_CACHED_GRAMMARS = 64


class GrammarCompiler:
    """Compiled grammars, the least recently used ones forgotten. ``compile`` may be called from any thread."""

    def __init__(self, load_tokenizer: Callable[[], llguidance.LLTokenizer]) -> None:
        self._load_tokenizer = load_tokenizer
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._cache: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._cache)

    def tokenizer(self) -> llguidance.LLTokenizer:
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = self._load_tokenizer()
            return self._tokenizer

    def compile(self, grammar: str) -> llguidance.LLMatcher:
        """A matcher at its beginning, the caller's own. Its ``is_error`` says whether the grammar was usable."""
        tokenizer = self.tokenizer()
        with self._lock:
            known = self._cache.get(grammar)
            if known is not None:
                self._cache.move_to_end(grammar)
                return known.deep_copy()
        made = llguidance.LLMatcher(tokenizer, grammar, log_level=0)
        with self._lock:
            self._cache[grammar] = made
            while len(self._cache) > MAX_CACHED_GRAMMARS:
                self._cache.popitem(last=False)
            return made.deep_copy()


class _Constraint:
    """One row's matcher. It sleeps until the text ``after`` has been generated."""

    def __init__(self, grammar: Grammar, matcher: llguidance.LLMatcher, tokenizer: llguidance.LLTokenizer) -> None:
        self._matcher = matcher
        self._tokenizer = tokenizer
        self._awaited = grammar.after.encode()
        self._tail = b""

    def take(self, token_ids: Sequence[int]) -> None:
        for index, token_id in enumerate(token_ids):
            if not self._awaited:
                self._matcher.consume_tokens(list(token_ids[index:]))
                return
            self._tail += self._tokenizer.decode_bytes([token_id])
            if self._awaited in self._tail:
                self._awaited = b""
            self._tail = self._tail[-len(self._awaited) :]

    @property
    def active(self) -> bool:
        return not self._awaited

    @property
    def error(self) -> str | None:
        return self._matcher.get_error() if self._matcher.is_error() else None

    def mask(self) -> Tensor:
        """uint8 [ceil(vocab / 8)], one bit per token"""
        return torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)


class StructuredOutput:
    """A constraint per slot, for the slots that have one."""

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self._constraints: dict[int, _Constraint] = {}

    def admit(self, admissions: Sequence[Admission]) -> None:
        """Also after a preemption: what was generated before is taken in again."""
        for admission in admissions:
            self._constraints.pop(admission.slot, None)
            if admission.grammar is not None:
                matcher = self._compiler.compile(admission.grammar.text)
                constraint = _Constraint(admission.grammar, matcher, self._compiler.tokenizer())
                constraint.take(admission.token_ids[admission.num_prompt_tokens :])
                self._constraints[admission.slot] = constraint

    def constrains(self, slot: int) -> bool:
        return slot in self._constraints

    def mask(self, logits: Tensor, choices: Sequence[Choice], errors: dict[int, Failure]) -> None:
        """Forbid tokens in place, logits [choices, vocab]. Rows that cannot go on are added to ``errors``, with the reason.

        A row with a grammar has one choice in a step: the next one depends on it.
        """
        for index, choice in enumerate(choices):
            constraint = self._constraints.get(choice.slot)
            if constraint is None or not constraint.active:
                continue
            bits = constraint.mask()
            if constraint.error is not None:
                why = constraint.error.partition("\n")[0][:300]
                failure = Failure("grammar", f"the grammar for structured output cannot be used: {why}")
                errors.setdefault(choice.row, failure)
                continue
            allowed = (bits[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
            flags = torch.zeros(logits.shape[1], dtype=torch.bool)
            count = min(logits.shape[1], allowed.numel())
            flags[:count] = allowed.flatten()[:count].bool()
            logits[index].masked_fill_(~flags.to(logits.device), FORBIDDEN)

    def take(self, slots: Sequence[int], token_ids: Sequence[int]) -> None:
        """What was sampled in these slots."""
        for slot, token_id in zip(slots, token_ids, strict=True):
            constraint = self._constraints.get(slot)
            if constraint is not None:
                constraint.take([token_id])
