"""An answer for people (a table), for programs (JSON) and for the eye (a plot)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from fastqwen.plan.advice import Answer, gib
from fastqwen.plan.device import budget_bytes
from fastqwen.plan.facts import GIB, KIB, MIB
from fastqwen.plan.question import Question, need_of, resolve
from fastqwen.plan.speed import Speed
from fastqwen.plot import save_plot

if TYPE_CHECKING:
    from rich.table import Table

PLOT_POINTS = 48
PLAIN_FIELDS = (
    "model", "device", "engine", "fits", "tight", "not_served_yet", "command", "dtype", "kv_cache_dtype", "num_gpus",
    "max_model_len", "concurrency", "gpu_memory_utilization", "largest_context", "most_sequences", "notices",
)  # fmt: skip

TERMS = (
    ("weights", "weights"),
    ("kv_cache", "KV cache"),
    ("activations", "activations of a step"),
    ("sampler", "logits and sampling"),
    ("workspace", "scratch of kernels and libraries"),
    ("state", "token ids, block tables"),
    ("graphs", "CUDA graphs"),
    ("runtime", "runtime: context, kernels, libraries"),
    ("collectives", "buffers between GPUs"),
    ("rounding", "kept by the allocator"),
)


def as_json(answer: Answer) -> dict[str, Any]:
    """One object; ``_gib`` figures are of one GPU unless they say all."""
    need = answer.need
    return {
        **{name: getattr(answer, name) for name in PLAIN_FIELDS},
        "served": not answer.not_served_yet,
        "kv_bytes_per_token": need.kv_bytes_per_token,
        "per_gpu_gib": {name: gib(getattr(need, name)) for name, _ in TERMS},
        "total_gib": gib(need.total),
        "total_all_gpus_gib": gib(need.total_all_gpus),
        "budget_gib": gib(answer.budget_bytes),
        "device_gib": gib(answer.device_bytes),
        "changes": [msgspec.structs.asdict(change) for change in answer.changes],
        "tokens_per_second": _speed_json(answer.speed_single),
        "tokens_per_second_at_concurrency": _speed_json(answer.speed_concurrent),
    }


def as_lines(answer: Answer) -> list[str]:
    """The answer around the table: first whether it fits, then how far and how fast, last what to type."""
    where = f"{answer.num_gpus} x {answer.device}" if answer.num_gpus > 1 else answer.device
    each = "each GPU" if answer.num_gpus > 1 else "it"
    lines = [
        f"{answer.model} on {where}: {_verdict(answer)}",
        f"{each} needs {gib(answer.need.total):.2f} GiB of the {gib(answer.budget_bytes):.2f} GiB that "
        f"{_allowed(answer)}, for {_sequences(answer)} in {answer.dtype}",
        f"KV cache: {_size(answer.need.kv_bytes_per_token)} a token{' on each GPU' if answer.num_gpus > 1 else ''}",
    ]
    if answer.largest_context:
        lines.append(f"largest context with {answer.concurrency} at once: {answer.largest_context} tokens")
    if answer.most_sequences:
        lines.append(f"most sequences of {answer.max_model_len} tokens at once: {answer.most_sequences}")
    if answer.speed_single is not None:
        lines.append(f"expected: {_speed_text(answer.speed_single)}")
    if answer.speed_concurrent is not None and answer.concurrency > 1:
        lines.append(f"expected: {_speed_text(answer.speed_concurrent)}")
    lines += [f"note: {notice}" for notice in answer.notices]
    return lines + _advice(answer)


def _advice(answer: Answer) -> list[str]:
    """What to type comes last."""
    lines = []
    served = [change for change in answer.changes if change.command is not None]
    if served:
        why = "only with" if answer.tight else "what runs today" if answer.not_served_yet else "cheapest change"
        lines.append(f"{why}: {served[0].what}")
        lines += [f"or {change.what}: {change.command}" for change in served[1:]]
    lines += [f"not served yet, but would fit: {change.what}" for change in answer.changes if change.command is None]
    if answer.command is not None:
        lines.append(answer.command)
    elif not answer.fits or answer.not_served_yet:
        lines.append("no change that the planner knows makes it run: use a smaller model or a larger GPU")
    return lines


def _is(words: tuple[str, ...]) -> str:
    """Weights are many."""
    return "are" if len(words) > 1 or words[0].endswith("weights") else "is"


def memory_table(answer: Answer) -> Table:
    from rich.table import Table

    table = Table("term", "GiB")
    table.columns[1].justify = "right"
    for name, title in TERMS:
        count = getattr(answer.need, name)
        if count:
            table.add_row(title, f"{count / GIB:.2f}")
    table.add_row("total", f"{answer.need.total / GIB:.2f}", style="bold")
    return table


def models_table(answers: Iterable[Answer]) -> Table:
    """Those that run today; models of one size, type and length share a line, under the name of the last."""
    from rich.table import Table

    table = Table("model", "GiB", "context", "tokens/s", "")
    table.columns[0].overflow = "fold"  # names give way, figures do not
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    table.columns[3].min_width = len("100-1000")
    alike: dict[tuple[object, ...], list[Answer]] = {}
    for answer in answers:
        if answer.fits and not answer.not_served_yet:
            alike.setdefault((answer.need, answer.dtype, answer.largest_context), []).append(answer)
    for group in alike.values():
        answer, speed = group[-1], group[-1].speed_single
        table.add_row(
            answer.model.removeprefix("Qwen/") + (f" (+{len(group) - 1})" if len(group) > 1 else ""),
            f"{answer.need.total / GIB:.1f}",
            str(answer.max_model_len if answer.tight else answer.largest_context),
            "" if speed is None else f"{speed.low:.0f}-{speed.high:.0f}",
            "tight" if answer.tight else "",
        )
    return table


def plot(question: Question, path: Path) -> None:
    """Memory of one GPU against context length, stacked, with the card's limit. ``path`` has passed check_plot."""
    from matplotlib.figure import Figure

    load, _, _ = resolve(question)
    most = max(question.model.default_max_len, load.max_model_len)
    lengths = sorted({max(1, most * step // PLOT_POINTS) for step in range(PLOT_POINTS + 1)})
    needs = [need_of(msgspec.structs.replace(question, max_model_len=length)) for length in lengths]
    figure = Figure(figsize=(8, 5))
    axes = figure.add_subplot()
    axes.stackplot(
        lengths,
        [[getattr(need, name) / GIB for need in needs] for name, _ in TERMS],
        labels=[title for _, title in TERMS],
    )
    axes.axhline(question.facts.total_bytes / GIB, color="black", label=f"{question.facts.name}")
    budget = budget_bytes(needs[-1], question.facts, question.gpu_memory_utilization)
    axes.axhline(budget / GIB, color="black", linestyle="--", label="what fastqwen may take of it")
    axes.axvline(load.max_model_len, color="grey", linestyle=":")
    axes.set(
        xlabel="context length in tokens",
        ylabel="GiB" if load.num_gpus == 1 else "GiB on each GPU",
        title=f"{question.name}, {question.concurrency} at once, {load.num_gpus} GPU{'s' * (load.num_gpus > 1)}",
        xlim=(0, most),
        ylim=(0, None),
    )
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    save_plot(figure, path, crop=True)


def _verdict(answer: Answer) -> str:
    verdict = ("fits, but tight" if answer.tight else "fits") if answer.fits else "does not fit"
    if answer.not_served_yet:
        missing = answer.not_served_yet
        return f"{verdict}{' on paper' if answer.fits else ''}; {' and '.join(missing)} {_is(missing)} not served yet"
    return verdict


def _allowed(answer: Answer) -> str:
    if answer.on_cpu:
        return "fastqwen would take of this memory"
    return f"--gpu-memory-utilization {answer.gpu_memory_utilization:g} allows"


def _sequences(answer: Answer) -> str:
    many = "sequence" if answer.concurrency == 1 else "sequences"
    return f"{answer.concurrency} {many} of {answer.max_model_len} tokens"


def _size(count: int) -> str:
    return f"{count / MIB:g} MiB" if count % MIB == 0 else f"{count / KIB:g} KiB"


def _speed_text(speed: Speed) -> str:
    many = "one sequence" if speed.batch == 1 else f"{speed.batch} sequences"
    return (
        f"{speed.low:.0f} to {speed.high:.0f} tokens per second with {many} at {speed.context_tokens} tokens of context"
    )


def _speed_json(speed: Speed | None) -> dict[str, Any] | None:
    if speed is None:
        return None
    return {**msgspec.structs.asdict(speed), "low": round(speed.low, 1), "high": round(speed.high, 1)}
