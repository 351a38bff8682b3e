from __future__ import annotations

from pathlib import Path

import pytest

from fastqwen.errors import BadRequest, FastqwenError
from fastqwen.terminal.chat_loop import Conversation, messages_from
from fastqwen.terminal.line_editor import LineEditor


class FakePartner:
    name = "fake"

    def __init__(self) -> None:
        self.asked: list[tuple[list, dict]] = []
        self.closed = False
        self.fail: BaseException | None = None

    def answer(self, messages, options):
        self.asked.append((list(messages), dict(options)))
        try:
            yield f"answer {len(self.asked)}"
            if self.fail is not None:
                raise self.fail
        finally:
            self.closed = True

    def count_tokens(self, messages):
        return 10 * len(messages), 100


@pytest.fixture
def partner() -> FakePartner:
    return FakePartner()


@pytest.fixture
def talk(partner: FakePartner) -> Conversation:
    return Conversation(partner, None, {})


def test_history_grows_by_question_and_answer(partner: FakePartner, talk: Conversation):
    talk.ask("one")
    talk.ask("two")
    assert [message["content"] for message in partner.asked[1][0]] == ["one", "answer 1", "two"]


def test_regen_asks_the_last_question_again(partner: FakePartner, talk: Conversation):
    talk.ask("one")
    assert talk.command("/regen")
    assert partner.asked[1][0] == [{"role": "user", "content": "one"}]
    assert talk.messages[-1]["content"] == "answer 2"


def test_settings_reach_the_model_and_default_takes_them_back(partner: FakePartner, talk: Conversation, capsys):
    talk.command("/set temperature 0.3")
    talk.command("/set max_tokens many")
    assert "'many' is no value for max_tokens" in capsys.readouterr().out
    talk.command("/set colour red")
    assert "no setting colour" in capsys.readouterr().out
    talk.ask("one")
    assert partner.asked[0][1] == {"temperature": 0.3}
    talk.command("/set temperature default")
    talk.ask("two")
    assert partner.asked[1][1] == {}


def test_a_kept_conversation_goes_on(partner: FakePartner, talk: Conversation, tmp_path: Path):
    talk.command("/system Be brief.")
    talk.ask("one")
    talk.command(f"/save {tmp_path / 'kept.json'}")
    other = Conversation(partner, None, {})
    other.command(f"/load {tmp_path / 'kept.json'}")
    assert other.messages == talk.messages


@pytest.mark.parametrize("content", ["", "{}", "[1]", '[{"role": "user"}]'])
def test_other_files_are_not_conversations(talk: Conversation, tmp_path: Path, content: str, capsys):
    (tmp_path / "other.json").write_text(content)
    assert talk.command(f"/load {tmp_path / 'other.json'}")
    assert talk.messages == []
    assert talk.command(f"/load {tmp_path / 'missing.json'}")
    assert "missing.json" in capsys.readouterr().err


def test_tokens_new_and_exit(talk: Conversation, capsys):
    talk.ask("one")
    talk.command("/tokens")
    assert "20 of 100 tokens" in capsys.readouterr().out
    talk.command("/new")
    assert talk.messages == []
    assert talk.command("/whatever")
    assert not talk.command("/exit")


def test_ctrl_c_stops_the_answer_and_not_the_program(partner: FakePartner, talk: Conversation):
    partner.fail = KeyboardInterrupt()
    assert talk.ask("one") == 0
    assert partner.closed
    assert talk.messages[-1] == {"role": "assistant", "content": "answer 1"}


def test_an_error_is_one_line_and_the_question_is_forgotten(partner: FakePartner, talk: Conversation, capsys):
    partner.fail = FastqwenError("the server is gone")
    assert talk.ask("one") == 1
    assert capsys.readouterr().err == "fastqwen: the server is gone\n"
    assert talk.messages == []


def test_messages_of_several_lines():
    lines = ["one", '"""', "two", "  three", '"""', "four \\", "five", "/help"]
    prompts = []

    def read(prompt: str) -> str:
        prompts.append(prompt)
        if not lines:
            raise EOFError
        return lines.pop(0)

    assert list(messages_from(read)) == ["one", "two\n  three", "four \nfive", "/help"]
    assert prompts == ["> ", "> ", ". ", ". ", ". ", "> ", ". ", "> ", "> "]


def test_ctrl_c_drops_a_half_message(capsys):
    typed: list[str | type[BaseException]] = ['"""', "half", KeyboardInterrupt, "whole", EOFError]

    def read(prompt: str) -> str:
        found = typed.pop(0)
        if isinstance(found, str):
            return found
        raise found

    assert list(messages_from(read)) == ["whole"]
    assert "Ctrl-D or /exit ends" in capsys.readouterr().out


def test_what_was_typed_is_remembered_for_the_next_time(tmp_path: Path):
    kept = tmp_path / "history"
    editor = LineEditor(kept)
    for message in ("one", "two\nlines", "two\nlines", " ", "你好"):
        editor.remember(message)
    assert LineEditor(kept)._kept() == ["one", "two\nlines", "你好"]
    assert kept.stat().st_mode & 0o777 == 0o600
    kept.write_text("not JSON")
    assert LineEditor(kept)._kept() == []


def test_a_full_context_says_what_to_do(partner: FakePartner, talk: Conversation, capsys):
    talk.ask("one")
    partner.fail = BadRequest("the prompt is longer than the context", "messages", "context_length_exceeded")
    assert talk.ask("two") == 1
    assert "/new forgets the conversation" in capsys.readouterr().err
    assert [message["content"] for message in talk.messages] == ["one", "answer 1"]
