"""`multilora report`: a run, a sweep or a plan as one self-contained HTML page, and a run's timeline for Perfetto."""

from __future__ import annotations

import html
import json
import math
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd

from sim import run_dir
from sim.errors import ScenarioError
from sim.plan_report import is_plan, plan_page
from sim.plots import run_figure, tenant_figure
from sim.tables import RunTables
from sim.tenants import tenant_table
from sim.timeline import timeline

MOST_TENANTS = 50
"""Rows of the adapter table on the page; `tenants.parquet` has all."""

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: auto; padding: 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
figure { margin: 1rem 0; } figure svg { width: 100%; height: auto; background: #fff; }
figcaption { font-size: .85rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; }
.starves td { font-weight: bold; }
@media print { body { max-width: none; font-size: 11px; } .wide { overflow: visible; } figure { break-inside: avoid; } }
"""


def read_run(folder: Path) -> tuple[RunTables, dict[str, object], dict[str, object]]:
    """(tables, summary, scenario) of a run directory. Raises `ScenarioError` if it is none."""
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        scenario = tomllib.loads((folder / "scenario.toml").read_text(encoding="utf-8"))
        tables = run_dir.read_tables(folder, float(summary["duration_s"]))
    except (OSError, ValueError, KeyError) as error:
        raise ScenarioError(
            f"{folder}: not a run directory of this version ({error}); run the scenario again"
        ) from error
    return tables, summary, scenario


def report(folder: Path) -> list[Path]:
    """Write `report.html` into a run, a sweep or a plan; for a run also `timeline.json`, `tenants.parquet` and figures."""
    if is_plan(folder):
        (title, body), figures = plan_page(folder, _figure, _table)
        return [*figures, _write(folder / "report.html", _page(title, body))]
    if (folder / "results.parquet").is_file():
        return [_write(folder / "report.html", _sweep_page(folder))]
    tables, summary, scenario = read_run(folder)
    engine = scenario.get("engine")
    max_loras = int(engine["max_loras"]) if isinstance(engine, dict) else 1
    title = f"{summary['scenario']}, {summary['backend']}, seed {summary['seed']}"
    tenants = tenant_table(tables)
    tenants.to_parquet(folder / "tenants.parquet", index=False)
    trace = json.dumps(timeline(tables, max_loras, title), separators=(",", ":"))
    figures = [folder / "figure", folder / "tenants"]
    page = _page(title, _run_body(tables, summary, tenants, title, figures))
    written = [
        _write(folder / "report.html", page),
        _write(folder / "timeline.json", trace),
        folder / "tenants.parquet",
    ]
    return written + [stem.with_suffix(suffix) for stem in figures for suffix in (".png", ".svg")]


def _write(file: Path, text: str) -> Path:
    partial = file.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    return partial.replace(file)


def _page(title: str, body: Iterable[str]) -> str:
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
    view = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    return (
        f"{head}{view}<style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>{''.join(body)}</body></html>\n"
    )


def _run_body(
    tables: RunTables, summary: dict[str, object], tenants: pd.DataFrame, title: str, figures: list[Path]
) -> list[str]:
    caption = title + _profile(summary)
    starving = [str(name) for name in tenants.loc[tenants["starves"], "name"]]
    said = f"Starving: {', '.join(starving)}." if starving else "No adapter starves."
    shown = tenants.head(MOST_TENANTS)
    return [
        "<h2>In short</h2>",
        _table(pd.DataFrame(_short(summary), columns=["", "mean", "p50", "p90", "p99"])),
        "<h2>Over time</h2>",
        _figure(lambda file: run_figure(tables, caption, file), caption, figures[0]),
        f"<h2>Per adapter</h2><p>{html.escape(said)} Jain's index of the waits: {_cell(summary.get('jain_wait'))}.</p>",
        _figure(lambda file: tenant_figure(tenants, caption, file), caption, figures[1]),
        _table(shown.drop(columns=["starves"]).map(_cell), marked=shown["starves"].tolist()),
        f"<p>{len(shown)} of {len(tenants)} adapters, worst P99 TTFT first; all are in tenants.parquet.</p>",
        "<h2>All numbers</h2>",
        _table(
            pd.DataFrame([(k, _cell(v)) for k, v in summary.items() if not k.endswith("_ms")], columns=["key", "value"])
        ),
    ]


def _profile(summary: dict[str, object]) -> str:
    error = summary.get("profile_mape")
    return f"; profile MAPE {error:.1%} on held-out steps" if isinstance(error, float) else ""


def _short(summary: dict[str, object]) -> list[tuple[str, ...]]:
    rows = []
    for label, prefix in (("finished", ""), ("all, unfinished at the horizon", "censored_")):
        for name, key in (("TTFT", "ttft"), ("TPOT", "tpot"), ("E2E", "e2el")):
            cells = [_cell(summary.get(f"{prefix}{s}_{key}_ms")) for s in ("mean", "p50", "p90", "p99")]
            rows.append((f"{name} (ms), {label}", *cells))
    return rows


def _sweep_page(folder: Path) -> str:
    from sim.scenario import from_tables
    from sim.sweep_plots import sweep_caption, sweep_figures
    from sim.verdict import THROUGHPUT, TPOT, TTFT, verdicts

    spec = tomllib.loads((folder / "sweep.toml").read_text(encoding="utf-8"))
    results = pd.read_parquet(folder / "results.parquet")
    keys = list(spec["set"])
    scenario = from_tables(spec["scenario"], folder.name, folder)
    title = f"{folder.name}: {', '.join(keys)}"
    caption = sweep_caption(results, folder.name)
    sweep_figures(results, keys, caption, folder)
    drawings = [
        file.read_text(encoding="utf-8") for file in (folder / "lines.svg", folder / "heat_maps.svg") if file.is_file()
    ]
    shown = [*keys, "seed", "status", THROUGHPUT, TTFT, TPOT, "num_gpu_blocks", "adapter_hit_rate"]
    sentences = verdicts(results, keys, scenario.slo)
    body = [f"<p>{html.escape(sentence)}</p>" for sentence in sentences]
    body += [f"<figure>{_inline(svg)}<figcaption>{html.escape(caption)}</figcaption></figure>" for svg in drawings]
    return _page(title, [*body, _table(results[shown].map(_cell))])


def _figure(draw: Callable[[Path], None], caption: str, stem: Path) -> str:
    """The drawing as a part of the page; it also lies beside it as PNG and SVG."""
    svg = stem.with_suffix(".svg")
    draw(stem.with_suffix(".png"))
    draw(svg)
    text = _inline(svg.read_text(encoding="utf-8"))
    return f"<figure>{text}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _inline(svg: str) -> str:
    """A drawing without its XML head, which has no place inside a page."""
    return svg[svg.index("<svg") :]


def _cell(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def _table(frame: pd.DataFrame, marked: list[bool] | None = None) -> str:
    head = "".join(f"<th>{html.escape(str(column))}</th>" for column in frame.columns)
    rows = []
    for i, row in enumerate(frame.itertuples(index=False)):
        kind = ' class="starves"' if marked and marked[i] else ""
        rows.append(f"<tr{kind}>{''.join(f'<td>{html.escape(str(cell))}</td>' for cell in row)}</tr>")
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
