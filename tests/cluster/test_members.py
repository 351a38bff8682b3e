"""What the controller remembers, with a clock in the test's hand."""

from __future__ import annotations

from fastqwen.cluster.machine import Machine
from fastqwen.cluster.members import Registry
from fastqwen.cluster.status import table
from fastqwen.cluster.wire import Member, Members


def member(key: str, name: str = "Qwen", **more) -> Member:
    return Member(key=key, address=f"{key}:21002", names=[name], kind="engine", state="ready", **more)


def test_a_silent_worker_is_forgotten():
    registry = Registry(lost_after_s=3.0)
    assert registry.beat(member("a"), 0.0) and registry.beat(member("b"), 0.0)
    assert not registry.beat(member("a"), 2.0)
    assert registry.lost(2.9) == []
    assert [one.key for one in registry.lost(3.1)] == ["b"]
    assert [one.key for one in registry.listed(4.0)[0]] == ["a"]
    assert registry.listed(4.0)[1] == [2.0]
    assert registry.beat(member("b"), 5.0), "it is new again when it comes back"


def test_a_worker_that_says_goodbye_is_gone_at_once():
    registry = Registry()
    registry.beat(member("a"), 0.0)
    gone = registry.bye("a")
    assert gone is not None and gone.key == "a"
    assert registry.bye("a") is None and registry.listed(0.0) == ([], [])


def test_drained_by_key_address_or_name_until_they_end():
    registry = Registry()
    for key, name in (("a", "Qwen"), ("b", "Qwen"), ("c", "Other")):
        registry.beat(member(key, name), 0.0)
    assert [one.key for one in registry.drain("a:21002")] == ["a"]
    assert [one.key for one in registry.drain("c")] == ["c"]
    assert registry.drain("nobody") == []
    assert [registry.is_drained(key) for key in "abc"] == [True, False, True]
    assert [one.key for one in registry.drain("Qwen")] == ["a", "b"]
    registry.bye("a")
    registry.beat(member("a"), 1.0)
    assert not registry.is_drained("a"), "another process came under its key's place"


def test_status_shows_load_and_memory():
    machine = Machine(num_cpus=8, load=2.5, memory_bytes=64 * 10**9, memory_free_bytes=20 * 10**9)
    busy = member(
        "a", machine=machine, num_running=3, num_waiting=12, kv_usage=0.25, kv_bytes=4 * 10**9, weights_bytes=15 * 10**9
    )
    lines = table(Members([busy, member("b", is_draining=True)], [0.1, 0.2], 0.0, 1)).splitlines()
    assert lines[1].split()[:5] == ["Qwen", "a:21002", "ready", "3", "12"]
    assert "25% of 4.0 GB" in lines[1] and "15.0 GB" in lines[1]
    assert "draining" in lines[2]
    assert lines[5].split() == ["a", "1", "3", "8", "2.5", "20.0", "of", "64.0", "GB"]
    assert lines[7] == "1 of them finish what they have and end"
    assert "fastqwen worker" in table(Members([], [], 0.0))
