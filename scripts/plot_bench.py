#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""plot_bench.py CSV OUT [MACHINE]: draws what `ep bench --csv` printed, a panel for each case.

OUT ends in .png, .svg or .pdf. MACHINE, in words, is for the title of host cases; GPUs name
themselves. A bar is the median of an operation, the line on it reaches to the 99th percentile, the
mark is the limit: the time that memcpy (host) or the link (GPUs), as measured in the same run,
needs for its bytes.
"""
import csv
import sys
from itertools import groupby

try:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
except ImportError:
    sys.exit("plot_bench.py: matplotlib is missing: build/venv/bin/pip install matplotlib, "
             "and run this with build/venv/bin/python")

SHAPE = ("mode", "routing", "ranks", "tokens", "hidden", "topk", "experts", "workers", "seed")
COLORS = {"bf16": "#185a9a", "fp8": "#3f8f5f", "f32": "#7a4fa3", "": "#8a8f98"}
LIMIT = "#e07b00"


def case_of(row):
    """What tells one case from another; rows of a case follow each other."""
    return tuple(row[k] for k in SHAPE) + tuple(row.get(k, "") for k in ("devices", "output"))


def heading(row, machine):
    r = dict(row, tokens=f"{int(row['tokens']):,}")
    where = f"on {r.get('devices') or machine}"
    rows = f", {r['dtype']}, {r['output']}" if "output" in r else ""
    return (f"{r['ranks']} ranks as {r['mode']} {where}\n{r['tokens']} tokens each, hidden "
            f"{r['hidden']}{rows}, top-{r['topk']} of {r['experts']} experts, {r['routing']} "
            f"routing, {r['iters']} iterations")


def label(row):
    words = row["phase"]
    for short, long in (("route_", "route + "), ("_cached", ", cached"), ("_", " "),
                        ("dispatch ", "dispatch to "), ("combine ", "combine from "),
                        ("to expanded", "expanded"), ("from expanded", "of expanded")):
        words = words.replace(short, long)
    typed = row["dtype"] if "launch" in row and row["dtype"] else ""
    return " ".join(filter(None, (typed, words, f"({row['launch']})" if "launch" in row else "")))


def limit_of(row):
    return "the link" if "launch" in row else "memcpy"


def draw(axes, rows, machine):
    rows = [r for r in rows if r["phase"] != "memcpy"]
    longest = max(float(r["p99_ns"]) for r in rows)
    unit, scale = ("ms", 1e6) if longest >= 1e6 else ("us", 1e3)
    for y, r in enumerate(rows):
        p50, p99, limit = (float(r[k]) / scale for k in ("p50_ns", "p99_ns", "limit_ns"))
        axes.barh(y, p50, height=0.62, color=COLORS[r["dtype"]])
        axes.plot([p50, p99], [y, y], color="#333333", linewidth=1.2, marker="|", markevery=[1])
        if limit > 0:
            axes.plot([limit, limit], [y - 0.42, y + 0.42], color=LIMIT, linewidth=2.4)
        share = f", {100 * float(r['share']):.0f} % of the speed of {limit_of(r)}"
        axes.annotate(f"{p50:.3g} {unit}{share if limit > 0 else ''}", (max(p99, limit), y),
                      xytext=(6, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [label(r) for r in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 1.42 * longest / scale)
    axes.set_xlabel(f"time until the last rank can use its output, {unit}", fontsize=9)
    axes.set_title(heading(rows[0], machine), fontsize=10, loc="left")
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def legend(axes, rows):
    types = [t for t in COLORS if t and any(r["dtype"] == t for r in rows)]
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=COLORS[t], label=f"median, {t} rows")
               for t in types]
    handles.append(pyplot.Line2D([], [], color="#333333", marker="|",
                                 label="to the 99th percentile"))
    handles.append(pyplot.Line2D([], [], color=LIMIT, linewidth=2.4,
                                 label=f"limit: its bytes by {limit_of(rows[0])}, in this run"))
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.4, -46 / axes.bbox.height),
                ncols=len(handles), frameon=False, fontsize=8)


def main():
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__.splitlines()[0])
    with open(sys.argv[1], newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or "phase" not in rows[0]:
        sys.exit(f"plot_bench.py: {sys.argv[1]} is no output of ep bench --csv")
    cases = [list(group) for _, group in groupby(rows, case_of)]
    heights = [1.3 + 0.34 * len(case) for case in cases]
    figure, panels = pyplot.subplots(len(cases), 1, figsize=(10.5, sum(heights)), squeeze=False,
                                     height_ratios=heights, layout="constrained")
    for axes, case in zip(panels[:, 0], cases):
        draw(axes, case, sys.argv[3] if len(sys.argv) > 3 else "the host")
    figure.canvas.draw()
    legend(panels[-1, 0], rows)
    figure.savefig(sys.argv[2], dpi=150)


if __name__ == "__main__":
    main()
