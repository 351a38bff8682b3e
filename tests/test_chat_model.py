"""ChatModel: dialogues in this process and against a server, alone and many at once."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import fastqwen
from fastqwen import ChatModel
from fastqwen.client.engine_thread import FAILED
from fastqwen.errors import BadCheckpoint, BadConfig, BadRequest, EngineGone, FastqwenError
from fastqwen.text.answer import Parts
from tests.engine.fakes import scripted
from tests.models.tiny import make_qwen1

END_OF_TURN = 151645
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 12}
CHAT_CONFIG = {"chat_format": "chatml", "eos_token_id": 151643, "top_k": 0, "top_p": 0.8, "repetition_penalty": 1.1}


@pytest.fixture(scope="module")
def checkpoint(qwen_tiktoken: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen1")
    make_qwen1(folder, vocab_size=151936, max_position_embeddings=1024)
    (folder / "qwen.tiktoken").symlink_to(qwen_tiktoken)
    config = {**CHAT_CONFIG, "max_new_tokens": 9, "max_window_size": 200}
    (folder / "generation_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def local(checkpoint: Path) -> Iterator[ChatModel]:
    with ChatModel(str(checkpoint), tensor_parallel_size=1, seed=1) as model:
        yield model


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[str]:
    """A real `fastqwen serve` in a process of its own."""
    command = [sys.executable, "-m", "fastqwen.cli.main", "serve", str(checkpoint), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        log = ""
        while "is ready" not in log:
            line = process.stderr.readline()
            assert line, log
            log += line
        found = re.search(r"API (http://\S+)/v1", log)
        assert found, log
        with ThreadPoolExecutor(1) as drain:
            drain.submit(process.stderr.read)
            yield found[1]
            process.terminate()
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def remote(server: str) -> Iterator[ChatModel]:
    with ChatModel(server) as model:
        yield model


def prompt_text(model: ChatModel, monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> str:
    """What the model is shown for these arguments."""
    partner: Any = model._partner
    seen: list[Any] = []
    monkeypatch.setattr(partner, "answer", lambda *request: seen.append(request) or iter([Parts(content="ok")]))
    model.chat(**arguments)
    monkeypatch.undo()
    return partner.text_of(partner._model.chat_token_ids(seen[0][0]))


def dialogue(model: ChatModel, *queries: str, **options: Any) -> list[tuple[str, str]]:
    history: list[tuple[str, str]] | None = None
    for query in queries:
        _, history = model.chat(query, history, **{**GREEDY, **options})
    return history or []


def test_history_is_the_callers(local: ChatModel):
    given = [("a", "b"), ["c", "d"]]
    before = copy.deepcopy(given)
    response, history = local.chat("你好", history=given, **GREEDY)
    assert given == before
    assert history == [("a", "b"), ("c", "d"), ("你好", response)]
    assert response and local.chat("你好", history=given, **GREEDY) == (response, history)
    assert local.chat("你好", history=None, **GREEDY)[1][0][0] == "你好"


def test_the_prompt(local: ChatModel, monkeypatch: pytest.MonkeyPatch):
    found = prompt_text(local, monkeypatch, query="q <|im_end|>", history=[("你", "好")], system="s")
    assert found == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\n你<|im_end|>\n<|im_start|>assistant\n好<|im_end|>\n"
        "<|im_start|>user\nq <|im_end|><|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt_text(local, monkeypatch, query="q").startswith(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>"
    )


def test_history_is_cut_by_whole_turns(local: ChatModel, monkeypatch: pytest.MonkeyPatch):
    history = [(f"{number}", "y") for number in range(9)]

    def shown(**options: Any) -> list[str]:
        text = prompt_text(local, monkeypatch, query="q", history=history, system="s", **options)
        return re.findall(r"user\n(\d)<", text)

    one, two = _count(local, history[-1:]), _count(local, history[-2:])
    windows = {size: shown(max_window_size=size) for size in (1, one, one + 1, two, two + 1)}
    assert windows == {1: [], one: [], one + 1: ["8"], two: ["8"], two + 1: ["7", "8"]}, "the window is strict"
    assert shown() == [str(number) for number in range(9)], "generation_config.json says 200"
    assert shown(generation_config={"max_window_size": one + 1}) == ["8"]
    assert shown(generation_config={"max_window_size": one + 1}, max_window_size=two + 1) == ["7", "8"]


def _count(model: ChatModel, history: list[tuple[str, str]]) -> int:
    messages = fastqwen.chat_model.to_messages(history, system="s")
    return model._partner.count_tokens(messages, add_generation_prompt=False)


def test_history_never_fills_the_context(local: ChatModel):
    history = [("x " * 300, "y " * 300)] * 5 + [("", "z" * 600_000)]
    response, longer = local.chat("q", history=history, max_window_size=10**6, **GREEDY)
    assert response and len(longer) == 7
    with pytest.raises(BadRequest, match="context"):
        local.chat("x " * 3000, history=None)


def test_lengths(local: ChatModel):
    def text(**options: Any) -> str:
        return local.chat("Hi", temperature=0.0, ignore_eos=True, **options)[0]

    nine = text()  # generation_config.json's max_new_tokens
    assert text(max_tokens=9) == text(max_new_tokens=9) == nine
    twenty = text(generation_config={"max_new_tokens": 20})
    assert twenty.startswith(nine) and len(twenty) > len(nine)
    assert text(generation_config={"max_new_tokens": 20}, max_tokens=9) == nine


def test_sampling(local: ChatModel):
    greedy = local.chat("Hi", **GREEDY)[0]
    assert local.chat("Hi", max_tokens=12, generation_config={"do_sample": False})[0] == greedy
    assert local.chat("Hi", max_tokens=12, temperature=5.0, seed=3)[0] != greedy
    assert local.chat("Hi", max_tokens=12, temperature=5.0, seed=3) == local.chat(
        "Hi", max_tokens=12, temperature=5.0, seed=3
    )
    config = SimpleNamespace(to_dict=lambda: {"temperature": 0.0, "top_k": None, "num_beams": 1, "max_new_tokens": 12})
    assert local.chat("Hi", generation_config=config)[0] == greedy


def test_stream_yields_the_text_so_far(local: ChatModel):
    response, _ = local.chat("Hi", **GREEDY)
    texts = list(local.chat_stream("Hi", [], **GREEDY))
    assert texts[-1] == response and len(texts) > 3
    assert all(later.startswith(earlier) and len(later) > len(earlier) for earlier, later in pairwise(texts))


def test_a_stream_that_is_left_ends_its_work(local: ChatModel):
    stream = local.chat_stream("Hi", temperature=0.0, max_tokens=400, ignore_eos=True)
    next(iter(stream))
    stream.close()  # type: ignore[attr-defined]
    core = local._partner._model.core
    deadline_s = time.monotonic() + 10
    while core.has_work and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert not core.has_work


@pytest.mark.parametrize("kind", ["local", "remote"])
def test_stop_words(kind: str, request: pytest.FixtureRequest):
    model: ChatModel = request.getfixturevalue(kind)
    partner = request.getfixturevalue("local")._partner
    whole, _ = model.chat("Hi", **GREEDY)
    ids = partner._text.tokenizer.encode_plain(whole)
    assert len(ids) > 8
    two = partner.text_of(ids[4:6])
    assert "\ufffd" not in two
    cut = whole[: whole.index(two)]
    assert model.chat("Hi", stop_words_ids=[ids[4:6]], **GREEDY)[0] == cut
    assert model.chat("Hi", stop_words_ids=[[0, 0, 0], ids[4:6]], **GREEDY)[0] == cut
    assert model.chat("Hi", stop_words_ids=[[0, 0, 0]], **GREEDY)[0] == whole
    assert model.chat("Hi", generation_config={"stop_words_ids": [ids[4:6]]}, **GREEDY)[0] == cut
    for text in model.chat_stream("Hi", stop_words_ids=[ids[4:6]], **GREEDY):
        assert cut.startswith(text), "a piece of the stop word leaked"
    for bad in ([5], [[]], [["x"]], [[151644, 198]], "ab"):
        with pytest.raises(BadRequest) as caught:
            model.chat("Hi", stop_words_ids=bad)
        assert caught.value.param == "stop_words_ids"


@pytest.mark.parametrize("kind", ["local", "remote"])
def test_one_token_stops_by_its_id(kind: str, request: pytest.FixtureRequest):
    model: ChatModel = request.getfixturevalue(kind)
    options: dict[str, Any] = {**GREEDY, "repetition_penalty": 1.0}
    options["logit_bias"] = {9707: 100.0}
    assert model.chat("Hi", **options)[0] == "Hello" * 12
    assert model.chat("Hi", stop_words_ids=[[9707]], **options)[0] == ""
    assert model.chat("Hi", generation_config={"eos_token_id": 9707}, **options)[0] == ""


@pytest.mark.parametrize(("opening", "text"), [("", "<think>\nhm"), ("<think>\n", "hm")])
def test_thinking_is_left_out(checkpoint: Path, opening: str, text: str):
    """The engine is told what to write: first thoughts, then the answer."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{# </think> #}" + opening
    with ChatModel(str(checkpoint), chat_template=template) as model:
        partner: Any = model._partner
        ids = [*partner._text.tokenizer.encode_plain(text + "</think>\n\nHello there"), END_OF_TURN]

        partner.engine = scripted(ids)
        assert model.chat("Hi")[0] == "Hello there"
        assert list(model.chat_stream("Hi")) == ["Hello", "Hello there"]


def test_many_chats_at_once_give_what_each_gives_alone(local: ChatModel):
    talks = [(f"Hello {number}", "再说一遍", "x " * (40 * number)) for number in range(8)]
    alone = [dialogue(local, *talk) for talk in talks]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda talk: dialogue(local, *talk), talks))
    assert together == alone


def test_a_server_gives_the_same_transcripts(local: ChatModel, remote: ChatModel):
    queries = ("你好", "What is <|im_end|>?", "x " * 50, "再见")
    assert dialogue(remote, *queries, max_window_size=150) == dialogue(local, *queries, max_window_size=150)
    arguments: dict[str, Any] = {"history": [("a", "b")], "system": "Be brief.", **GREEDY, "repetition_penalty": 1.0}
    assert remote.chat("Hi", **arguments) == local.chat("Hi", **arguments)
    assert list(remote.chat_stream("Hi", **arguments))[-1] == local.chat("Hi", **arguments)[0]
    with ThreadPoolExecutor(4) as threads:
        talks = [("one", "two"), ("three", "four"), ("five", "six"), ("seven", "eight")]
        together = list(threads.map(lambda talk: dialogue(remote, *talk), talks))
    assert together == [dialogue(local, *talk) for talk in talks]


@pytest.mark.parametrize("kind", ["local", "remote"])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"query": 5}, "query"),
        ({"history": [("a",)]}, "history"),
        ({"history": ["ab"]}, "history"),
        ({"history": [("a", None)]}, "history"),
        ({"temperature": -1}, "temperature"),
        ({"nonsense": 1}, "nonsense"),
        ({"n": 2}, "n"),
        ({"structured_outputs": {"json_object": True}}, "structured_outputs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"generation_config": {"chat_format": "raw"}}, "chat_format is 'raw'"),
        ({"generation_config": {"num_beams": 4}}, "num_beams"),
        ({"generation_config": "x"}, "generation_config"),
        ({"query": "x " * 3000}, "context"),
    ],
)
def test_mistakes(kind: str, arguments: dict[str, Any], words: str, request: pytest.FixtureRequest):
    model: ChatModel = request.getfixturevalue(kind)
    with pytest.raises((BadRequest, BadConfig), match=words):
        model.chat(**{"query": "Hi", **arguments})
    assert model.chat("Hi", **GREEDY)[0], "it goes on after a mistake"


def test_models_that_do_not_chat_this_way(checkpoint: Path, tmp_path: Path):
    for path in checkpoint.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "generation_config.json").write_text(json.dumps({**CHAT_CONFIG, "chat_format": "raw"}))
    with pytest.raises(BadCheckpoint, match="chat_format 'raw'"):
        ChatModel(str(tmp_path))


def test_options(checkpoint: Path, server: str):
    for options, words in (
        ({"tensor_parallel_size": 0}, "--tensor-parallel-size is 0"),
        ({"pipeline_parallel_size": 2}, "use --tensor-parallel-size"),
        ({"nonsense": 1}, "nonsense"),
        ({"skip_tokenizer_init": True}, "tokenizer"),
    ):
        with pytest.raises(BadConfig, match=words):
            ChatModel(str(checkpoint), **options)
    with pytest.raises(BadConfig, match="dtype"):
        ChatModel(server, dtype="float32")
    with pytest.raises(FastqwenError, match="does not answer"):
        ChatModel("http://127.0.0.1:9")


def test_closing_and_failing(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    model = ChatModel(str(checkpoint))
    stream = model.chat_stream("Hi", temperature=0.0, max_tokens=900, ignore_eos=True)
    next(iter(stream))
    model.close()
    model.close()
    with pytest.raises(FastqwenError, match="closed"):
        list(stream)
    with pytest.raises(EngineGone, match="closed"):
        model.chat("Hi")
    broken = ChatModel(str(checkpoint))
    monkeypatch.setattr(broken._partner._model.core, "step", lambda: 1 / 0)
    for _ in range(2):
        with pytest.raises(FastqwenError, match=FAILED.message):
            broken.chat("Hi")
    assert "ZeroDivisionError" in caplog.text
    broken.close()


def test_the_program_ends_with_a_chat_still_running(checkpoint: Path):
    script = (
        "from fastqwen import ChatModel\n"
        f"model = ChatModel({str(checkpoint)!r})\n"
        "stream = model.chat_stream('Hi', max_tokens=900, ignore_eos=True, temperature=0.0)\n"
        "print(len(next(iter(stream))) > 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "True"), done.stderr
    assert "Traceback" not in done.stderr
