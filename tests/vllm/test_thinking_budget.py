"""thinking_token_budget: a script's answers are ended where a server's are."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from fastqwen.errors import BadConfig, BadRequest
from fastqwen.text.answer import THINK_END
from fastqwen.text.formats import derive_formats
from fastqwen.vllm import LLM, AsyncLLM, LLMEngine, SamplingParams
from fastqwen.vllm.config import ReasoningConfig
from tests.server.live import LiveServer

# A template that opens the thinking block, behind which the demo writes on and on.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}"
)
MESSAGES = [{"role": "user", "content": "Tell me a long story."}]
BUDGET = 7
BODY: dict[str, Any] = {"max_tokens": 40, "seed": 5, "ignore_eos": True, "thinking_token_budget": BUDGET}
END = "\n\nI have to answer now.</think>\n\n"


def params(**changes: Any) -> SamplingParams:
    return SamplingParams(**{**BODY, **changes})


@pytest.fixture(scope="module")
def demo(demo_gguf: Path) -> LLM:
    return LLM(str(demo_gguf), dtype="float32", max_model_len=1024, chat_template=THINKING)


def ends(llm: LLM) -> list[int]:
    return llm.text.tokenizer.encode(THINK_END)


def test_a_script_and_a_server_give_the_same_answers(demo: LLM, demo_gguf: Path, tmp_path: Path):
    template = tmp_path / "template.jinja"
    template.write_text(THINKING)
    flags = (
        "--dtype",
        "float32",
        "--max-model-len",
        "1024",
        "--chat-template",
        str(template),
        "--generation-config",
        "none",
    )
    with LiveServer(str(demo_gguf), *flags) as server:
        for temperature in (0.0, 0.9):
            [ours] = demo.chat(MESSAGES, params(temperature=temperature), use_tqdm=False)
            [plain] = demo.generate({"prompt_token_ids": ours.prompt_token_ids}, params(temperature=temperature))
            said = ours.outputs[0].token_ids
            assert said[BUDGET : BUDGET + len(ends(demo))] == ends(demo) and len(said) == 40
            assert plain.outputs[0].token_ids == said
            asked = {"temperature": temperature, "return_token_ids": True, **BODY}
            chat = server.http.post("/v1/chat/completions", json={"messages": MESSAGES, **asked}).json()
            written = server.http.post("/v1/completions", json={"prompt": ours.prompt_token_ids, **asked}).json()
            assert [one["choices"][0]["token_ids"] for one in (chat, written)] == [said, said]
            assert written["choices"][0]["text"] == ours.outputs[0].text
            assert chat["usage"]["completion_tokens_details"]["reasoning_tokens"] == BUDGET


def test_each_answer_has_a_budget_of_its_own(demo: LLM):
    free, three = demo.chat([MESSAGES] * 2, [params(thinking_token_budget=-1), params(thinking_token_budget=3, n=2)])
    assert THINK_END not in free.outputs[0].text
    for answer in three.outputs:
        assert answer.token_ids[3 : 3 + len(ends(demo))] == ends(demo) and len(answer.token_ids) == 40
    assert three.num_cached_tokens <= len(three.prompt_token_ids)


def test_log_probabilities_stand_beside_their_tokens(demo: LLM):
    [output] = demo.chat(MESSAGES, params(logprobs=1, prompt_logprobs=0))
    [answer] = output.outputs
    assert [next(iter(one)) for one in answer.logprobs] == answer.token_ids
    forced = answer.logprobs[BUDGET : BUDGET + len(ends(demo))]
    assert [next(iter(one.values())).logprob for one in forced] == [0.0] * len(forced)
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids), "told once, not again for what was said"


def test_no_thinking_at_all_is_not_begun(demo: LLM):
    [output] = demo.chat(MESSAGES, params(thinking_token_budget=0))
    assert output.prompt.endswith("<think>\n\n</think>\n\n") and THINK_END not in output.outputs[0].text


def test_max_tokens_counts_what_ended_the_thinking(demo: LLM):
    for num_more, text in ((len(ends(demo)), THINK_END), (1, demo.text.tokenizer.decode(ends(demo)[:1]))):
        [output] = demo.chat(MESSAGES, params(max_tokens=BUDGET + num_more))
        [answer] = output.outputs
        assert (answer.finish_reason, len(answer.token_ids)) == ("length", BUDGET + num_more)
        assert answer.text.endswith(text)


def test_a_stop_string_in_what_is_said_ends_the_answer(demo: LLM):
    [output] = demo.chat(MESSAGES, params(stop="</think"))
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", "</think")
    demo.engine.core.step()
    assert not demo.engine.has_work


def test_what_is_said_can_be_chosen(demo_gguf: Path):
    config = ReasoningConfig(reasoning_start_str="<think>", reasoning_end_str=END)
    llm = LLM(model=str(demo_gguf), dtype="float32", max_model_len=512, reasoning_config=config, chat_template=THINKING)
    [output] = llm.chat(MESSAGES, params())
    assert END in output.outputs[0].text


def test_the_other_engines(demo: LLM, demo_gguf: Path):
    [expected] = demo.chat(MESSAGES, params())
    prompt = {"prompt_token_ids": expected.prompt_token_ids}
    options: dict[str, Any] = {"dtype": "float32", "max_model_len": 1024, "chat_template": THINKING}
    stepped = LLMEngine(str(demo_gguf), **options)
    stepped.add_request("one", prompt, params())
    last = None
    while stepped.has_unfinished_requests():
        last = (stepped.step() or [last])[-1]
    assert last.outputs[0].token_ids == expected.outputs[0].token_ids

    async def ask() -> list[int]:
        engine = AsyncLLM(str(demo_gguf), **options)
        found = [output async for output in engine.generate(prompt, params(), "one")]
        engine.shutdown()
        return found[-1].outputs[0].token_ids

    assert asyncio.run(ask()) == expected.outputs[0].token_ids


@pytest.mark.parametrize("value", [-2, True, 1.5])
def test_a_budget_is_a_whole_number(value: object):
    with pytest.raises(BadRequest, match="thinking_token_budget"):
        SamplingParams(thinking_token_budget=value)
    with pytest.raises(BadRequest, match="detokenize"):
        SamplingParams(thinking_token_budget=3, detokenize=False)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"reasoning_start_str": "<reason>"}, "begin with <think>"),
        ({"reasoning_end_str": "Enough."}, "must end with </think>"),
        ({"reasoning_end_str": "</think></think>"}, "must end with </think>"),
        ({"reasoning_end_str": 3}, "must be a text"),
        ({"start": "<think>"}, "has no 'start'"),
    ],
)
def test_a_reasoning_config_that_cannot_hold(config: dict[str, Any], problem: str):
    with pytest.raises(BadConfig, match=problem):
        derive_formats(None, reasoning_config=config)


def test_a_reasoning_config_names_a_parser():
    assert derive_formats(None, reasoning_config={"reasoning_parser": "qwen3"}).reasoning
    assert not derive_formats(None, reasoning_config={"reasoning_parser": "", "reasoning_end_str": ""}).reasoning
