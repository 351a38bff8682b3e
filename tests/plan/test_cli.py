from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from fastqwen.cli.plan import plan
from fastqwen.errors import BadConfig, FastqwenError, ModelNotFound, Unsupported
from fastqwen.plan import generations
from tests.plan import published

app = typer.Typer(rich_markup_mode=None)
app.command()(plan)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def run_json(*arguments: str):
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.exception
    return json.loads(result.stdout)


def error_of(*arguments: str) -> FastqwenError:
    result = run(*arguments)
    assert isinstance(result.exception, FastqwenError), result.exception
    assert "\n" not in str(result.exception)
    return result.exception


def test_a_model_that_fits():
    found = run_json("Qwen-7B", "--gpu", "RTX 3090")
    assert found["fits"] and not found["tight"]
    assert found["max_model_len"] == 8192
    assert found["kv_bytes_per_token"] == 512 * 1024
    assert found["total_gib"] == pytest.approx(sum(found["per_gpu_gib"].values()), abs=0.06)
    assert found["largest_context"] >= 8192
    assert found["command"] == "fastqwen serve Qwen/Qwen-7B --max-model-len 8192"
    assert 0 < found["tokens_per_second"]["low"] < found["tokens_per_second"]["high"]


def test_a_model_that_does_not_fit_says_what_would():
    found = run_json("Qwen/Qwen2.5-14B-Instruct", "--gpu", "RTX 3090", "--max-model-len", "16K")
    assert not found["fits"]
    assert found["command"] == "fastqwen serve Qwen/Qwen2.5-14B-Instruct-GPTQ-Int4 --max-model-len 16384"
    assert found["tokens_per_second"] is None


def test_more_gpus_are_an_answer():
    found = run_json("Qwen3-235B-A22B", "--gpu", "H100 SXM", "--num-gpus", "4", "--max-model-len", "8K")
    assert not found["fits"]
    changes = {change["what"]: change for change in found["changes"]}
    whole = "fastqwen serve Qwen/Qwen3-235B-A22B --max-model-len 8192 --tensor-parallel-size 8"
    assert changes["8 GPUs"]["command"] == whole


def test_a_cache_of_8_bits_and_two_cards():
    found = run_json("Qwen3-8B", "--gpu", "RTX 3090", "--num-gpus", "2", "--kv-cache-dtype", "int8")
    assert found["fits"] and found["served"]
    assert found["command"] == "fastqwen serve Qwen/Qwen3-8B --tensor-parallel-size 2 --kv-cache-dtype int8"
    text = run("Qwen3-8B", "--gpu", "RTX 3090", "--tensor-parallel-size", "2").stdout
    assert "fastqwen serve Qwen/Qwen3-8B --tensor-parallel-size 2" in text


@pytest.mark.parametrize("model", ["Qwen2.5-7B-Instruct-AWQ", "Qwen3-8B-AWQ", "Qwen3-8B-FP8"])
def test_weights_of_four_and_eight_bits_are_served(model: str):
    found = run_json(model, "--gpu", "RTX 3090", "--max-model-len", "8K")
    assert found["served"] and found["fits"]
    assert found["command"] == f"fastqwen serve Qwen/{model} --max-model-len 8192"


def test_more_at_once_than_fit_wait_for_each_other():
    found = run_json("Qwen3-8B", "--gpu", "RTX 4090", "--max-model-len", "8K", "--concurrency", "64")
    assert not found["fits"]
    most = found["most_sequences"]
    assert 1 <= most < 64
    assert f"{most} at once, while the others wait" in [change["what"] for change in found["changes"]]
    assert found["command"] == "fastqwen serve Qwen/Qwen3-8B --max-model-len 8192"


def test_nothing_helps():
    result = run("Qwen3-Coder-480B-A35B-Instruct", "--gpu", "10GB")
    assert result.exit_code == 0
    assert "use a smaller model or a larger GPU" in result.stdout


@pytest.mark.parametrize("card", published.RUNS_ON)
def test_the_list_of_a_card(card: str):
    listed = {one["model"]: one for one in run_json("--gpu", card)}
    names = {
        "Qwen-1.8B": "Qwen/Qwen-1_8B",
        "Qwen-7B": "Qwen/Qwen-7B",
        "Qwen-7B-Int4": "Qwen/Qwen-7B-Chat-Int4",
        "Qwen-14B": "Qwen/Qwen-14B",
        "Qwen-14B-Int4": "Qwen/Qwen-14B-Chat-Int4",
        "Qwen-72B": "Qwen/Qwen-72B",
        "Qwen-72B-Int4": "Qwen/Qwen-72B-Chat-Int4",
    }
    assert [name for name, full in names.items() if listed[full]["fits"]] == published.RUNS_ON[card]
    assert {name for name, full in names.items() if listed[full]["tight"]} == {
        name for tight_card, name in published.TIGHT if tight_card == card
    }


def test_the_list_for_people():
    """What fits first, the newest first, models that answer before base models; a command below each."""
    result = run("--gpu", "12GB")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert "Qwen-14B-Chat-Int4" in result.stdout
    assert "not served yet: Qwen3.8-Flash-Next" in result.stdout
    header = next(index for index, line in enumerate(lines) if line.startswith("model  "))
    assert "longest context" in lines[header] and "tokens/s, one answer" in lines[header]
    rows = lines[header + 1 : lines.index("", header)]
    names, commands = [row.split()[0] for row in rows[::2]], rows[1::2]
    assert all(command.startswith("    fastqwen serve Qwen/") for command in commands)
    assert all(f"Qwen/{name}" in command.split() for name, command in zip(names, commands, strict=True))
    assert names[0].startswith("Qwen3.5-4B") and names.index("Qwen3-1.7B") < names.index("Qwen3-1.7B-Base")
    assert names.index("Qwen3-0.6B") < names.index("Qwen2.5-3B-Instruct") < names.index("Qwen-1_8B-Chat")
    tight = ["tight" in row for row in rows[::2]]
    assert tight == sorted(tight), "what is tight comes after what fits"


@pytest.mark.parametrize(
    ("card", "model"),
    [
        ("24", "Qwen/Qwen3.5-9B"),
        ("T4", "Qwen/Qwen3-14B-AWQ"),  # its kernels do not take the heads of Qwen3.5
        ("H200", "Qwen/Qwen3.8-27B"),
        ("6", "Qwen/Qwen3.5-2B"),
    ],
)
def test_one_recommendation(card: str, model: str):
    result = run("--best", "--gpu", card)
    assert result.exit_code == 0
    first, *_, last = result.stdout.splitlines()
    assert first.startswith("recommended for") and first.endswith(model)
    assert last.startswith(f"fastqwen serve {model}")
    assert run_json("--best", "--gpu", card)["command"] == last


def test_a_recommendation_of_this_machine_without_a_gpu_has_a_speed(monkeypatch: pytest.MonkeyPatch):
    found = run_json("--best", "--gpu", "cpu")
    assert found["command"].startswith("fastqwen serve Qwen/Qwen3.")
    speed = found["tokens_per_second"]
    assert 0 < speed["low"] < speed["high"] and "copies memory" in speed["basis"]


def test_a_model_whose_own_length_does_not_fit_fits_with_less():
    result = run("Qwen3-8B", "--gpu", "RTX 3090")
    first, *_, last = result.stdout.splitlines()
    assert first == "Qwen/Qwen3-8B on RTX 3090: fits with a context of 34,816 tokens, not with its own 40,960"
    assert last == "fastqwen serve Qwen/Qwen3-8B --max-model-len 34816"
    found = run_json("Qwen3-8B", "--gpu", "RTX 3090")
    assert (found["fits"], found["fits_with_context"], found["command"]) == (False, 34816, last)


@pytest.mark.parametrize("card", ["V100", "P40", "GTX 1080 Ti", "TITAN Xp", "M40"])
def test_a_card_that_todays_torch_leaves_out(card: str, monkeypatch: pytest.MonkeyPatch):
    """Neither speed nor command; what would make it run, and an exit status that a script sees."""
    monkeypatch.setattr("fastqwen.plan.gpus.torch_build", lambda: "cu130")
    for arguments in (["Qwen-1_8B-Chat", "--gpu", card], ["--gpu", card]):
        result = run(*arguments)
        assert result.exit_code == 1
        assert "has compute capability" in result.stdout
        assert ("whl/cu126" in result.stdout) == (card != "M40")
        assert "fastqwen serve" not in result.stdout and "tokens per second" not in result.stdout
    result = run("Qwen-1_8B-Chat", "--gpu", card, "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 1 and found["hindrance"]
    assert found["command"] is None and found["tokens_per_second"] is None
    assert isinstance(run("--best", "--gpu", card).exception, Unsupported)


def test_with_torchs_old_build_older_cards_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fastqwen.plan.gpus.torch_build", lambda: "cu126")
    for card, way in (("V100", "float16"), ("GTX 1080 Ti", "exact, and slow")):
        found = run_json("Qwen-1_8B-Chat", "--gpu", card)
        assert found["command"] == "fastqwen serve Qwen/Qwen-1_8B-Chat"
        assert found["dtype"] == "float16" and found["tokens_per_second"] is None
        assert any(way in notice and "was at hand" in notice for notice in found["notices"])
    assert run("--gpu", "M40").exit_code == 1


def test_a_speed_of_packed_weights_is_named_only_where_a_kernel_computes_on_them(monkeypatch: pytest.MonkeyPatch):
    def speed(name: str, card: str):
        return run_json(name, "--gpu", card, "--max-model-len", "2K")["tokens_per_second"]

    monkeypatch.setattr(generations, "FAST_PACKED", {})
    assert speed("Qwen-7B-Int4", "RTX 4090") is None
    assert speed("Qwen-7B", "RTX 4090") is not None
    monkeypatch.setattr(generations, "FAST_PACKED", {"gptq": (8, 0)})
    assert speed("Qwen-7B-Int4", "RTX 4090")["low"] > speed("Qwen-7B", "RTX 4090")["high"]
    assert speed("Qwen-7B-Int4", "T4") is None


def test_the_table_for_people():
    result = run("Qwen3-8B", "--gpu", "L4", "--concurrency", "4", "--max-model-len", "4K")
    assert result.exit_code == 0
    for words in (
        "Qwen/Qwen3-8B on L4: fits",
        "weights",
        "KV cache",
        "CUDA graphs",
        "tokens per second with 4 sequences",
    ):
        assert words in result.stdout


def test_a_card_without_bfloat16_is_planned_in_float16_and_told_so():
    for dtype in ("auto", "bfloat16"):
        found = run_json("Qwen2.5-7B-Instruct", "--gpu", "T4", "--dtype", dtype, "--max-model-len", "1K")
        assert found["dtype"] == "float16"
        assert any("bfloat16" in notice for notice in found["notices"])


def test_a_quantized_version_can_be_asked_for():
    found = run_json("Qwen2.5-7B-Instruct", "--gpu", "12GB", "--quantization", "int4", "--max-model-len", "8K")
    assert found["model"] == "Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4"
    assert found["fits"]


def test_a_version_that_nobody_has_published_is_planned_on_paper():
    found = run_json("Qwen3-8B", "--gpu", "12GB", "--quantization", "int4", "--max-model-len", "4K")
    assert found["would_fit"] and not found["fits"]
    assert found["not_served_yet"] == ["a version that nobody has published"]
    assert found["command"] == "fastqwen serve Qwen/Qwen3-8B-AWQ --max-model-len 4096"


def test_a_folder_needs_only_its_config(tmp_path: Path):
    from fastqwen.plan.catalog import catalog

    entry = catalog().find("Qwen/Qwen3-8B")
    assert entry is not None
    (tmp_path / "config.json").write_text(json.dumps(catalog().config_json(entry)))
    found = run_json(str(tmp_path), "--gpu", "RTX 4090", "--max-model-len", "8K")
    assert found["fits"]
    assert found["per_gpu_gib"] == run_json("Qwen3-8B", "--gpu", "RTX 4090", "--max-model-len", "8K")["per_gpu_gib"]


def test_a_hub_name_needs_only_its_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub

    from fastqwen.plan.catalog import catalog

    entry = catalog().find("Qwen/Qwen3-8B")
    assert entry is not None
    path = tmp_path / "config.json"
    path.write_text(json.dumps(catalog().config_json(entry)))
    asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *names, **_: asked.append(names) or str(path))
    assert run_json("someone/a-tuned-one", "--gpu", "RTX 4090", "--max-model-len", "8K")["fits"]
    assert asked == [("someone/a-tuned-one", "config.json")]


def test_offline_is_one_clear_line(tmp_path: Path):
    script = (
        "from fastqwen.cli.find_model import find_model\n"
        "from fastqwen.errors import ModelNotFound\n"
        "try: find_model('someone/unknown')\n"
        "except ModelNotFound as error: print(error)\n"
    )
    environment = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    root = Path(__file__).parents[2]
    out = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=root, check=True
    ).stdout
    assert out.count("\n") == 1
    assert "HF_HUB_OFFLINE" in out


def test_the_plot(tmp_path: Path):
    path = tmp_path / "memory.png"
    assert run("Qwen3-8B", "--gpu", "RTX 4090", "--plot", str(path)).exit_code == 0
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        (["Qwen-7B", "--gpu", "Voodoo"], BadConfig, "--gpu"),
        (["Qwen-7B", "--gpu", "24GB", "--max-model-len", "0"], BadConfig, "--max-model-len"),
        (["Qwen-7B", "--gpu", "24GB", "--max-model-len", "1m"], BadConfig, "at most 32768"),
        (["Qwen-7B", "--gpu", "24GB", "-tp", "65"], BadConfig, "--tensor-parallel-size is 65"),
        (["Qwen-7B", "--gpu", "24GB", "--num-gpus", "0"], BadConfig, "--num-gpus"),
        (["Qwen-7B", "--gpu", "24GB", "--concurrency", "0"], BadConfig, "--concurrency"),
        (["Qwen-7B", "--gpu", "24GB", "--dtype", "int3"], BadConfig, "--dtype"),
        (["Qwen-7B", "--gpu", "24GB", "--kv-cache-dtype", "int3"], BadConfig, "--kv-cache-dtype"),
        (["Qwen-7B", "--gpu", "24GB", "--quantization", "int3"], BadConfig, "--quantization"),
        (["Qwen-7B", "--gpu", "24GB", "--gpu-memory-utilization", "2"], BadConfig, "--gpu-memory-utilization"),
        (["Qwen-7B", "--gpu", "24GB", "--engine", "steam"], BadConfig, "--engine"),
        (["Qwen-7B", "--gpu", "24GB", "--plot", "memory.txt"], BadConfig, "--plot"),
        (["Qwen-7B", "--gpu", "24GB", "--plot", "no/such/folder/memory.png"], BadConfig, "--plot cannot write"),
        (["--gpu", "24GB", "--quantization", "int4"], BadConfig, "need a model"),
        (["Qwen-7B", "--best"], BadConfig, "--best"),
        (["Qwen-7B", "--gpu", "RX 7900 XTX"], BadConfig, "NVIDIA's GPUs only"),
        (["Qwen-9000B", "--gpu", "24GB"], ModelNotFound, "Qwen-9000B"),
        (["Qwen3.8-Flash-Next", "--gpu", "24GB"], Unsupported, "not served yet"),
    ],
)
def test_mistakes_are_named(arguments: list[str], kind: type[FastqwenError], words: str):
    error = error_of(*arguments)
    assert isinstance(error, kind)
    assert words in str(error)


def test_a_length_that_is_no_number_is_refused():
    result = run("Qwen-7B", "--gpu", "24GB", "--max-model-len", "long")
    assert result.exit_code == 2
    assert "'long' is not a whole number" in result.output


def test_lengths_as_people_write_them():
    assert run_json("Qwen-7B", "--gpu", "24GB", "--max-model-len", "4K")["max_model_len"] == 4096


def test_a_gguf_file_needs_only_its_header(demo_gguf: Path):
    found = run_json(str(demo_gguf), "--gpu", "8GB")
    assert found["fits"]
    assert found["command"] == f"fastqwen serve {demo_gguf}"


def test_an_answer_needs_nothing_heavy():
    """Half a second from the shell: what takes longer to import is not imported."""
    script = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "import typer\n"
        "from fastqwen.cli.plan import plan\n"
        "app = typer.Typer(); app.command()(plan)\n"
        "assert CliRunner().invoke(app, ['Qwen-7B', '--gpu', '24GB']).exit_code == 0\n"
        "assert CliRunner().invoke(app, ['--gpu', '24GB']).exit_code == 0\n"
        "heavy = {'torch', 'numpy', 'huggingface_hub', 'httpx', 'matplotlib', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], check=True)
