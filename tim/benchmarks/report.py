"""The suite's records as tables and as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tim.benchmarks.isolation import Record
from tim.files import replacing, write_text

# A column's heading, names of its values in records, what they are multiplied by (None for words), and their format.
Column: TypeAlias = tuple[str, str | tuple[str, ...], float | None, str]
TABLES: dict[str, tuple[str, list[Column]]] = {  # title and columns, by the group of cases
    "machine": (
        "Machine",
        [("", "device", None, ""), ("torch", "torch", None, ""), ("date", "date", None, ""),
         ("bfloat16, TFLOP/s", "bfloat16_tflops", 1, ".3g"), ("float32 or TF32, TFLOP/s", "float32_tflops", 1, ".3g"),
         ("copy, GB/s", "copy_gb_per_second", 1, ".0f")],
    ),
    "training": (
        "Training step",
        [("ms", "step_seconds", 1e3, ".1f"), ("img/s", "images_per_second", 1, ".0f"),
         ("of the matmul rate", "matmul_share", 1, ".1%"), ("kernels", "kernels", 1, "d"),
         ("peak GiB", "peak_memory_gib", 1, ".1f"), ("warm-up s", "warmup_seconds", 1, ".1f")],
    ),
    "waiting": ("Steps under `torch.cuda.set_sync_debug_mode(\"error\")`", [("waits for the GPU", "waits", 1, "d")]),
    "sampling": (
        "Sampling, an image",
        [("text ms", "text_ms", 1, ".2f"), ("network ms", "network_ms", 1, ".2f"), ("decode ms", "decode_ms", 1, ".2f"),
         ("shares", ("text_share", "network_share", "decode_share"), 1, ".0%"), ("write ms a thread", "write_ms", 1, ".1f"),
         ("img/s", "images_per_second", 1, ".2f"), ("loop beside network", "sampler_overhead", 1, ".1%"),
         ("peak GiB", "peak_memory_gib", 1, ".1f"), ("warm-up s", "warmup_seconds", 1, ".1f")],
    ),
    "attention": (
        "Attention's tangent alone, bfloat16",
        [("batch", "batch_size", 1, "d"), ("ms", "step_seconds", 1e3, ".3f"), ("peak GiB", "peak_memory_gib", 1, ".2f"),
         ("relative error", "relative_error", 1, ".2e")],
    ),
    "precision": ("dF/dt under bfloat16 autocast against float64", [("relative error", "relative_error", 1, ".2%")]),
    "adm": ("ADM features", [("img/s", "images_per_second", 1, ".0f"), ("network's share", "network_share", 1, ".0%")]),
}  # fmt: skip


def cells(record: Record) -> list[str]:
    """Name and values of a record, or its error."""
    if "error" in record:
        return [record["name"], record["error"]]
    _, columns = TABLES[record["group"]]
    return [record["name"], *(_cell(record, key, scale, form) for _, key, scale, form in columns)]


def _cell(record: Record, key: str | tuple[str, ...], scale: float | None, form: str) -> str:
    keys = key if isinstance(key, tuple) else (key,)
    values = [record.get(k) for k in keys]
    return " / ".join("" if v is None else str(v) if scale is None else format(v * scale, form) for v in values)


def markdown(records: Sequence[Record]) -> str:
    """All tables; what failed or did not fit has its line too."""
    parts = []
    for group, (title, columns) in TABLES.items():
        rows = [record for record in records if record["group"] == group]
        if not rows:
            continue
        lines = [["", *(heading for heading, *_ in columns)], ["---"] * (len(columns) + 1), *map(cells, rows)]
        parts.append(f"## {title}\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts) + "\n"


def write_tables(records: Sequence[Record], out: Path) -> None:
    """results.md in a folder."""
    write_text(out / "results.md", markdown(records))


def write_plot(records: Sequence[Record], out: Path) -> None:
    """results.png in a folder."""
    with replacing(out / "results.png") as partial:
        plot(records).savefig(partial, format="png", dpi=120)


def plot(records: Sequence[Record]) -> Figure:
    """Training, sampling and attention beside each other, those of them that were measured."""
    measured = [record for record in records if "error" not in record]
    panels = {"training": (_plot_training, 4), "sampling": (_plot_sampling, 4), "attention": (_plot_attention, 3)}
    rows = {group: [r for r in measured if r["group"] == group] for group in panels}
    shown = [group for group in panels if rows[group]]
    widths = [panels[group][1] for group in shown]
    height = 1.5 + 0.3 * max(8, len(rows["training"]), len(rows["sampling"]))
    figure = Figure(figsize=(1.6 * (sum(widths) or 4), height), layout="constrained")
    figure.suptitle(next((f"{r['device']}, torch {r['torch']}" for r in measured if r["group"] == "machine"), ""))
    if shown:
        axes = figure.subplots(1, len(shown), width_ratios=widths, squeeze=False)[0]
        for axis, group in zip(axes, shown, strict=True):
            panels[group][0](axis, rows[group])
    return figure


def _plot_training(axes: Axes, rows: Sequence[Record]) -> None:
    names, shares = [r["name"] for r in rows], [100 * r["matmul_share"] for r in rows]
    colors = ["C1" if r["compiled"] else "C0" for r in rows]
    bars = axes.barh(names, shares, color=colors)
    axes.bar_label(bars, [f" {1e3 * r['step_seconds']:.0f} ms" for r in rows], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set(title="Training step (orange: compiled)", xlabel="% of the measured bfloat16 matmul rate")
    axes.tick_params(axis="y", labelsize=8)


def _plot_sampling(axes: Axes, rows: Sequence[Record]) -> None:
    names, left = [r["name"] for r in rows], [0.0] * len(rows)
    for phase in ("text", "network", "decode"):
        shares = [100 * r[f"{phase}_share"] for r in rows]
        axes.barh(names, shares, left=left, label=phase)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    for k, r in enumerate(rows):
        axes.text(101, k, f"{1e3 / r['images_per_second']:.0f} ms", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set(title="Sampling, an image", xlabel="% of the time", xlim=(0, 115))
    axes.tick_params(axis="y", labelsize=8)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def _plot_attention(axes: Axes, rows: Sequence[Record]) -> None:
    for form in dict.fromkeys(r["form"] for r in rows):
        points = sorted((r["tokens"], 1e3 * r["step_seconds"]) for r in rows if r["form"] == form)
        axes.plot(*zip(*points, strict=True), marker="o", label=form)
    axes.set(title="Attention's tangent alone", xlabel="tokens", ylabel="ms", xscale="log", yscale="log")
    tokens = sorted({r["tokens"] for r in rows})
    axes.set_xticks(tokens, map(str, tokens))
    axes.minorticks_off()
    axes.legend(fontsize=8)
