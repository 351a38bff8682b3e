"""Memory for states of fixed size: slots of running sequences, and copies for the prefix cache. Both live beside the KV
cache, out of the same room."""

from __future__ import annotations

import msgspec

from fastqwen.config import EngineConfig
from fastqwen.errors import DoesNotFit
from fastqwen.model_config import ModelConfig
from fastqwen.plan.facts import DTYPE_BYTES, GIB, DeviceFacts, EngineProfile

# What a sequence is expected to come to, prompt and answer together, where --max-model-len allows as much. Published slots are as
# dear as the keys and values of 1600 to 6300 tokens, so that the shares change little between half as many and twice.
EXPECTED_TOKENS = 4096
COPIES_EACH = 2  # of a conversation that the cache remembers: where it left others, and behind its newest answer
PART_RUNNING = 2  # running sequences get half of the room at most, and what is remembered the rest
LEAST_PART = (
    4  # of what running sequences' slots leave, a fourth is for copies at least: without any, nothing is ever found
)
MOST_SNAPSHOTS = 1024


class StateShare(msgspec.Struct, frozen=True, kw_only=True):
    max_num_seqs: int
    snapshots: int
    bytes: int  # of all slots, with the one that pads steps


def bytes_of_slot(model: ModelConfig, dtype: str, facts: DeviceFacts, *, num_gpus: int = 1) -> int:
    """Activations, and what is kept of them, are float32 on a CPU."""
    return model.local(num_gpus).state_bytes(DTYPE_BYTES["float32" if facts.kind == "cpu" else dtype])


def share_room(
    model: ModelConfig,
    config: EngineConfig,
    profile: EngineProfile,
    each: int,
    room_bytes: int,
    *,
    per_token: int,
    max_model_len: int,
) -> StateShare:
    """``each``: bytes of a slot, ``per_token``: of a token's keys and values; ``room_bytes``: for all of them together.

    A running sequence needs a slot and the keys and values of as many tokens as are expected of it, a remembered one its
    copies and the same. Raises DoesNotFit for wishes that the room does not hold.
    """
    if not each:
        return StateShare(max_num_seqs=config.max_num_seqs or profile.max_num_seqs, snapshots=0, bytes=0)
    tokens_bytes = min(EXPECTED_TOKENS, max_model_len) * per_token
    most = max(1, room_bytes // PART_RUNNING // (each + tokens_bytes))
    max_num_seqs = config.max_num_seqs or min(profile.max_num_seqs, most)
    snapshots = config.max_state_snapshots
    if snapshots is None or not config.enable_prefix_caching:
        left = room_bytes - (max_num_seqs + 1) * each
        remembered = (left - max_num_seqs * tokens_bytes) // (COPIES_EACH * each + tokens_bytes)
        snapshots = min(MOST_SNAPSHOTS, max(0, COPIES_EACH * remembered, left // LEAST_PART // each))
        snapshots = snapshots if config.enable_prefix_caching else 0
    found = StateShare(max_num_seqs=max_num_seqs, snapshots=snapshots, bytes=(max_num_seqs + 1 + snapshots) * each)
    if found.bytes >= room_bytes:
        raise DoesNotFit(
            f"states of {max_num_seqs} sequences and {snapshots} copies need {found.bytes / GIB:.2f} GiB, "
            f"{max(0, room_bytes) / GIB:.2f} GiB are free: use a smaller --max-num-seqs or --max-state-snapshots"
        )
    return found
