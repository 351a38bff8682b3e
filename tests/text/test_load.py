"""Defaults of sampling and stop tokens: what generation_config.json decides, and what turns it off."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from fastqwen import LLM, SamplingParams
from fastqwen.config import EngineConfig
from fastqwen.errors import BadCheckpoint, BadConfig, Unsupported
from fastqwen.hub import WANTED_FILES
from fastqwen.models import read_config
from fastqwen.plan import DeviceFacts, choose_dtype
from fastqwen.text.load import TextTools, load_text
from tests.models.tiny import make_qwen1

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
EOT, START, END = 253, 254, 255


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model of 256 tokens: 253 bytes and the three of ChatML."""
    make_qwen1(tmp_path)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())[: 256 - len(SPECIAL)]
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens(SPECIAL)
    inner.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write(folder: Path, **values: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps(values))


def load(folder: Path, **options: Any) -> TextTools:
    return load_text(folder, read_config(folder), EngineConfig(model=str(folder), **options))


def test_defaults_come_from_the_checkpoint_unless_the_request_says_otherwise(folder: Path):
    write(
        folder, temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05, eos_token_id=[END, EOT], bos_token_id=1
    )
    llm = LLM(str(folder))
    params = llm.get_default_sampling_params()
    assert (params.temperature, params.top_p, params.top_k, params.repetition_penalty) == (0.7, 0.8, 20, 1.05)
    greedy = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    texts = [llm.generate("ab", greedy, use_tqdm=False)[0].outputs[0].token_ids for _ in range(2)]
    assert texts[0] == texts[1], "the request's own parameters are used as they are"


def test_greedy_by_do_sample(folder: Path):
    write(folder, do_sample=False, temperature=0.7)
    assert load(folder).default_sampling["temperature"] == 0.0


def test_none_turns_defaults_off_but_not_stop_tokens(folder: Path):
    write(folder, temperature=0.7, eos_token_id=[END, EOT])
    text = load(folder, generation_config="none")
    assert text.default_sampling == {} and text.generation_config == {}
    assert text.stop_token_ids == [END, EOT]


def test_another_folder(folder: Path, tmp_path_factory: pytest.TempPathFactory):
    other = tmp_path_factory.mktemp("other")
    write(folder, temperature=0.7, eos_token_id=END)
    write(other, temperature=0.2)
    text = load(folder, generation_config=str(other))
    assert text.default_sampling == {"temperature": 0.2} and END in text.stop_token_ids
    write(other, eos_token_id=[START])
    added = load(folder, generation_config=str(other))
    assert [(stop.token_id, stop.origin) for stop in added.stops][:2] == [
        (START, f"{other / 'generation_config.json'}: eos_token_id"),
        (END, "generation_config.json: eos_token_id"),
    ]
    write(other, eos_token_id=[3])
    with pytest.raises(BadCheckpoint, match="token 3 ends an answer"):
        load(folder, generation_config=str(other))
    with pytest.raises(BadConfig, match="--generation-config"):
        load(folder, generation_config=str(other / "nowhere"))


def test_overrides_go_before_what_the_model_says(folder: Path):
    write(folder, do_sample=False, temperature=0.7, top_k=3)
    text = load(folder, override_generation_config={"temperature": 0.2, "max_new_tokens": 9, "eos_token_id": [END]})
    assert text.default_sampling == {"temperature": 0.2, "top_k": 3, "max_tokens": 9} and END in text.stop_token_ids
    assert load(folder, generation_config="none", override_generation_config={"top_p": 0.5}).default_sampling == {
        "top_p": 0.5
    }
    for wrong in ({"nonsense": 1}, {"temperature": "hot"}, {"top_p": 7}):
        with pytest.raises(BadConfig, match="--override-generation-config"):
            load(folder, override_generation_config=wrong)


def test_where_each_stop_comes_from(folder: Path):
    write(folder, eos_token_id=EOT)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|im_start|>"}}))
    assert [(stop.token_id, stop.origin) for stop in load(folder).stops] == [
        (EOT, "generation_config.json: eos_token_id"),
        (START, "tokenizer: eos_token"),
        (END, "built-in ChatML: ends an assistant's turn"),
    ]


def test_stops_without_a_tokenizer(folder: Path):
    """skip_tokenizer_init: the ids in generation_config.json and config.json still end an answer."""
    plain = LLM(str(folder), skip_tokenizer_init=True)
    greedy = SamplingParams(temperature=0.0, max_tokens=8)
    free = plain.generate([[1, 2, 3]], greedy, use_tqdm=False)[0].outputs[0].token_ids
    assert len(free) == 8
    write(folder, eos_token_id=[free[2], 10**6, "x"])
    llm = LLM(str(folder), skip_tokenizer_init=True)
    assert llm.facts.stop_token_ids == [free[2]]
    output = llm.generate([[1, 2, 3]], greedy, use_tqdm=False)[0].outputs[0]
    assert output.finish_reason == "stop" and output.token_ids == free[: free.index(free[2]) + 1]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 7}, "top_p is 7"),
        ({"top_k": True}, "top_k is 'True'"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
    ],
)
def test_values_that_cannot_be(folder: Path, values: dict[str, Any], words: str):
    write(folder, **values)
    with pytest.raises(BadCheckpoint, match=words) as caught:
        load(folder)
    assert str(folder / "generation_config.json") in str(caught.value)


OLD, NEW = (
    DeviceFacts(kind="cuda", name=name, total_bytes=2**34, free_bytes=2**34, compute_capability=capability)
    for name, capability in (("Tesla V100", (7, 0)), ("A100", (8, 0)))
)
CPU = DeviceFacts(kind="cpu", name="CPU", total_bytes=2**34, free_bytes=2**34)


def test_dtype_auto(folder: Path):
    config = json.loads((folder / "config.json").read_text())
    for torch_dtype, device, expected in (
        ("bfloat16", NEW, "bfloat16"), ("float16", NEW, "bfloat16"), ("float32", NEW, "bfloat16"),
        ("bfloat16", OLD, "float16"), ("bfloat16", CPU, "bfloat16"), ("float32", CPU, "float32"),
    ):  # fmt: skip
        (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": torch_dtype}))
        dtype, notices = choose_dtype("auto", read_config(folder), device)
        assert dtype == expected
        assert bool(notices) == (device is OLD), "float16 instead of bfloat16 is said"
        assert all("Tesla V100" in notice and "float16" in notice for notice in notices)


def test_bfloat16_on_an_old_gpu_is_refused(folder: Path):
    with pytest.raises(BadConfig, match=r"compute capability 7\.0.*--dtype float16"):
        choose_dtype("bfloat16", read_config(folder), OLD)
    for device, dtype in ((OLD, "float16"), (OLD, "float32"), (NEW, "bfloat16"), (CPU, "bfloat16")):
        assert choose_dtype(dtype, read_config(folder), device) == (dtype, [])


@pytest.mark.parametrize("optimized", [False, True])
def test_a_checkpoints_code_is_never_run(folder: Path, tmp_path_factory: pytest.TempPathFactory, optimized: bool):
    """auto_map in both configurations names files that would leave a mark."""
    marker = tmp_path_factory.mktemp("marks") / "ran"
    auto_map = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        values = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**values, "auto_map": auto_map, "trust_remote_code": True}))
    for name in (
        "evil.py",
        "modeling_qwen.py",
        "tokenization_qwen.py",
        "__init__.py",
        "conftest.py",
        "sitecustomize.py",
    ):
        (folder / name).write_text(f"open({str(marker)!r}, 'w').write('ran')\nclass Evil: pass\n")
    command = [sys.executable, *(["-O"] if optimized else []), "-m", "fastqwen.cli.main", "generate", str(folder), "ab"]
    done = subprocess.run(
        [*command, "--trust-remote-code", "--max-tokens", "3"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "never run" in done.stderr, "the flag is answered with a notice"
    assert not marker.exists()
    assert not any(Path(pattern).suffix == ".py" or pattern in ("*", "*.bin", "*.pt") for pattern in WANTED_FILES)


def test_the_same_in_this_process(folder: Path, caplog: pytest.LogCaptureFixture):
    LLM(str(folder), trust_remote_code=True)
    assert any("never run" in record.message for record in caplog.records)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused_with_the_reason(folder: Path, name: str):
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(Unsupported, match="can run code when loaded") as caught:
        LLM(str(folder))
    assert name in str(caught.value)


def configure(folder: Path, name: str, **changes: Any) -> None:
    path = folder / name
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**values, **changes}))


CHATML_OF = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}MARK\n{% endfor %}"
WRONG: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    # What was done to the folder; the files and words that the refusal must hold.
    "more tokens than rows": (
        lambda folder: configure(folder, "config.json", vocab_size=200),
        ["tokenizer.json has 256 tokens", "config.json has only 200 rows", "--tokenizer"],
    ),
    "config.json ends with an ordinary token": (
        lambda folder: configure(folder, "config.json", eos_token_id=7),
        ["config.json says that token 7 ends", "tokenizer.json that token is the text", "--tokenizer"],
    ),
    "config.json ends with a token of a larger vocabulary": (
        lambda folder: configure(folder, "config.json", vocab_size=300, eos_token_id=290),
        ["config.json says that token 290 ends", "tokenizer.json that token does not exist", "--tokenizer"],
    ),
    "generation_config.json ends with ordinary tokens": (
        lambda folder: write(folder, eos_token_id=[7, 8]),
        ["generation_config.json says that token 7", "tokenizer.json that token is the text", "--tokenizer"],
    ),
    "the end of a text is no token": (
        lambda folder: configure(folder, "tokenizer_config.json", eos_token="<|eot_id|>"),
        ["tokenizer_config.json says that '<|eot_id|>'", "tokenizer.json has no such token", "--tokenizer"],
    ),
    "the template's end of turn is no token": (
        lambda folder: configure(
            folder, "tokenizer_config.json", chat_template=CHATML_OF.replace("MARK", "<|im_fin|>")
        ),
        ["tokenizer_config.json ends an answer with <|im_fin|>", "tokenizer.json has no such token", "--chat-template"],
    ),
    "a ChatML template over a tokenizer without <|im_end|>": (
        lambda folder: (
            (folder / "chat_template.jinja").write_text(CHATML_OF.replace("MARK", "<|im_end|>")),
            (folder / "tokenizer.json").write_text(
                (folder / "tokenizer.json").read_text().replace("<|im_end|>", "<|eot_id|>")
            ),
        ),
        ["chat_template.jinja ends an answer with <|im_end|>", "tokenizer.json has no such token", "--tokenizer"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_tokenizer_that_does_not_belong_to_the_model(folder: Path, case: str):
    spoil, words = WRONG[case]
    load(folder)
    spoil(folder)
    with pytest.raises(BadCheckpoint) as caught:
        load(folder)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert load(folder, skip_tokenizer_init=True).tokenizer.token_bytes(3) == b"", "ids need no tokenizer"


@pytest.mark.parametrize("command", ["serve", "generate"])
def test_and_nothing_starts_with_it(folder: Path, command: str):
    write(folder, eos_token_id=7)
    more = ["--port", "0"] if command == "serve" else ["ab"]
    done = subprocess.run(
        [sys.executable, "-m", "fastqwen.cli.main", command, str(folder), *more],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode not in (0, -6, -9) and "Traceback" not in done.stderr
    assert f"{folder / 'generation_config.json'} says that token 7" in done.stderr
    assert str(folder / "tokenizer.json") in done.stderr


FITS: dict[str, Callable[[Path], None]] = {
    "a padded embedding": lambda folder: configure(folder, "config.json", vocab_size=384),
    "one end of several": lambda folder: write(folder, eos_token_id=[7, END, 10**6]),
    "ends that differ": lambda folder: (
        write(folder, eos_token_id=[END]),
        configure(folder, "config.json", eos_token_id=EOT),
        configure(folder, "tokenizer_config.json", eos_token="<|im_start|>"),
    ),
    "markers spelled out as text": lambda folder: configure(
        folder,
        "tokenizer_config.json",
        eos_token="<|endoftext|>",
        chat_template="{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|endoftext|>\n{% endfor %}",
    ),
    "a template that wants other messages": lambda folder: configure(
        folder, "tokenizer_config.json", chat_template="{{ raise_exception('no') }}<|im_fin|>"
    ),
    "no end at all": lambda folder: configure(folder, "config.json", eos_token_id=None),
}


@pytest.mark.parametrize("case", FITS)
def test_what_looks_odd_and_belongs_together(folder: Path, case: str):
    FITS[case](folder)
    assert load(folder).tokenizer.vocab_size == 256


def test_the_tokenizer_of_another_folder_is_named(folder: Path, tmp_path_factory: pytest.TempPathFactory):
    other = tmp_path_factory.mktemp("other")
    (other / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    write(folder, eos_token_id=END)
    assert load(folder, tokenizer=str(other)).stop_token_ids[0] == END
    configure(folder, "config.json", vocab_size=200)
    with pytest.raises(BadCheckpoint) as caught:
        load(folder, tokenizer=str(other))
    assert str(other / "tokenizer.json") in str(caught.value) and str(folder / "config.json") in str(caught.value)


def test_prompts_for_kinds_of_texts_come_from_the_makers_file(folder: Path):
    assert load(folder).task_prompts == {}
    file = folder / "config_sentence_transformers.json"
    file.write_text(
        json.dumps({"prompts": {"query": "Instruct: find it\nQuery:", "document": ""}, "similarity_fn_name": "cosine"})
    )
    assert load(folder).task_prompts == {"query": "Instruct: find it\nQuery:", "document": ""}
    file.write_text(json.dumps({"prompts": None}))
    assert load(folder).task_prompts == {}


@pytest.mark.parametrize(
    "prompts", [["query"], {"query": 1}, {"query": "x" * 10_000}, {str(i): "" for i in range(1000)}]
)
def test_prompts_that_are_no_texts_are_told(folder: Path, prompts: Any):
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
    with pytest.raises(BadCheckpoint, match=r"config_sentence_transformers\.json: prompts"):
        load(folder)
