"""The list of workers as people read it."""

from __future__ import annotations

from fastqwen.cluster.wire import Member, Members

HEAD = ("MODEL", "WORKER", "STATE", "RUNNING", "WAITING", "KV CACHE", "WEIGHTS", "DEVICE", "HOST", "PID")


def table(found: Members) -> str:
    if not found.members:
        return "No worker is registered: fastqwen worker MODEL --controller HOST:PORT starts one"
    rows = [HEAD, *(_row(member) for member in found.members)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if found.num_drained:
        lines.append(f"{found.num_drained} of them finish what they have and end")
    return "\n".join(lines)


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
