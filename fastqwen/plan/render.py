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
    "model", "device", "engine", "tight", "not_served_yet", "command", "dtype", "kv_cache_dtype", "num_gpus",
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
    ("states", "states of fixed size"),
    ("collectives", "buffers between GPUs"),
    ("rounding", "kept by the allocator"),
)


def as_json(answer: Answer) -> dict[str, Any]:
    """One object; ``_gib`` figures are of one GPU unless they say all."""
    need = answer.need
    return {
        **{name: getattr(answer, name) for name in PLAIN_FIELDS},
        "fits": answer.fits and not answer.not_served_yet and answer.hindrance is None,
        "would_fit": answer.fits,
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
        "fits_with_context": _context_that_fits(answer),
        "hindrance": answer.hindrance,
    }


def _context_that_fits(answer: Answer) -> int | None:
    """The question's own length if it fits, else as much as does if nobody asked for a length; None: none is known to."""
    if answer.fits:
        return answer.max_model_len
    return answer.with_context.max_model_len if answer.with_context is not None else None


def as_lines(answer: Answer) -> list[str]:
    """The answer around the table: first whether it fits, then how far and how fast, last what to type."""
    shown = shown_answer(answer)
    where = f"{answer.num_gpus} x {answer.device}" if answer.num_gpus > 1 else answer.device
    each = "each GPU" if answer.num_gpus > 1 else "it"
    lines = [
        f"{answer.model} on {where}: {_verdict(answer)}",
        f"{each} needs {gib(shown.need.total):.2f} GiB of the {gib(shown.budget_bytes):.2f} GiB that "
        f"{_allowed(shown)}, for {_sequences(shown)} in {shown.dtype}",
        f"KV cache: {_size(shown.need.kv_bytes_per_token)} a token{' on each GPU' if shown.num_gpus > 1 else ''}",
    ]
    if shown.largest_context:
        lines.append(f"largest context with {shown.concurrency} at once: {shown.largest_context:,} tokens")
    if shown.most_sequences:
        lines.append(f"most sequences of {shown.max_model_len:,} tokens at once: {shown.most_sequences}")
    if shown.speed_single is not None:
        lines.append(f"expected: {_speed_text(shown.speed_single)}")
    if shown.speed_concurrent is not None and shown.concurrency > 1:
        lines.append(f"expected: {_speed_text(shown.speed_concurrent)}")
    lines += [f"note: {notice}" for notice in dict.fromkeys((*shown.notices, *answer.notices))]
    return lines + ([answer.hindrance] if answer.hindrance is not None else _advice(answer))


def shown_answer(answer: Answer) -> Answer:
    """What people are shown figures of: with as much context as fits, where nobody asked for more."""
    return answer.with_context or answer


def _advice(answer: Answer) -> list[str]:
    """What to type comes last."""
    lines = []
    served = [change for change in answer.changes if change.command is not None]
    if answer.with_context is not None:
        own = f"its own {answer.max_model_len:,} tokens"
        whole = [change for change in served if change.max_model_len >= answer.max_model_len]
        lines += [f"for {own}, {change.what}: {change.command}" for change in whole]
    elif served:
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
    return "are" if len(words) > 1 or words[0].endswith(("weights", "numbers")) else "is"


def memory_table(answer: Answer) -> Table:
    from rich.table import Table

    table = Table("what one GPU holds" if not answer.on_cpu else "what the process holds", "GiB")
    table.columns[1].justify = "right"
    for name, title in TERMS:
        count = getattr(answer.need, name)
        if count:
            table.add_row(title, f"{count / GIB:.2f}")
    table.add_row("total", f"{answer.need.total / GIB:.2f}", style="bold")
    return table


LIST_HEADER = ("model", "memory used", "longest context", "tokens/s, one answer")


def list_lines(answers: Iterable[Answer]) -> list[str]:
    """Those that run today, each with the line that starts it; models of one size, type and length share a line, under the
    name of the first."""
    alike: dict[tuple[object, ...], list[Answer]] = {}
    for answer in answers:
        if answer.fits and not answer.not_served_yet:
            alike.setdefault((answer.need, answer.dtype, answer.largest_context), []).append(answer)
    rows = [LIST_HEADER, *(_list_row(group) for group in alike.values())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(LIST_HEADER))]
    commands = [None, *(group[0].command for group in alike.values())]
    lines = []
    for row, command in zip(rows, commands, strict=True):
        name, *figures = (text.ljust(width) for text, width in zip(row, widths, strict=True))
        lines.append("  ".join((name, *figures)).rstrip())
        lines += [f"    {command}"] if command is not None else []
    return lines


def _list_row(group: list[Answer]) -> tuple[str, str, str, str]:
    answer, speed = group[0], group[0].speed_single
    longest = answer.max_model_len if answer.tight else answer.largest_context
    return (
        answer.model.removeprefix("Qwen/") + (f" (+{len(group) - 1} alike)" if len(group) > 1 else ""),
        f"{answer.need.total / GIB:.1f} GiB",
        f"{longest:,} tokens" + (", tight" if answer.tight else ""),
        "not known" if speed is None else f"{_figure(speed.low)} to {_figure(speed.high)}",
    )


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
    if answer.hindrance is not None:
        return "does not run there" + (", though it would fit" if answer.fits else ", and would not fit")
    if answer.with_context is not None:
        length = answer.with_context.max_model_len
        return f"fits with a context of {length:,} tokens, not with its own {answer.max_model_len:,}"
    if answer.not_served_yet:
        missing = answer.not_served_yet
        verdict = "would fit" if answer.fits else "would not fit"
        return f"{verdict}; {' and '.join(missing)} {_is(missing)} not served yet"
    return ("fits, but tight" if answer.tight else "fits") if answer.fits else "does not fit"


def _allowed(answer: Answer) -> str:
    if answer.on_cpu:
        return "fastqwen would take of this memory"
    return f"--gpu-memory-utilization {answer.gpu_memory_utilization:g} allows"


def _sequences(answer: Answer) -> str:
    many = "sequence" if answer.concurrency == 1 else "sequences"
    return f"{answer.concurrency} {many} of {answer.max_model_len:,} tokens"


def _size(count: int) -> str:
    return f"{count / MIB:g} MiB" if count % MIB == 0 else f"{count / KIB:g} KiB"


def _speed_text(speed: Speed) -> str:
    many = "one sequence" if speed.batch == 1 else f"{speed.batch} sequences"
    return (
        f"{_figure(speed.low)} to {_figure(speed.high)} tokens per second with {many} at {speed.context_tokens:,} tokens "
        f"of context ({speed.basis})"
    )


def _figure(tokens_s: float) -> str:
    return f"{tokens_s:.0f}" if tokens_s >= 10 else f"{tokens_s:.1f}"


def _speed_json(speed: Speed | None) -> dict[str, Any] | None:
    if speed is None:
        return None
    return {**msgspec.structs.asdict(speed), "low": round(speed.low, 1), "high": round(speed.high, 1)}
