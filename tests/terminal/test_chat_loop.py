from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastqwen.client.local_partner import LocalPartner
from fastqwen.errors import BadConfig, BadRequest, FastqwenError
from fastqwen.terminal.chat_loop import Conversation, messages_from, run
from fastqwen.terminal.line_editor import LineEditor
from fastqwen.text.answer import Parts
from tests.engine.fakes import scripted
from tests.reliability.mock_model import make_model


class FakePartner:
    name = "fake"
    names = ["fake", "other"]
    max_model_len = 100
    thinks: bool | None = True

    def __init__(self) -> None:
        self.asked: list[tuple[list, dict]] = []
        self.closed = False
        self.fail: BaseException | None = None
        self.thought = ""

    def answer(self, messages, options, template_options=None):
        self.template_options = template_options
        self.asked.append((list(messages), dict(options)))
        try:
            if self.thought:
                yield Parts(reasoning=self.thought[:2])
                yield Parts(reasoning=self.thought[2:])
            yield Parts(content=f"answer {len(self.asked)}")
            if self.fail is not None:
                raise self.fail
        finally:
            self.closed = True

    def close(self):
        self.gone = True

    def count_tokens(self, messages):
        return 10 * len(messages)


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


def test_thoughts_are_dim_on_a_terminal_and_part_of_nothing(
    partner: FakePartner, talk: Conversation, capsys, monkeypatch: pytest.MonkeyPatch
):
    partner.thought = "hmm"
    talk.ask("one")
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("answer 1\n", ""), "no terminal, no thoughts"
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    talk.ask("two")
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("answer 2\n", "\x1b[2mhmm\x1b[0m\n\n")
    partner.fail = KeyboardInterrupt()
    talk.ask("three")
    assert [message["content"] for message in talk.messages[1::2]] == ["answer 1", "answer 2", "answer 3"]


@pytest.mark.parametrize("opened", [True, False], ids=["the-prompt-opens-it", "the-model-opens-it"])
def test_a_model_of_our_own_thinks_apart_as_a_server_does(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch, opened: bool
):
    """A real tokenizer, template and scheduler; the engine is told what to say."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{# </think> #}" + ("<think>\n" if opened else "")
    model = LocalPartner(str(make_model(tmp_path)), {"load_format": "dummy", "chat_template": template})
    end = 258
    said = ("" if opened else "<think>\n") + "Let me see.\n</think>\n\nHello"
    model.engine = scripted([*said.encode(), end])
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    talk = Conversation(model, None, {})
    assert talk.ask("Hi") == 0
    shown = capsys.readouterr()
    assert shown.out == "Hello\n"
    assert "\x1b[2mLet me see." in shown.err
    assert talk.messages[-1] == {"role": "assistant", "content": "Hello"}
    model.close()


def test_thinking_goes_to_the_template_and_not_to_the_sampler(partner: FakePartner, talk: Conversation, capsys):
    talk.command("/set think off")
    talk.ask("one")
    assert partner.asked[0][1] == {} and partner.template_options == {"enable_thinking": False}
    talk.command("/set think perhaps")
    assert "'perhaps' is no value for think" in capsys.readouterr().out
    talk.command("/set think default")
    talk.ask("two")
    assert partner.template_options is None


def test_another_model_goes_on_with_the_same_conversation(partner: FakePartner, capsys):
    second = FakePartner()
    talk = Conversation(partner, None, {}, lambda name: second)
    talk.ask("one")
    talk.command("/model")
    assert "fake (there are also other)" in capsys.readouterr().out
    talk.command("/model other")
    assert partner.name == "other" and talk.partner is partner, "a server's other model is only another name"
    talk.command("/model Qwen/Qwen3-8B")
    talk.ask("two")
    assert partner.gone and [message["content"] for message in second.asked[0][0]] == ["one", "answer 1", "two"]


def test_a_model_that_is_not_there_leaves_the_old_one(partner: FakePartner, capsys):
    def none(name: str) -> FakePartner:
        raise FastqwenError(f"there is no {name}")

    talk = Conversation(partner, None, {}, none)
    assert talk.command("/model nowhere")
    assert talk.partner is partner and capsys.readouterr().err == "fastqwen: there is no nowhere\n"


def test_the_last_question_is_changed_in_an_editor(
    partner: FakePartner, talk: Conversation, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    editor = tmp_path / "editor"
    editor.write_text('#!/bin/sh\nsed -i "s/$1/$2/" "$3"\n')
    editor.chmod(0o755)
    monkeypatch.setenv("VISUAL", f"{editor} one two")
    talk.ask("question one")
    talk.command("/edit")
    assert [message["content"] for message in talk.messages] == ["question two", "answer 2"]
    monkeypatch.setenv("VISUAL", "true")
    talk.command("/new")
    talk.command("/edit")
    assert "Nothing was written" in capsys.readouterr().out and talk.messages == []
    for command, said in (("/no/such/editor", "set EDITOR"), ("false", "ended with 1")):
        monkeypatch.setenv("VISUAL", command)
        talk.command("/edit")
        assert said in capsys.readouterr().err


def test_speeds_are_said_when_asked_for(talk: Conversation, capsys):
    talk.command("/verbose")
    talk.ask("one")
    assert "(about 10 tokens" in capsys.readouterr().err
    talk.command("/verbose")
    talk.ask("two")
    assert "tokens" not in capsys.readouterr().err


def test_one_answer_as_json(partner: FakePartner, talk: Conversation, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    partner.thought = "hmm"
    assert run(talk, prompt="one", as_json=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"model": "fake", "prompt": "one", "reasoning": "hmm", "text": "answer 1"}
    with pytest.raises(BadConfig, match="--json is for one answer"):
        run(talk, prompt=None, as_json=True)


def test_a_switch_that_changes_nothing_is_said_to(capsys: pytest.CaptureFixture[str]):
    partner = FakePartner()
    talk = Conversation(partner, "", {"seed": 1})
    talk.command("/set think on")
    assert capsys.readouterr().out == "temperature default, top_p default, max_tokens default, seed 1, think on\n"
    partner.thinks = False
    talk.command("/set think on")
    assert "fake does not think" in capsys.readouterr().out


def test_help_fits_the_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "60")
    Conversation(FakePartner(), "", {}).command("/help")
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 60 and " " * 23 + "seed" in "\n".join(lines)
