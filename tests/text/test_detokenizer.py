"""Text that grows token by token equals the whole, whatever bytes the tokens hold and wherever a stop string is cut."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastqwen.client.assemble import Assembler
from fastqwen.records import RequestDelta, SamplingParams
from fastqwen.text.detokenizer import Detokenizer
from fastqwen.text.tokenizer import Tokenizer


class Pieces(Tokenizer):
    """Token i is the i-th piece of bytes; the last one is a control token."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = [*pieces, b"<|end|>"]
        self.control_tokens = {"<|end|>": len(pieces)}

    @property
    def vocab_size(self) -> int:
        return len(self._pieces)

    def token_bytes(self, token_id: int) -> bytes:
        return self._pieces[token_id]

    def token_id(self, token: str) -> int | None:
        return self.control_tokens.get(token)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        raise NotImplementedError

    def encode_plain(self, text: str) -> list[int]:
        raise NotImplementedError


TEXT = st.text(alphabet="ab\n é中文🙂🤷🏽‍♀️\u0301�", max_size=40)


@st.composite
def cut_texts(draw: st.DrawFn) -> tuple[str, list[bytes]]:
    """A text, and its bytes cut anywhere, inside characters as well."""
    text = draw(TEXT)
    data = text.encode()
    places = sorted(draw(st.sets(st.integers(0, len(data)), max_size=12)) | {0, len(data)})
    return text, [data[a:b] for a, b in itertools.pairwise(places)]


def read(pieces: Sequence[bytes], stop: Sequence[str] = (), **options: object) -> tuple[list[str], str | None]:
    detokenizer = Detokenizer(Pieces(pieces), stop=stop, **options)  # type: ignore[arg-type]
    found = []
    for token_id in range(len(pieces)):
        found.append(detokenizer.push(token_id))
        if detokenizer.stopped_by is not None:
            break
    found.append(detokenizer.finish())
    return found, detokenizer.stopped_by


@settings(max_examples=1000, deadline=None)
@given(st.integers(1, 9), st.integers(0, 3))
def test_stop_strings_count_only_behind_the_text_that_they_wait_for(size: int, more: int):
    text = "a stop, </think" + ">" * (1 + more) + "one stop two"
    pieces = [text[at : at + size].encode() for at in range(0, len(text), size)]
    found, stopped_by = read(pieces, ["stop"], stops_after="</think>")
    assert ("".join(found), stopped_by) == (text.partition("stop two")[0], "stop")


@given(cut_texts())
def test_pieces_make_the_whole_and_no_character_is_broken(cut: tuple[str, list[bytes]]):
    text, pieces = cut
    found, _ = read(pieces)
    assert "".join(found) == text
    assert sum(piece.count("\ufffd") for piece in found) == text.count("\ufffd"), "only what the text itself has"


@settings(max_examples=1000, deadline=None)
@given(st.lists(st.binary(max_size=6), max_size=20))
def test_any_bytes_at_all(pieces: list[bytes]):
    found, _ = read(pieces)
    assert "".join(found) == b"".join(pieces).decode("utf-8", errors="replace")


@settings(max_examples=1000, deadline=None)
@given(
    cut_texts(), st.lists(st.text(alphabet="ab é中🙂", min_size=1, max_size=4), min_size=1, max_size=3), st.booleans()
)
def test_stop_strings_split_anywhere(cut: tuple[str, list[bytes]], stops: list[str], keep: bool):
    """The first stop in the text ends it; nothing of it was shown before, and without one nothing is lost."""
    text, pieces = cut
    found, stopped_by = read(pieces, stops, include_stop=keep)
    shown = "".join(found)
    places = [(text.find(stop), stop) for stop in stops if stop in text]
    if not places:
        assert (shown, stopped_by) == (text, None)
        return
    assert stopped_by in stops
    cut_at = len(shown) - (len(stopped_by) if keep else 0)
    assert text.startswith(shown) and text.startswith(stopped_by, cut_at)
    # Tokens come one by one, so a stop that is complete earlier may win over one that begins earlier and ends later.
    first_end = min(place + len(stop) for place, stop in places)
    assert cut_at >= min(place for place, _ in places)
    assert cut_at + len(stopped_by) >= first_end
    before = text[:cut_at]
    assert not any(stop in before for stop in stops)


@settings(max_examples=300, deadline=None)
@given(cut_texts(), st.text(alphabet="ab é", min_size=1, max_size=3))
def test_what_is_shown_is_never_taken_back_and_held_back_only_if_needed(cut: tuple[str, list[bytes]], stop: str):
    text, pieces = cut
    assume(stop not in text)
    detokenizer = Detokenizer(Pieces(pieces), stop=[stop])
    shown, decoded = "", b""
    for token_id, piece in enumerate(pieces):
        shown += detokenizer.push(token_id)
        decoded += piece
        whole = decoded.decode("utf-8", errors="ignore")
        assert text.startswith(shown)
        held = whole[len(shown) :]
        assert held == "" or stop.startswith(held) or held.startswith("\ufffd")


@settings(max_examples=500, deadline=None)
@given(
    cut_texts(),
    st.lists(st.text(alphabet="ab é中", min_size=1, max_size=3), max_size=2),
    st.integers(1, 4),
    st.booleans(),
)
def test_one_finish_reason_and_the_same_text_in_any_grouping(
    cut: tuple[str, list[bytes]], stops: list[str], group: int, ends: bool
):
    """Deltas of one token or of several, ended by the length or by the end-of-turn token."""
    _, pieces = cut
    tokenizer = Pieces(pieces)
    end = tokenizer.control_tokens["<|end|>"]
    tokens = [*range(len(pieces)), *([end] if ends else [])]
    assume(tokens)

    def run(size: int) -> tuple[str, list[str], list[int], object]:
        assembler = Assembler(0, SamplingParams(stop=stops), tokenizer, [end])
        reasons = []
        for start in range(0, len(tokens), size):
            ids = tokens[start : start + size]
            last = start + size >= len(tokens)
            reason = ("stop" if ends else "length") if last else None
            stop_reason = end if last and ends else None
            piece = assembler.feed(
                RequestDelta(request_id="x", token_ids=ids, finish_reason=reason, stop_reason=stop_reason)
            )
            if piece.finish_reason is not None:
                reasons.append(piece.finish_reason)
                assert piece.abort is (reason is None)
                break
        return assembler.output.text, reasons, assembler.output.token_ids, assembler.output.stop_reason

    text, reasons, ids, stop_reason = run(1)
    assert len(reasons) == 1
    assert run(group) == (text, reasons, ids, stop_reason)
    assert run(len(tokens)) == (text, reasons, ids, stop_reason)
    assert "<|end|>" not in text and not any(stop in text for stop in stops)
