"""LLM: the names and shapes that vLLM's users know."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import pytest

import fastqwen
from fastqwen import LLM, SamplingParams
from fastqwen.errors import BadConfig, BadRequest, ModelNotFound
from tests.models.tiny import make, prompt


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tiny")
    make(place, "Qwen3Config", head_dim=16, num_hidden_layers=2)
    return place


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    """Token ids only, for everything that needs no text."""
    return LLM(str(folder), dtype="float32", skip_tokenizer_init=True, max_num_seqs=4)


@pytest.fixture(scope="module")
def demo(demo_gguf: Path) -> LLM:
    return LLM(str(demo_gguf), dtype="float32", max_model_len=1024)


def is_empty(llm: LLM) -> bool:
    llm.engine.core.step()  # idle: the audit looks for anything that was left behind
    return not llm.engine.has_work and llm.stats().kv_usage == 0


def test_public_names():
    assert set(fastqwen.__all__) >= {"LLM", "SamplingParams", "RequestOutput", "CompletionOutput", "Logprob"}
    assert all(getattr(fastqwen, name) is not None for name in fastqwen.__all__)
    with pytest.raises(AttributeError):
        fastqwen.NoSuchName  # noqa: B018


def test_the_shape_of_an_output(llm: LLM):
    ids = prompt(12)
    [output] = llm.generate({"prompt_token_ids": ids}, SamplingParams(temperature=0, max_tokens=5, logprobs=2))
    assert isinstance(output, fastqwen.RequestOutput)
    assert output.prompt_token_ids == ids
    assert output.prompt is None and output.prompt_logprobs is None and output.finished
    [answer] = output.outputs
    assert isinstance(answer, fastqwen.CompletionOutput)
    assert (answer.index, len(answer.token_ids), answer.finish_reason, answer.stop_reason) == (0, 5, "length", None)
    assert len(answer.logprobs) == 5
    for token_id, alternatives in zip(answer.token_ids, answer.logprobs, strict=True):
        assert next(iter(alternatives)) == token_id
        assert alternatives[token_id].rank == 1
        assert sorted(entry.rank for entry in alternatives.values()) == [1, 2]
    assert answer.cumulative_logprob == pytest.approx(
        sum(each[token].logprob for token, each in zip(answer.token_ids, answer.logprobs, strict=True))
    )


def test_every_way_to_write_a_prompt(llm: LLM):
    params = SamplingParams(temperature=0, max_tokens=4)
    ids = prompt(9)
    [expected] = llm.generate(ids, params)
    for written in ([ids], {"prompt_token_ids": ids}, [{"prompt_token_ids": ids, "prompt": "x"}], [tuple(ids)]):
        [found] = llm.generate(written, params)
        assert found.outputs[0].token_ids == expected.outputs[0].token_ids


def test_texts_dicts_and_ids_are_the_same_prompt(demo: LLM):
    params = SamplingParams(temperature=0, max_tokens=5)
    text = "The capital of France is"
    ids = demo.text.tokenizer.encode(text)
    outputs = demo.generate([text, {"prompt": text}, {"prompt_token_ids": ids}, ids], params, use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == [ids] * 4
    assert len({output.outputs[0].text for output in outputs}) == 1
    assert outputs[0].outputs[0].text == demo.text.tokenizer.decode(outputs[0].outputs[0].token_ids)
    assert outputs[0].prompt == text
    [single] = demo.generate(text, params)
    assert single.outputs[0].text == outputs[0].outputs[0].text


def test_chat(demo: LLM, golden: Path):
    import json

    chats = json.loads((golden / "smollm2" / "golden.json").read_text("utf-8"))["chats"]
    params = SamplingParams(temperature=0, max_tokens=100)
    outputs = demo.chat([chat["messages"] for chat in chats], params, use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == [chat["prompt_ids"] for chat in chats]
    assert [output.outputs[0].text for output in outputs] == [chat["answer"] for chat in chats]
    [one] = demo.chat(chats[0]["messages"], params)
    assert one.outputs[0].text == chats[0]["answer"]
    assert "".join(demo.stream_chat(chats[0]["messages"], params)) == chats[0]["answer"]
    assert is_empty(demo)


def test_leaving_a_stream_early_aborts_the_rest(demo: LLM):
    pieces = demo.stream_chat([{"role": "user", "content": "Tell me a story."}], SamplingParams(max_tokens=500))
    next(pieces)
    pieces.close()
    assert is_empty(demo)


def test_stop_strings(demo: LLM):
    [full] = demo.generate("One, two, three,", SamplingParams(temperature=0, max_tokens=12))
    word = full.outputs[0].text.split()[2]
    [cut] = demo.generate("One, two, three,", SamplingParams(temperature=0, max_tokens=12, stop=word))
    assert cut.outputs[0].text == full.outputs[0].text[: full.outputs[0].text.index(word)]
    assert (cut.outputs[0].finish_reason, cut.outputs[0].stop_reason) == ("stop", word)
    assert is_empty(demo)


def test_without_detokenizing(demo: LLM):
    [output] = demo.generate("One", SamplingParams(temperature=0, max_tokens=3, detokenize=False))
    assert output.outputs[0].text == "" and len(output.outputs[0].token_ids) == 3


def test_params_for_each_prompt(llm: LLM):
    outputs = llm.generate(
        [prompt(5), prompt(6)], [SamplingParams(max_tokens=2), SamplingParams(max_tokens=7)], use_tqdm=False
    )
    assert [len(output.outputs[0].token_ids) for output in outputs] == [2, 7]


def test_more_prompts_than_slots_come_back_in_order(llm: LLM):
    prompts = [prompt(length) for length in range(1, 20)]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=3), use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == prompts
    assert is_empty(llm)


def test_n(llm: LLM):
    [output] = llm.generate(prompt(8), SamplingParams(n=3, seed=5, max_tokens=10))
    assert [answer.index for answer in output.outputs] == [0, 1, 2]
    assert len({tuple(answer.token_ids) for answer in output.outputs}) == 3
    [again] = llm.generate(prompt(8), SamplingParams(n=3, seed=5, max_tokens=10))
    assert [answer.token_ids for answer in again.outputs] == [answer.token_ids for answer in output.outputs]


def test_prompt_logprobs(llm: LLM):
    ids = prompt(20)
    [output] = llm.generate(ids, SamplingParams(max_tokens=1, prompt_logprobs=3))
    assert len(output.prompt_logprobs) == len(ids)
    assert output.prompt_logprobs[0] is None
    for token_id, alternatives in zip(ids[1:], output.prompt_logprobs[1:], strict=True):
        best = max(entry.logprob for entry in alternatives.values())
        assert 3 <= len(alternatives) <= 4
        assert alternatives[token_id].logprob <= best <= 0
        assert (alternatives[token_id].rank == 1) == (alternatives[token_id].logprob == best)
    # What was the prompt's end becomes the answer: the same number from the other side.
    [shorter] = llm.generate(ids[:-1], SamplingParams(max_tokens=1, temperature=0, logprobs=20))
    said = shorter.outputs[0].logprobs[0].get(ids[-1])
    top = {one: entry.logprob for one, entry in output.prompt_logprobs[-1].items() if entry.rank <= 3}
    assert all(math.isclose(shorter.outputs[0].logprobs[0][one].logprob, value) for one, value in top.items())
    assert said is None or math.isclose(said.logprob, output.prompt_logprobs[-1][ids[-1]].logprob)


def test_a_seed_for_the_engine_makes_unseeded_requests_repeat(folder: Path):
    def run(seed: int | None) -> list[list[int]]:
        llm = LLM(str(folder), dtype="float32", skip_tokenizer_init=True, seed=seed)
        outputs = llm.generate([prompt(5), prompt(5)], SamplingParams(max_tokens=12), use_tqdm=False)
        return [output.outputs[0].token_ids for output in outputs]

    assert run(1) == run(1) != run(2)
    assert run(None) != run(None)
    first, second = run(1)
    assert first != second, "each request draws its own seed"


def test_the_bar_counts_prompts(llm: LLM, capsys: pytest.CaptureFixture[str]):
    llm.generate([prompt(3)] * 5, SamplingParams(max_tokens=2))
    assert "5/5" in capsys.readouterr().err
    llm.generate([prompt(3)] * 5, SamplingParams(max_tokens=2), use_tqdm=False)
    llm.generate(prompt(3), SamplingParams(max_tokens=2))
    assert capsys.readouterr().err == ""


def test_priority_runs_first(folder: Path):
    llm = LLM(str(folder), dtype="float32", skip_tokenizer_init=True, max_num_seqs=1)
    order: list[str] = []
    original = llm.engine.core.step

    def step() -> Any:
        deltas = original()
        order.extend(delta.request_id for delta in deltas if delta.finish_reason)
        return deltas

    llm.engine.core.step = step  # type: ignore[method-assign]
    outputs = llm.generate(
        [prompt(3), prompt(4), prompt(5)], SamplingParams(max_tokens=2), priority=[2, 1, 0], use_tqdm=False
    )
    assert order == [f"{output.request_id}-0" for output in reversed(outputs)]


def test_ctrl_c_leaves_an_empty_engine(llm: LLM):
    core = llm.engine.core
    original, steps = core.step, iter(range(5))

    def interrupted() -> Any:
        if next(steps, None) is None:
            core.step = original  # type: ignore[method-assign]
            raise KeyboardInterrupt
        return original()

    core.step = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        llm.generate([prompt(10)] * 9, SamplingParams(max_tokens=50), use_tqdm=False)
    assert is_empty(llm)
    assert len(llm.generate(prompt(4), SamplingParams(max_tokens=3))[0].outputs[0].token_ids) == 3


@pytest.mark.parametrize(
    ("prompts", "params", "field"),
    [
        ([[]], {}, "prompt"),
        ([[256]], {}, "prompt"),
        ([[-1]], {}, "prompt"),
        ([list(range(200)) * 3], {}, "prompt"),
        ("text without a tokenizer", {}, "prompt"),
        ([[1], []], {}, "prompt"),
        ([[1]], {"stop_token_ids": [256]}, "stop_token_ids"),
        ([[1]], {"logit_bias": {300: 1.0}}, "logit_bias"),
    ],
)
def test_a_bad_request_names_its_field_and_nothing_runs(llm: LLM, prompts: Any, params: dict[str, Any], field: str):
    with pytest.raises(BadRequest) as caught:
        llm.generate(prompts, SamplingParams(**params))
    assert caught.value.param == field
    assert is_empty(llm)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("temperature", float("nan")), ("temperature", float("inf")), ("top_p", 0.0),
        ("top_p", 1.1), ("top_k", -2), ("min_p", -0.1), ("n", 0), ("n", 129), ("max_tokens", 0), ("logprobs", -2),
        ("prompt_logprobs", -2), ("repetition_penalty", 0.0), ("presence_penalty", 2.5), ("frequency_penalty", -2.5),
        ("seed", 2**63), ("stop", [""]), ("stop", ["x"] * 17), ("min_tokens", 17), ("logit_bias", {1: float("nan")}),
    ],
)  # fmt: skip
def test_sampling_params_out_of_range(field: str, value: Any):
    with pytest.raises(BadRequest) as caught:
        SamplingParams(**{field: value})
    assert caught.value.param == field


def test_sampling_params_have_vllms_names():
    wanted = {
        "n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
        "logit_bias", "seed", "stop", "stop_token_ids", "ignore_eos", "min_tokens", "max_tokens", "logprobs",
        "prompt_logprobs", "include_stop_str_in_output", "skip_special_tokens", "detokenize",
    }  # fmt: skip
    assert set(inspect.signature(SamplingParams).parameters) >= wanted
    assert SamplingParams() == SamplingParams(temperature=1.0, top_p=1.0, top_k=0, max_tokens=16)
    assert SamplingParams(stop="x").stop == ["x"]


def test_mistakes_when_loading(folder: Path, tmp_path: Path):
    with pytest.raises(BadConfig, match="max_modellen"):
        LLM(str(folder), max_modellen=5)
    with pytest.raises(ModelNotFound, match=r"config\.json"):
        LLM(str(tmp_path))
    with pytest.raises(BadConfig, match="--max-model-len"):
        LLM(str(folder), max_model_len=100_000, skip_tokenizer_init=True)
    with pytest.raises(BadRequest, match="2 prompts, but 1"):
        LLM(str(folder), skip_tokenizer_init=True).generate([[1], [2]], [SamplingParams()])


def test_random_weights_need_no_weight_files(tmp_path: Path, folder: Path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    llm = LLM(str(tmp_path), load_format="dummy", skip_tokenizer_init=True)
    assert len(llm.generate(prompt(4), SamplingParams(max_tokens=3, ignore_eos=True))[0].outputs[0].token_ids) == 3
