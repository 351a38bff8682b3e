"""How running sequences, remembered conversations and their keys and values share what weights leave."""

from __future__ import annotations

import msgspec
import pytest

from fastqwen.cli.find_model import find_model
from fastqwen.config import EngineConfig
from fastqwen.errors import DoesNotFit
from fastqwen.model_config import ModelConfig
from fastqwen.plan import DeviceFacts, make_plan
from fastqwen.plan.catalog import catalog
from fastqwen.plan.facts import FASTQWEN_GPU, GIB
from fastqwen.plan.memory import kv_bytes_per_token
from fastqwen.plan.states import EXPECTED_TOKENS, MOST_SNAPSHOTS, StateShare, bytes_of_slot, share_room
from fastqwen.plan.weights import num_parameters

H100 = DeviceFacts(kind="cuda", name="H100", total_bytes=80 * GIB, free_bytes=79 * GIB, compute_capability=(9, 0))
HYBRIDS = [entry.name for entry in catalog().models if entry.shape.startswith(("qwen3.", "qwen3-next"))]
PLAIN = ["Qwen/Qwen3.5-0.8B", "Qwen/Qwen3.5-9B", "Qwen/Qwen3.5-35B-A3B", "Qwen/Qwen3.8-27B", "Qwen/Qwen3.5-397B-A17B"]


def published(name: str) -> ModelConfig:
    entry = catalog().find(name)
    assert entry is not None
    return catalog().model(entry)


def shared(model: ModelConfig, room_bytes: int, **wishes: object) -> tuple[StateShare, int, int]:
    """What is shared out, a slot's bytes, and the tokens whose keys and values the rest holds."""
    each, per_token = bytes_of_slot(model, "bfloat16", H100), kv_bytes_per_token(model, "bfloat16")
    config = EngineConfig(model="x", **wishes)  # type: ignore[arg-type]
    found = share_room(model, config, FASTQWEN_GPU, each, room_bytes, per_token=per_token, max_model_len=262144)
    assert found.bytes == (found.max_num_seqs + 1 + found.snapshots) * each < room_bytes
    return found, each, (room_bytes - found.bytes) // per_token


@pytest.mark.parametrize("room_gib", [4, 20, 60])
@pytest.mark.parametrize("name", PLAIN)
def test_all_that_run_and_all_that_are_remembered_have_their_tokens(name: str, room_gib: int):
    found, each, tokens = shared(published(name), room_gib * GIB)
    if found.max_num_seqs > 1:
        assert tokens >= found.max_num_seqs * EXPECTED_TOKENS
    if found.snapshots < MOST_SNAPSHOTS and found.max_num_seqs > 1:
        assert tokens >= (found.max_num_seqs + found.snapshots // 2) * EXPECTED_TOKENS
    assert found.snapshots >= 2 or found.bytes + each > room_gib * GIB / 2


def test_a_number_of_sequences_that_was_asked_for_is_kept_and_leaves_some_copies():
    model = published("Qwen/Qwen3.5-35B-A3B")
    found, each, _ = shared(model, 5 * GIB, max_num_seqs=64)
    assert found.max_num_seqs == 64 and found.snapshots == (5 * GIB - 65 * each) // 4 // each > 0


@pytest.mark.parametrize(("wishes", "snapshots"), [({"max_state_snapshots": 7}, 7), ({"max_state_snapshots": 0}, 0),
                                                   ({"enable_prefix_caching": False}, 0)])  # fmt: skip
def test_copies_that_were_asked_for(wishes: dict[str, object], snapshots: int):
    assert shared(published("Qwen/Qwen3.5-9B"), 20 * GIB, **wishes)[0].snapshots == snapshots


def test_more_states_than_there_is_room_for_are_refused_with_the_flags():
    with pytest.raises(DoesNotFit, match=r"--max-num-seqs or --max-state-snapshots"):
        shared(published("Qwen/Qwen3.5-9B"), 2 * GIB, max_num_seqs=256)


def test_a_shards_slot_holds_its_own_heads():
    """Two GPUs: half of the heads on each, so that nearly as many bytes are left for keys and values."""
    model = published("Qwen/Qwen3.5-9B")
    plans = [
        make_plan(
            model, EngineConfig(model="x", tensor_parallel_size=count, max_num_seqs=8, max_state_snapshots=8), H100
        )
        for count in (1, 2)
    ]
    assert plans[1].states_bytes * 2 == plans[0].states_bytes


def test_only_every_fourth_layer_has_keys_and_values():
    model = published("Qwen/Qwen3.5-9B")
    plain = msgspec.structs.replace(model, delta=None)
    assert 4 * kv_bytes_per_token(model, "bfloat16") == kv_bytes_per_token(plain, "bfloat16")


@pytest.mark.parametrize(
    ("name", "states_mib", "kv_kib"),
    [
        ("Qwen/Qwen3-Next-80B-A3B-Instruct", 73.7, 24), ("Qwen/Qwen3.5-0.8B", 18.6, 12), ("Qwen/Qwen3.5-2B", 18.6, 12),
        ("Qwen/Qwen3.5-4B", 49.1, 32), ("Qwen/Qwen3.5-9B", 49.1, 32), ("Qwen/Qwen3.8-27B", 146.8, 64),
        ("Qwen/Qwen3.6-35B-A3B", 61.4, 20), ("Qwen/Qwen3.5-122B-A10B", 146.5, 24), ("Qwen/Qwen3.5-397B-A17B", 183.2, 30),
        ("Qwen/Qwen3.8-2.4T-A95B", 560.1, 92),
    ],
)  # fmt: skip
def test_published_sizes(name: str, states_mib: float, kv_kib: float):
    """States with the 3 inputs that a convolution of 4 taps needs; the ring here has 4."""
    model = published(name)
    assert model.delta is not None
    ring = 2 * len(model.delta.layers) * model.delta.channels
    assert round((model.state_bytes(2) - ring) / 2**20, 1) == states_mib
    assert kv_bytes_per_token(model, "bfloat16") == kv_kib * 1024
    assert model.vocab_size == (151936 if "Next" in name else 248320) and model.max_position_embeddings == 262144


@pytest.mark.parametrize(("name", "file_bytes", "more"), [("Qwen/Qwen3.8-2.4T-A95B", 4892388705238, 0.012),
                                                          ("Qwen/Qwen3.8-27B", 55563006776, 0.04)])  # fmt: skip
def test_files_are_as_large_as_their_parameters_and_what_is_not_read(name: str, file_bytes: int, more: float):
    """A head that guesses ahead, and of the smaller one a vision tower."""
    ours = 2 * num_parameters(published(name))
    assert ours < file_bytes < (1 + more) * ours


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_known_name_is_planned_without_asking_anybody(name: str, monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("the hub was asked"))
    for spelled in (name, name.removeprefix("Qwen/"), name.lower()):
        assert find_model(spelled).name == name
