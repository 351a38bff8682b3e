"""A model's small files, packed on one machine and read on another."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from fastqwen.cluster.parcel import identity_of, pack, unpack
from fastqwen.config import EngineConfig
from fastqwen.errors import BadCheckpoint
from fastqwen.hub import find_checkpoint
from fastqwen.text.load import TextTools, load_text
from tests.engine.fakes import READY
from tests.reliability.mock_model import make_model

CHAT = [{"role": "user", "content": "Grüße, 你好"}]


def moved(config: EngineConfig, folder: Path) -> tuple[TextTools, TextTools]:
    """The text side where the checkpoint is, and where only the parcel came."""
    path, model = find_checkpoint(config)
    portable, files = pack(config, path)
    here, place = unpack(portable, files, folder)
    return load_text(path, model, config), load_text(place, model, here)


def assert_same(there: TextTools, here: TextTools) -> None:
    assert there.template is not None and here.template is not None
    ids = there.template.encode(there.tokenizer, CHAT, add_generation_prompt=True)
    assert here.template.encode(here.tokenizer, CHAT, add_generation_prompt=True) == ids
    assert here.stop_token_ids == there.stop_token_ids and here.default_sampling == there.default_sampling


def test_a_folder(tmp_path: Path):
    model = make_model(tmp_path)
    (model / "model.safetensors").write_bytes(b"weights")
    (model / "generation_config.json").write_text('{"temperature": 0.25}')
    config = EngineConfig(model=str(model))
    path, _ = find_checkpoint(config)
    assert sorted(pack(config, path)[1]) == [
        "model/config.json", "model/generation_config.json", "model/tokenizer.json", "model/tokenizer_config.json",
    ]  # fmt: skip
    there, here = moved(config, tmp_path / "front")
    assert_same(there, here)
    assert here.default_sampling == {"temperature": 0.25}


def test_a_gguf_file_goes_without_its_tensors(demo_gguf: Path, tmp_path: Path):
    config = EngineConfig(model=str(demo_gguf))
    assert sum(map(len, pack(config, demo_gguf)[1].values())) < demo_gguf.stat().st_size / 10
    assert_same(*moved(config, tmp_path))


def test_files_that_flags_name_come_along(tmp_path: Path):
    model, other = make_model(tmp_path), tmp_path / "other"
    other.mkdir()
    make_model(other)
    (other / "generation_config.json").write_text('{"top_k": 7}')
    template = tmp_path / "chat.txt"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    config = EngineConfig(
        model=str(model), tokenizer=str(other), generation_config=str(other), chat_template=str(template)
    )
    there, here = moved(config, tmp_path / "front")
    assert_same(there, here)
    assert here.default_sampling == {"top_k": 7}
    assert str(tmp_path) not in msgspec.json.encode(msgspec.structs.replace(pack(config, model)[0], model="")).decode()


@pytest.mark.parametrize(
    "name", ["../x.json", "model/../../x.json", "/etc/x.json", "model/.x", "model", "a/b.json", "model/a/b/c.json"]
)
def test_no_name_leaves_the_folder(name: str, tmp_path: Path):
    with pytest.raises(BadCheckpoint):
        unpack(EngineConfig(model="x"), {name: b"{}"}, tmp_path / "front")
    assert list(tmp_path.rglob("*.json")) == []


def test_what_changes_answers_changes_the_identity():
    config, files = EngineConfig(model="x"), {"model/config.json": b"{}"}
    first = identity_of(config, READY, files)
    assert identity_of(msgspec.structs.replace(config, model="y"), READY, dict(files)) == first
    other = msgspec.structs.replace(READY, plan=msgspec.structs.replace(READY.plan, dtype="bfloat16"))
    changed = [
        identity_of(config, other, files),
        identity_of(config, READY, {"model/config.json": b"{ }"}),
        identity_of(config, READY, {**files, "model/tokenizer.json": b""}),
        identity_of(msgspec.structs.replace(config, chat_template="{{ x }}"), READY, files),
    ]
    assert len({first, *changed}) == 5
