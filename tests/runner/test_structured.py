"""The sampler's grammars: a mask per row, rebuilt from tokens after a preemption, compiled ones bounded."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from fastqwen.ipc.arrivals import Arrivals
from fastqwen.records import Admission, EngineRequest, Failure, Grammar, SamplingParams, StructuredOutputs
from fastqwen.runner import structured
from fastqwen.runner.choices import Choice
from fastqwen.runner.mask_lanes import Mask, Native
from fastqwen.runner.sampler import FORBIDDEN
from fastqwen.runner.structured import GrammarCompiler, StructuredOutput, mask
from fastqwen.text.grammar import grammar_tokenizer, to_grammar
from tests.server.harness import END, VOCAB, ByteTokenizer

PROMPT = list(b"prompt")


@pytest.fixture
def compiler() -> GrammarCompiler:
    return GrammarCompiler(lambda: grammar_tokenizer(ByteTokenizer(), [END], VOCAB))


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine is no grammar's fault."""
    monkeypatch.setattr(structured, "LONE_PATIENCE_S", 60.0)


def admission(regex: str, said: bytes = b"", after: str = "", slot: int = 0) -> Admission:
    return Admission(
        slot=slot,
        request_id="x",
        token_ids=PROMPT + list(said),
        num_prompt_tokens=len(PROMPT),
        sampling=SamplingParams(),
        seed=0,
        stop_token_ids=[END],
        rope_key="",
        grammar=Grammar(to_grammar(StructuredOutputs(regex=regex)), after),
    )


def failures(output: StructuredOutput, logits: torch.Tensor, slot: int = 0) -> dict[int, Failure]:
    found: dict[int, Failure] = {}
    mask(output, logits, [Choice(row=0, slot=slot, position=5)], found)
    return found


def allowed(output: StructuredOutput, slot: int = 0) -> set[str]:
    logits = torch.zeros((1, VOCAB + 10))  # the embedding may have more rows than the tokenizer has tokens
    assert failures(output, logits, slot) == {}
    ids = (logits[0] != FORBIDDEN).nonzero().flatten().tolist()
    return {chr(token) if token < 256 else str(token) for token in ids}


def test_only_what_the_grammar_allows_may_come(compiler: GrammarCompiler):
    output = StructuredOutput(compiler)
    output.admit([admission("ab?")])
    assert allowed(output) == {"a"}
    output.take([0], list(b"a"))
    assert allowed(output) == {"b", str(END)}


def test_a_preempted_row_goes_on_where_it_was(compiler: GrammarCompiler):
    output = StructuredOutput(compiler)
    output.admit([admission("abc", said=b"ab", slot=3)])
    assert allowed(output, slot=3) == {"c"}


def test_thinking_is_free_until_its_end_mark(compiler: GrammarCompiler):
    output = StructuredOutput(compiler)
    output.admit([admission("x", after="</think>")])
    for token in b"hm </think>":
        assert len(allowed(output)) == VOCAB + 10 - 1, "all but the end of an answer that would not have the form"
        output.take([0], [token])
    assert allowed(output) == {"x"}
    output.admit([admission("x", said=b"hm </think>", after="</think>")])
    assert allowed(output) == {"x"}


def test_a_slots_next_sequence_is_free_of_the_last_ones_grammar(compiler: GrammarCompiler):
    output = StructuredOutput(compiler)
    output.admit([admission("ab")])
    free = admission("ab")
    output.admit([Admission(**{name: getattr(free, name) for name in free.__struct_fields__ if name != "grammar"})])
    assert not output.constrains(0)


def test_a_row_whose_grammar_fails_is_reported_and_not_let_free(compiler: GrammarCompiler):
    output = StructuredOutput(compiler)
    output.admit([admission("ab")])
    output.take([0], list(b"z"))
    assert "cannot be used" in failures(output, torch.zeros((1, VOCAB)))[0].message


def test_compiled_grammars_are_bounded(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(structured, "MAX_CACHED_GRAMMARS", 4)
    for number in range(20):
        assert not compiler.compile(to_grammar(StructuredOutputs(regex=f"a{number}")))[0].is_error()
    assert len(compiler) == 4


def test_an_engine_without_a_tokenizer_refuses_instead_of_answering_unconstrained():
    arrivals = Arrivals(None)
    request = EngineRequest(
        request_id="x", prompt_token_ids=[1], sampling=SamplingParams(), stop_token_ids=[], max_tokens=1, seed=0,
        grammar=Grammar("anything"),
    )  # fmt: skip
    arrivals.put(request)
    assert list(arrivals.ready()) == []
    assert [delta.finish_reason for delta in arrivals.refused()] == ["error"]


@pytest.mark.parametrize("grammar", [None, Grammar("anything")])
def test_a_request_that_was_left_before_the_engine_took_it_is_never_taken(grammar: Grammar | None):
    """Both messages came together."""
    arrivals = Arrivals(None)
    for name in ("left", "kept"):
        arrivals.put(
            EngineRequest(
                request_id=name, prompt_token_ids=[1], sampling=SamplingParams(), stop_token_ids=[], max_tokens=1, seed=0,
                grammar=grammar if name == "left" else None,
            )
        )  # fmt: skip
    arrivals.drop("left")
    assert [one.request_id for one in arrivals.ready()] == ["kept"]


def test_a_slow_mask_steps_aside_and_its_row_goes_on_later(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch):
    """The other row has its token meanwhile; the late one's tokens are those that it has without any hurry."""
    computing = threading.Event()
    follow = Native.follow

    def slow(self: Native, *asked: Any) -> list[Mask]:
        computing.wait(10)
        return follow(self, *asked)

    monkeypatch.setattr(Native, "follow", slow)
    output = StructuredOutput(compiler)
    output.admit([admission("ab", slot=0)])
    choices = [Choice(row=0, slot=0, position=7), Choice(row=1, slot=1, position=7)]
    failed: dict[int, Failure] = {}
    assert mask(output, torch.zeros((2, VOCAB)), choices, failed) == {0}
    computing.set()
    assert allowed(output) == {"a"} and not failed


def test_quick_masks_of_a_step_are_asked_for_once(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch):
    """Rows of several grammars, one of which has just failed and one of which sleeps; each is as if alone."""
    together: list[int] = []
    follow = Native.follow

    def noted(self: Native, rows: list[Any], *more: Any) -> list[Mask]:
        together.append(len(rows))
        return follow(self, rows, *more)

    monkeypatch.setattr(Native, "follow", noted)
    monkeypatch.setattr(structured, "SWIFT_S", 10.0)
    output = StructuredOutput(compiler)
    output.admit([admission("ab+", slot=0), admission("[xy]{3}", slot=1), admission("b", after="!", slot=2)])
    output.admit([admission("a?c", slot=3)])
    first = [allowed(output, slot) for slot in (0, 1, 3)]
    assert first == [{"a"}, {"x", "y"}, {"a", "c"}]
    del together[:]
    output.take([0, 1, 2, 3], list(b"ax?a"))
    assert [allowed(output, slot) for slot in (0, 1, 3)] == [{"b"}, {"x", "y"}, {"c"}] and together == [3]
    output.take([0, 1, 3], list(b"?yc"))  # the first one's grammar does not allow this
    assert "cannot be used" in failures(output, torch.zeros((1, VOCAB)))[0].message
    assert [allowed(output, slot) for slot in (1, 3)] == [{"x", "y"}, {str(END)}] and together == [3, 3]


def test_masks_that_came_too_late_together_are_asked_for_one_by_one(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
):
    """It is not known which of them was slow; alone each tells."""
    together: list[int] = []
    follow = Native.follow

    def noted(self: Native, rows: list[Any], *more: Any) -> list[Mask]:
        together.append(len(rows))
        if len(rows) > 1:
            clock[0] += 1.0
        return follow(self, rows, *more)

    clock = [0.0]
    monkeypatch.setattr(Native, "follow", noted)
    monkeypatch.setattr(Native, "time_s", lambda self: clock[0])
    output = StructuredOutput(compiler)
    output.admit([admission("a+", slot=0), admission("b+", slot=1)])
    for _ in range(3):
        assert [allowed(output, slot) - {str(END)} for slot in (0, 1)] == [{"a"}, {"b"}]
        output.take([0, 1], list(b"ab"))
    assert [allowed(output, slot) for slot in (0, 1)] == [{"a", str(END)}, {"b", str(END)}]
    assert together == [1, 1, 2, 1, 1, 2]


def test_a_grammar_beyond_its_budget_ends(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(structured, "BUDGET_S", 0.0)
    monkeypatch.setattr(structured, "BUDGET_PER_TOKEN_S", 0.0)
    output = StructuredOutput(compiler)
    output.admit([admission("ab")])
    failures(output, torch.zeros((1, VOCAB)))
    output.take([0], list(b"a"))
    assert "simpler" in failures(output, torch.zeros((1, VOCAB)))[0].message
    output.admit([admission("ab", slot=1)])  # nor does it begin once more
    assert "simpler" in failures(output, torch.zeros((1, VOCAB)), slot=1)[0].message
