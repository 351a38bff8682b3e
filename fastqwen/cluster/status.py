"""The list of workers as people read it."""

from __future__ import annotations

from fastqwen.cluster.wire import Member, Members

HEAD = ("MODEL", "WORKER", "STATE", "RUNNING", "WAITING", "KV CACHE", "WEIGHTS", "DEVICE", "HOST", "PID")
MACHINE_HEAD = ("HOST", "ADDRESS", "WORKERS", "RUNNING", "CPUS", "LOAD", "MEMORY FREE")


def table(found: Members) -> str:
    """The workers, and below them the machines that they are on."""
    if not found.members:
        return "No worker is registered: fastqwen worker MODEL --controller HOST:PORT starts one"
    lines = _columns([HEAD, *(_row(member) for member in found.members)])
    machines: dict[tuple[str, str], list[Member]] = {}
    for member in found.members:
        machines.setdefault((member.host, member.address.rpartition(":")[0]), []).append(member)
    lines += ["", *_columns([MACHINE_HEAD, *(_machine_row(*place, members) for place, members in machines.items())])]
    if found.num_drained:
        lines.append(f"{found.num_drained} of them finish what they have and end")
    return "\n".join(lines)


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _machine_row(host: str, address: str, members: list[Member]) -> tuple[str, ...]:
    one = members[0].machine
    memory = f"{one.memory_free_bytes / 1e9:.1f} of {one.memory_bytes / 1e9:.1f} GB"
    running = sum(member.num_running for member in members)
    return host, address, str(len(members)), str(running), str(one.num_cpus), f"{one.load:.1f}", memory


def _row(member: Member) -> tuple[str, ...]:
    cache = f"{member.kv_usage:.0%} of {member.kv_bytes / 1e9:.1f} GB" if member.kv_bytes else "-"
    return (
        ", ".join(member.names),
        member.address,
        "draining" if member.is_draining else member.state,
        str(member.num_running),
        str(member.num_waiting),
        cache,
        f"{member.weights_bytes / 1e9:.1f} GB" if member.weights_bytes else "-",
        member.device or "-",
        member.host,
        str(member.pid),
    )
