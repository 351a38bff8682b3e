"""Memory for states of fixed size: slots of running sequences, and copies for the prefix cache. Both live beside the KV
cache, out of the same room."""

from __future__ import annotations

import msgspec

from fastqwen.config import EngineConfig
from fastqwen.errors import DoesNotFit
from fastqwen.model_config import ModelConfig
from fastqwen.plan.facts import DTYPE_BYTES, GIB, DeviceFacts, EngineProfile

PART_OF_ROOM = 4  # a fourth for running sequences, as much for copies; the rest is for keys and values
MOST_SNAPSHOTS = 1024


class StateShare(msgspec.Struct, frozen=True, kw_only=True):
    max_num_seqs: int
    snapshots: int
    bytes: int  # of all slots, with the one that pads steps


def bytes_of_slot(model: ModelConfig, dtype: str, facts: DeviceFacts, *, num_gpus: int = 1) -> int:
    """Activations, and what is kept of them, are float32 on a CPU."""
    return model.local(num_gpus).state_bytes(DTYPE_BYTES["float32" if facts.kind == "cpu" else dtype])


def share_room(
    model: ModelConfig, config: EngineConfig, profile: EngineProfile, each: int, room_bytes: int
) -> StateShare:
    """``each``: bytes of a slot; ``room_bytes``: for states, keys and values together. Raises DoesNotFit for wishes
    that it does not hold."""
    if not each:
        return StateShare(max_num_seqs=config.max_num_seqs or profile.max_num_seqs, snapshots=0, bytes=0)
    most = max(1, room_bytes // PART_OF_ROOM // each)
    max_num_seqs = config.max_num_seqs or min(profile.max_num_seqs, most)
    snapshots = config.max_state_snapshots
    if snapshots is None or not config.enable_prefix_caching:
        snapshots = min(MOST_SNAPSHOTS, most) if config.enable_prefix_caching else 0
    found = StateShare(max_num_seqs=max_num_seqs, snapshots=snapshots, bytes=(max_num_seqs + 1 + snapshots) * each)
    if found.bytes >= room_bytes:
        raise DoesNotFit(
            f"states of {max_num_seqs} sequences and {snapshots} copies need {found.bytes / GIB:.2f} GiB, "
            f"{max(0, room_bytes) / GIB:.2f} GiB are free: use a smaller --max-num-seqs or --max-state-snapshots"
        )
    return found
