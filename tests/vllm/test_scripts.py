"""What vLLM's example scripts do, with one import line changed."""

from __future__ import annotations

import asyncio
import importlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fastqwen.errors import BadConfig, BadRequest
from fastqwen.outputs import Histogram
from fastqwen.server.config import ServerConfig
from fastqwen.vllm import (
    LLM,
    AsyncEngineArgs,
    AsyncLLM,
    BeamSearchParams,
    EngineArgs,
    LLMEngine,
    PoolingParams,
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
    TextPrompt,
    TokensPrompt,
)
from fastqwen.vllm.config import CompilationConfig, KVTransferConfig, PoolerConfig
from fastqwen.vllm.multimodal.utils import fetch_image
from fastqwen.vllm.utils.argparse_utils import FlexibleArgumentParser
from fastqwen.vllm_names import RENAMED, keywords
from tests.models.tiny import make, prompt

GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    place = tmp_path_factory.mktemp("tiny")
    make(place, "Qwen3Config", head_dim=16, num_hidden_layers=2)
    return LLM(str(place), dtype=torch.float32, skip_tokenizer_init=True, max_num_seqs=8, tensor_parallel_size=1)


@pytest.fixture(scope="module")
def demo(demo_gguf: Path) -> LLM:
    words = {"architectures": ["Qwen3ForSequenceClassification"], "classifier_from_token": ["no", "yes"]}
    return LLM(model=str(demo_gguf), dtype="float", max_model_len=1024, hf_overrides=words)


def test_the_modules_of_vllms_layout_hold_their_names():
    import fastqwen.vllm as vllm

    assert all(getattr(vllm, name) is not None for name in vllm.__all__)
    for module, name in (
        ("engine.arg_utils", "EngineArgs"), ("engine.async_llm_engine", "AsyncLLMEngine"), ("entrypoints.llm", "LLM"),
        ("inputs", "TokensPrompt"), ("outputs", "RequestOutput"), ("pooling_params", "PoolingParams"),
        ("sampling_params", "StructuredOutputsParams"), ("utils", "FlexibleArgumentParser"),
        ("v1.engine.async_llm", "AsyncLLM"), ("v1.engine.llm_engine", "LLMEngine"), ("exceptions", "VLLMValidationError"),
        ("config", "ReasoningConfig"), ("v1.metrics.reader", "Counter"),
        ("lora.request", "LoRARequest"), ("logprobs", "Logprob"), ("version", "__version__"),
        ("distributed", "cleanup_dist_env_and_memory"), ("config", "CompilationConfig"),
        ("multimodal.utils", "fetch_image"), ("platforms", "current_platform"), ("logger", "init_logger"),
        ("utils.network_utils", "get_open_port"), ("entrypoints.chat_utils", "load_chat_template"),
    ):  # fmt: skip
        assert hasattr(importlib.import_module(f"fastqwen.vllm.{module}"), name)
    with pytest.raises(AttributeError, match="from_vllm"):
        vllm.LoRARequest  # noqa: B018
    with pytest.raises(BadRequest, match="text only"):
        fetch_image("http://example.org/cat.png")


def test_keywords_are_ours_or_say_what_holds_or_are_refused():
    found = keywords(
        {
            "dtype": torch.bfloat16, "tensor_parallel_size": 1, "swap_space": 4, "quantization": None, "max_model_len": -1,
            "disable_log_stats": True, "enable_lora": False, "seed": 0, "served_model_name": "a", "load_format": "hf",
            "generation_config": "vllm", "distributed_executor_backend": "mp", "compilation_config": {}, "cpu_offload_gb": 0,
        }
    )  # fmt: skip
    assert found.ours == {
        "dtype": "bfloat16", "tensor_parallel_size": 1, "seed": 0, "served_model_name": ["a"], "load_format": "auto",
        "generation_config": "none",
    }  # fmt: skip
    pooler = keywords({"pooler_config": PoolerConfig(task="token_embed", pooling_type="LAST", dimensions=None)})
    assert pooler.ours == {"pooling_task": "token_embed"} and pooler.notices == []
    [notice] = keywords({"compilation_config": CompilationConfig(3)}).notices
    assert "compilation_config" in notice
    told = " ".join(found.notices)
    assert "swap_space" in told and "disable_log_stats" in told and "tensor" not in told
    for wrong, told in (
        ({"data_parallel_size": 2}, "one host"), ({"enable_lora": True}, "LoRA"), ({"cpu_offload_gb": 4}, "memory"),
        ({"nonsense": 1}, "nonsense"), ({"pooler_config": PoolerConfig(pooling_type="MEAN")}, "pooling"),
        ({"kv_transfer_config": KVTransferConfig(kv_connector="NixlConnector")}, "memory"),
    ):  # fmt: skip
        with pytest.raises(BadConfig, match=told):
            keywords(wrong)
    with pytest.raises(BadConfig, match="max_num_seqs"):
        LLM("demo", max_num_seqs="many")


def test_each_option_of_an_engine_is_a_keyword_that_may_be_left_unsaid():
    """``LLM(**vars(args))`` passes a default for each."""
    flags = (Path(__file__).parents[1] / "cli" / "vllm_flags.txt").read_text().split()
    names = [name.removeprefix("--").replace("-", "_") for name in flags if name.startswith("--")]
    of_servers = {name for name in ServerConfig.__struct_fields__ if name != "max_logprobs"} | {
        "config",
        "api_key",
        "no_access_log",
    }
    listed = {
        name: None for name in names if RENAMED.get(name.replace("_", "-"), name).replace("-", "_") not in of_servers
    }
    assert len(listed) > 250 and keywords({**listed, "max_logprobs": 20}).ours == {}


def test_arguments_of_an_example_reach_the_engine(tiny: LLM):
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    parser.set_defaults(model="demo")
    parser.add_argument("--max_tokens", type=int)
    args = parser.parse_args(
        ["--max_model_len", "2k", "-tp", "1", "--max-tokens", "5", "--enforce-eager", "--no-enable-prefix-caching"]
    )
    given = vars(EngineArgs.from_cli_args(args))
    assert given == {
        "model": "demo", "max_model_len": 2000, "tensor_parallel_size": 1, "enforce_eager": True,
        "enable_prefix_caching": False,
    }  # fmt: skip
    assert args.max_tokens == 5
    options = EngineArgs(tiny.config.model, dtype="float32", skip_tokenizer_init=True)
    assert LLM.from_engine_args(options).config.skip_tokenizer_init


def test_prompts_and_parameters_as_examples_write_them(demo: LLM):
    params = SamplingParams(temperature=0.0, max_tokens=4, spaces_between_special_tokens=True, logits_processors=None)
    prompts = [TextPrompt(prompt="One, two"), TokensPrompt(prompt_token_ids=demo.get_tokenizer().encode("One, two"))]
    first, second = demo.generate(prompts, params, use_tqdm=False, lora_request=None)
    assert first.outputs[0].text == second.outputs[0].text and first.outputs[0].finished()
    with pytest.raises(BadRequest, match="LoRA"):
        demo.generate("One", params, lora_request=object())
    with pytest.raises(BadRequest, match="merge one into the weights"):
        importlib.import_module("fastqwen.vllm.lora.request").LoRARequest("mine", 1, "/adapter")
    assert first.metrics is first.lora_request is first.encoder_prompt is first.outputs[0].lora_request is None
    with pytest.raises(BadRequest, match="text only"):
        demo.generate({"prompt": "One", "multi_modal_data": {"image": b""}}, params)
    with pytest.raises(BadRequest, match="no 'text'"):
        demo.generate({"text": "One"}, params)


@pytest.mark.parametrize(
    "wrong",
    [{"logits_processors": [print]}, {"best_of": 3}, {"logprob_token_ids": [3] * 129}, {"use_beam_search": True},
     {"structured_outputs": {"regex": "a", "choice": ["b"]}}, {"structured_outputs": {"nonsense": 1}},
     {"allowed_token_ids": []}, {"bad_words": [""]}, {"logprobs": -2}, {"truncate_prompt_tokens": 0}],
)  # fmt: skip
def test_what_would_change_the_answer_is_refused_at_once(wrong: dict[str, Any]):
    with pytest.raises(BadRequest):
        SamplingParams(**wrong)


def test_positions_are_vllms(demo: LLM):
    params = SamplingParams(1, 0.0, 0.0, 1.1, 0.0, None, 0.9, 20, 0.0, 7, ["x"], [5], True, 6, 2)
    assert (params.repetition_penalty, params.top_p, params.top_k, params.seed) == (1.1, 0.9, 20, 7)
    assert (params.stop, params.stop_token_ids, params.max_tokens, params.min_tokens) == (["x"], [5], 6, 2)
    beams = BeamSearchParams(2, 3, True, 0.0, 0.5)
    assert (beams.beam_width, beams.max_tokens, beams.ignore_eos, beams.length_penalty) == (2, 3, True, 0.5)
    [output] = demo.chat([{"role": "user", "content": "Hi"}], SamplingParams(max_tokens=2), False, None, 3, "{{ 1 }}")
    assert output.prompt == "1"


def test_who_wants_requests_in_their_order_gets_no_priorities(tiny: LLM):
    ordered = LLM(tiny.config.model, dtype="float32", skip_tokenizer_init=True, scheduling_policy="fcfs")
    assert ordered.generate(prompt(4), SamplingParams(max_tokens=1), priority=0)
    for call in (
        lambda: ordered.generate(prompt(4), SamplingParams(max_tokens=1), priority=1),
        lambda: ordered.embed(prompt(4), priority=-1),
        lambda: ordered.beam_search(prompt(4), BeamSearchParams(2, 2), priority=1),
    ):
        with pytest.raises(BadRequest, match="fcfs"):
            call()
    with pytest.raises(BadConfig, match="scheduling-policy"):
        LLM("demo", scheduling_policy="lifo")


def test_structured_outputs_of_either_class_or_a_dict(demo: LLM):
    for form in (StructuredOutputsParams(choice=["red", "blue"]), {"choice": ["red", "blue"], "json": None}):
        [output] = demo.chat(
            [{"role": "user", "content": [{"type": "text", "text": "Which "}, {"type": "text", "text": "colour?"}]}],
            SamplingParams(max_tokens=10, seed=1, structured_outputs=form),
        )
        assert output.outputs[0].text in ("red", "blue")
        assert "Which colour?" in output.prompt
    with pytest.raises(BadRequest, match="structural_tag"):
        StructuredOutputsParams(structural_tag="{}")


def test_chat_takes_a_template_and_continues_a_message(demo: LLM):
    params = SamplingParams(temperature=0, max_tokens=3)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hel"}]
    [output] = demo.chat(messages, params, add_generation_prompt=False, continue_final_message=True)
    assert output.prompt.endswith("Hel")
    [output] = demo.chat(messages[:1], params, chat_template="Q: {{ messages[0].content }} A:")
    assert output.prompt == "Q: Hi A:"
    with pytest.raises(BadRequest, match="chat_template"):
        demo.chat(messages[:1], params, chat_template="{% if %}")
    with pytest.raises(BadRequest, match="text only"):
        demo.chat([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], params)


def test_only_allowed_tokens_are_chosen_and_bad_words_never(tiny: LLM):
    ids = prompt(9)
    [free] = tiny.generate(ids, SamplingParams(max_tokens=8, **GREEDY))
    said = list(free.outputs[0].token_ids)
    allowed = [token for token in range(5, 40) if token not in said][:7]
    for sampled in ({"temperature": 0}, {"temperature": 5.0, "seed": 3}):
        params = SamplingParams(max_tokens=8, allowed_token_ids=allowed, logprobs=0, **{**GREEDY, **sampled})
        [bound] = tiny.generate(ids, params)
        assert set(bound.outputs[0].token_ids) <= set(allowed)
    pair = said[2:4]
    [without] = tiny.generate(ids, SamplingParams(max_tokens=8, bad_word_ids=[pair], **GREEDY))
    found = list(without.outputs[0].token_ids)
    assert found[:3] == said[:3] and found[3] != said[3]
    assert pair not in [found[at : at + 2] for at in range(len(found))]


def test_bad_words_are_found_with_and_without_a_space(demo: LLM):
    asked = "Count: one, two, three,"
    [free] = demo.generate(asked, SamplingParams(temperature=0, max_tokens=6))
    word = free.outputs[0].text.split()[0].strip(",.")
    [without] = demo.generate(asked, SamplingParams(temperature=0, max_tokens=6, bad_words=[word]))
    assert word not in without.outputs[0].text.replace(",", " ").split()


def test_all_log_probabilities_and_a_cut_prompt(tiny: LLM):
    ids = prompt(12)
    [output] = tiny.generate(ids, SamplingParams(max_tokens=1, logprobs=-1, truncate_prompt_tokens=5, **GREEDY))
    assert output.prompt_token_ids == ids[-5:]
    [listed] = output.outputs[0].logprobs
    assert len(listed) == tiny.model.vocab_size
    assert math.fsum(math.exp(one.logprob) for one in listed.values()) == pytest.approx(1, abs=1e-4)


def test_log_probabilities_of_named_tokens_are_those_among_all(tiny: LLM):
    ids, named = prompt(12), [7, 3, 90]
    [all_of_them] = tiny.generate(ids, SamplingParams(max_tokens=3, logprobs=-1, **GREEDY))
    for asked in ({}, {"logprobs": 2}):  # the likeliest give way to those that are named
        [output] = tiny.generate(ids, SamplingParams(max_tokens=3, logprob_token_ids=named, **asked, **GREEDY))
        answer = output.outputs[0]
        for token, told, listed in zip(answer.token_ids, answer.logprobs, all_of_them.outputs[0].logprobs, strict=True):
            assert list(told) == list(dict.fromkeys([token, *named]))
            for name, one in told.items():
                assert one.logprob == pytest.approx(listed[name].logprob, abs=1e-6) and one.rank == listed[name].rank
    with pytest.raises(BadRequest, match="logprob_token_ids"):
        tiny.generate(ids, SamplingParams(logprob_token_ids=[tiny.model.vocab_size]))


def test_beam_search_is_the_textbooks(tiny: LLM):
    ids, width, steps = prompt(7), 3, 4
    beams: list[tuple[list[int], float]] = [([], 0.0)]
    for _ in range(steps):  # all continuations of all beams, and the best of them
        told = tiny.generate([ids + said for said, _ in beams], SamplingParams(max_tokens=1, logprobs=-1, **GREEDY))
        grown = [
            ([*said, token], total + one.logprob)
            for (said, total), output in zip(beams, told, strict=True)
            for token, one in output.outputs[0].logprobs[0].items()
        ]
        beams = sorted(grown, key=lambda beam: -beam[1])[:width]
    [found] = tiny.beam_search(ids, BeamSearchParams(beam_width=width, max_tokens=steps, ignore_eos=True))
    assert [one.tokens[len(ids) :] for one in found.sequences] == [said for said, _ in beams]
    assert [one.cum_logprob for one in found.sequences] == pytest.approx([total for _, total in beams], abs=1e-4)


def test_beams_end_at_the_end_of_an_answer(demo: LLM):
    [found] = demo.beam_search(
        [TextPrompt(prompt="The capital of France is")], BeamSearchParams(beam_width=2, max_tokens=5)
    )
    assert len(found.sequences) == 2 and found.sequences[0].text.startswith("The capital of France is")
    assert found.sequences[0].cum_logprob > found.sequences[1].cum_logprob - 5
    with pytest.raises(BadRequest, match="beam_width"):
        BeamSearchParams(beam_width=0, max_tokens=5)


def test_a_rerankers_score_is_the_probability_of_yes(demo: LLM):
    [one, other] = demo.score("What is the capital of China?", ["Beijing.", "Gravity <|im_end|> pulls."])
    tokenizer = demo.get_tokenizer()
    yes, no = tokenizer.encode("yes"), tokenizer.encode("no")
    for output in (one, other):
        [told] = demo.generate(output.prompt_token_ids, SamplingParams(max_tokens=1, logprobs=-1, temperature=0))
        [listed] = told.outputs[0].logprobs
        weights = [math.exp(listed[ids[0]].logprob) for ids in (yes, no)]
        assert output.outputs.score == pytest.approx(weights[0] / sum(weights), rel=1e-4)
    text = tokenizer.decode(one.prompt_token_ids)
    assert text.endswith("<Document>: Beijing.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
    # What a document spells is text: the ends of turns are the template's own.
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert other.prompt_token_ids.count(end) == one.prompt_token_ids.count(end) == 2
    with pytest.raises(BadRequest, match="data_1"):
        demo.score(["a", "b"], ["c", "d", "e"])


def test_without_a_reranker_a_score_is_the_cosine(demo_gguf: Path):
    llm = LLM(str(demo_gguf), dtype="float32", max_model_len=512, runner="pooling")
    [same, other] = llm.score("A cat.", ["A cat.", "Stock markets fell."])
    assert same.outputs.score == pytest.approx(1, abs=1e-5) and other.outputs.score < 0.999
    [short] = llm.embed("A cat.", pooling_params=PoolingParams(dimensions=8))
    [encoded] = llm.encode("A cat.", PoolingParams(dimensions=8), pooling_task="embed")
    assert short.outputs.embedding == encoded.outputs.data.tolist() and len(short.outputs.embedding) == 8
    with pytest.raises(BadRequest, match="no classification head"):
        llm.encode("A cat.", pooling_task="classify")


def test_a_tokenizer_as_transformers_users_know_it(demo: LLM):
    tokenizer = demo.get_tokenizer()
    messages = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True) == tokenizer.encode(text)
    assert tokenizer("Hi there")["input_ids"] == tokenizer.encode("Hi there")
    assert tokenizer.decode(tokenizer.encode("Hi there"), skip_special_tokens=True) == "Hi there"
    assert tokenizer.eos_token_id in tokenizer.all_special_ids and len(tokenizer) == tokenizer.vocab_size
    with pytest.raises(BadRequest, match="return_tensors"):
        tokenizer("Hi", return_tensors="pt")


def test_the_prefix_cache_forgets_and_the_engine_sleeps(tiny: LLM):
    ids, params = prompt(100), SamplingParams(max_tokens=4, **GREEDY)
    [first] = tiny.generate(ids, params)
    [again] = tiny.generate(ids, params)
    assert again.num_cached_tokens > 0
    assert tiny.reset_prefix_cache()
    [fresh] = tiny.generate(ids, params)
    assert fresh.num_cached_tokens == 0
    [salted] = tiny.generate(TokensPrompt(prompt_token_ids=ids, cache_salt="mine"), params)
    assert salted.num_cached_tokens == 0
    for level in (0, 1, 2):
        tiny.sleep(level=level)
        assert tiny.is_sleeping() and tiny.get_metrics()
        with pytest.raises(BadRequest, match="wake_up"):
            tiny.generate(ids, params)
    assert tiny.wake_up(tags=["weights"]) and not tiny.is_sleeping()
    [awake] = tiny.generate(ids, params)
    assert awake.outputs[0].token_ids == first.outputs[0].token_ids and awake.num_cached_tokens == 0
    metrics = tiny.get_metrics()
    names = {one.name: one.value for one in metrics if not isinstance(one, Histogram)}
    [steps] = [one for one in metrics if isinstance(one, Histogram)]
    assert steps.count == steps.buckets["+Inf"] > 0 and steps.sum >= steps.count
    assert names["vllm:num_requests_running"] == 0 and "vllm:prefix_cache_hits" in names


def test_an_engine_that_its_caller_steps(tiny: LLM):
    ids = [prompt(9), prompt(20, seed=2)]
    params = SamplingParams(max_tokens=6, n=2, seed=5)
    expected = tiny.generate(ids, params, use_tqdm=False)
    engine = LLMEngine.from_engine_args(EngineArgs(tiny.config.model, dtype="float32", skip_tokenizer_init=True))
    engine.add_request("a", ids[0], params)
    found: dict[str, Any] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            found[output.request_id] = output
        if "b" not in found and engine.get_num_unfinished_requests() == 1:
            engine.add_request("b", ids[1], params)
            engine.add_request("gone", ids[1], SamplingParams(max_tokens=None, **GREEDY))
            engine.step()
            engine.abort_request("gone")
            found.setdefault("b", None)
    for name, wanted in zip("ab", expected, strict=True):
        assert found[name].finished
        assert [one.token_ids for one in found[name].outputs] == [one.token_ids for one in wanted.outputs]
    with pytest.raises(BadRequest, match="empty"):
        engine.add_request("c", [], params)
    assert not engine.has_unfinished_requests() and engine.step() == []
    engine.sleep(level=2)
    assert engine.is_sleeping() and engine.get_metrics() and engine.wake_up() and engine.reset_prefix_cache()
    engine.add_request("d", ids[1], SamplingParams(max_tokens=3, **GREEDY))
    while engine.has_unfinished_requests():
        [last] = engine.step() or [None]
    assert last.finished and last.num_cached_tokens == 0


def test_the_asynchronous_engine(tiny: LLM):
    ids = prompt(9)
    [expected] = tiny.generate(ids, SamplingParams(max_tokens=6, **GREEDY))

    async def tokens(engine: AsyncLLM, kind: RequestOutputKind, name: str) -> list[list[int]]:
        params = SamplingParams(max_tokens=6, output_kind=kind, **GREEDY)
        return [list(one.outputs[0].token_ids) async for one in engine.generate(ids, params, request_id=name)]

    async def run() -> None:
        options = AsyncEngineArgs(model=tiny.config.model, dtype="float32", skip_tokenizer_init=True)
        engine = AsyncLLM.from_engine_args(options)
        try:
            whole, pieces, last = await asyncio.gather(*(tokens(engine, kind, kind.name) for kind in RequestOutputKind))
            said = list(expected.outputs[0].token_ids)
            assert whole[-1] == [token for piece in pieces for token in piece] == said and last == [said]
            assert all(one == said[: len(one)] for one in whole)
            endless = engine.generate(ids, SamplingParams(max_tokens=None, **GREEDY), request_id="endless")
            await anext(endless)
            await engine.abort("endless")
            *_, end = [one async for one in endless]
            assert end.outputs[0].finish_reason == "abort"
            vectors = [one async for one in engine.encode(ids, PoolingParams(task="embed"), request_id="vector")]
            assert [one.request_id for one in vectors] == ["vector"]
            assert torch.equal(vectors[0].outputs.data, tiny.encode(ids, use_tqdm=False)[0].outputs.data)
            await engine.sleep(level=1)
            assert await engine.is_sleeping() and not engine.errored
            with pytest.raises(BadRequest, match="wake_up"):
                await anext(engine.encode(ids, PoolingParams(), request_id="asleep"))
            assert await engine.wake_up(tags=["kv_cache"]) and await engine.reset_prefix_cache()
            assert await tokens(engine, RequestOutputKind.FINAL_ONLY, "awake") == [said]
            await engine.check_health()
        finally:
            engine.shutdown()

    asyncio.run(run())


def test_prompts_that_wait_are_answered_as_those_that_do_not(demo: LLM):
    params = SamplingParams(temperature=0, max_tokens=4)
    chat = [{"role": "user", "content": "Hi"}]
    expected = [*demo.generate(["One, two", "Three"], params), *demo.chat(chat, params)]
    names = demo.enqueue(["One, two", "Three"], params)
    with pytest.raises(BadRequest, match="priorities"):
        demo.enqueue(["never", "queued"], params, priority=[])
    names += demo.enqueue_chat(chat, params, use_tqdm=False)
    found = demo.wait_for_completion(use_tqdm=False)
    assert [output.request_id for output in found] == names
    assert [output.outputs[0].text for output in found] == [output.outputs[0].text for output in expected]
    assert demo.wait_for_completion() == []


def test_mistakes_are_caught_by_vllms_names(demo: LLM):
    from fastqwen.vllm.exceptions import VLLMError, VLLMValidationError

    with pytest.raises(VLLMValidationError):
        demo.generate([""])
    with pytest.raises(VLLMError):
        LLM("demo", max_num_seqs=0)
