"""Contents as texts or as lists of parts: what a template walks through decides, unless it was said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastqwen import LLM, SamplingParams
from fastqwen.config import EngineConfig
from fastqwen.errors import BadRequest
from fastqwen.server.dialects.conversation import for_template
from fastqwen.server.dialects.schema import ChatMessage
from fastqwen.server.dialects.warnings import Warnings
from fastqwen.text.content import joined_or_parts
from fastqwen.text.formats import derive_formats
from fastqwen.text.load import load_text
from fastqwen.text.template import ChatTemplate
from fastqwen.weights.checkpoint import open_checkpoint

LOOP = "{% for message in messages %}{% for part in CONTENT %}[{{ part.text }}]{% endfor %}{% endfor %}"
SPELLINGS = {
    "message.content": LOOP,
    "message['content']": LOOP,
    "message.get('content')": LOOP,
    "message.content | list": LOOP,
    "message.content[0:]": LOOP,
    "told": LOOP.replace("{% for part", "{% set said = message.content %}{% set told = said %}{% for part"),
}
MACRO = (
    "{% macro show(told, deep) %}{% for part in told %}[{{ part.text }}]{% endfor %}{% endmacro %}"
    "{% for message in messages %}{{ show(GIVEN) }}{% endfor %}"
)
TEXTS = (
    "{% for message in messages %}{% for line in message.content.split('\\n') %}({{ line }}){% endfor %}{% endfor %}"
)
PARTS = joined_or_parts(["two", "", "parts"])
MESSAGES: list[dict[str, Any]] = [{"role": "user", "content": "one"}, {"role": "user", "content": PARTS}]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_template_that_walks_through_contents_gets_lists(spelling: str):
    template = ChatTemplate(SPELLINGS[spelling].replace("CONTENT", spelling), origin="test")
    assert template.render(MESSAGES) == "[one][two][parts]"


@pytest.mark.parametrize("given", ["message.content, 1", "told=message.content"])
def test_a_macro_that_walks_through_its_argument_gets_lists(given: str):
    assert ChatTemplate(MACRO.replace("GIVEN", given), origin="test").render(MESSAGES) == "[one][two][parts]"


def test_any_other_template_gets_texts():
    assert ChatTemplate(TEXTS, origin="test").render(MESSAGES) == "(one)(twoparts)"


def test_what_was_said_goes_before_what_was_found():
    template = ChatTemplate("{% for m in messages %}{{ m.content is string }} {% endfor %}", origin="test")
    assert template.render(MESSAGES) == "True True "
    assert template.with_content_format("openai").render(MESSAGES) == "False False "
    assert template.with_content_format("openai").with_source(TEXTS[:-1] + "}", origin="other") is not template
    walks = ChatTemplate(LOOP.replace("CONTENT", "message.content"), origin="test", content_format="string")
    assert walks.render(MESSAGES[:1]) == "[][][]"


def test_a_template_for_tools_has_a_form_of_its_own():
    template = ChatTemplate(TEXTS, origin="test", tool_source=LOOP.replace("CONTENT", "message.content"))
    assert template.render(MESSAGES) == "(one)(twoparts)"
    assert template.render(MESSAGES, tools=[{}]) == "[one][two][parts]"


def test_an_answer_is_continued_behind_the_last_part(demo_gguf: Path):
    llm = LLM(str(demo_gguf), max_model_len=256, max_num_seqs=1)
    parts = [{"type": "text", "text": "Once "}, {"type": "text", "text": "upon "}]
    prompts = {}
    for form in ("string", "openai"):
        told = dict(
            chat_template=LOOP.replace("CONTENT", "message.content")
            if form == "openai"
            else "{{ messages[0].content }}"
        )
        [output] = llm.chat(
            [{"role": "assistant", "content": parts}], SamplingParams(max_tokens=1), use_tqdm=False,
            continue_final_message=True, chat_template_content_format=form, **told,
        )  # fmt: skip
        prompts[form] = output.prompt
    assert prompts == {"string": "Once upon ", "openai": "[Once ][upon "}
    with pytest.raises(BadRequest, match="chat_template_content_format"):
        llm.chat([{"role": "user", "content": "x"}], chat_template_content_format="list")


def test_a_server_keeps_parts_apart_and_an_operator_says_the_form(demo_gguf: Path):
    model = open_checkpoint(demo_gguf, with_tensors=False).model
    given = [{"type": "text", "text": "two"}, {"type": "text", "text": ""}, {"type": "text", "text": "parts"}]
    for form, expected in (("auto", "[two][parts]"), ("openai", "[two][parts]"), ("string", "[][][][][][][][]")):
        source = LOOP.replace("CONTENT", "message.content")
        config = EngineConfig(model="demo", chat_template=source, chat_template_content_format=form)
        text = load_text(demo_gguf, model, config)
        messages = for_template([ChatMessage(role="user", content=given)], derive_formats(text.template), Warnings())
        assert text.tokenizer.decode(text.template.encode(text.tokenizer, messages)) == expected
