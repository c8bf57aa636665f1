"""`multilora report`: a run, a sweep or a plan as one self-contained HTML page, and a run's timeline for Perfetto."""

from __future__ import annotations

import html
import json
import math
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from sim import run_dir
from sim.errors import ScenarioError
from sim.metrics import jain
from sim.panels import Panel, alone
from sim.plan_report import is_plan, plan_content
from sim.plots import run_figure, run_panels, tenant_figure, tenant_panels
from sim.tables import RunTables
from sim.tenants import tenant_table
from sim.timeline import timeline

MOST_TENANTS = 50
"""Rows of the adapter table on the page; `tenants.parquet` has all."""

COST = "the share of the engine's busy seconds, each step's shared out by tokens, a load's to whom it brought in"

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: auto; padding: 1rem; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, var(--least)), 1fr)); gap: 1rem; }
figure { margin: 0; } figure svg { width: 100%; height: auto; background: #fff; border-radius: 4px; }
figcaption { font-size: .8rem; color: color-mix(in srgb, currentColor 75%, transparent); }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #8884; }
th { vertical-align: bottom; } td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: Canvas; }
.starves td { font-weight: bold; }
@media print {
  body { max-width: none; padding: 0; font-size: 10px; } .wide { overflow: visible; } th, td { padding: .1rem .3rem; }
  .panels { grid-template-columns: 1fr 1fr; } figure, tr { break-inside: avoid; } h2 { break-after: avoid; }
}
"""


def read_run(folder: Path) -> tuple[RunTables, dict[str, object], dict[str, object]]:
    """(tables, summary, scenario) of a run directory. Raises `ScenarioError` if it is none."""
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        scenario = tomllib.loads((folder / "scenario.toml").read_text(encoding="utf-8"))
        tables = run_dir.read_tables(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ScenarioError(
            f"{folder}: not a run directory of this version ({error}); run the scenario again"
        ) from error
    return tables, summary, scenario


def report(folder: Path) -> list[Path]:
    """Write `report.html` into a run, a sweep or a plan; for a run also `timeline.json`, `tenants.parquet` and figures."""
    if is_plan(folder):
        return [_write(folder / "report.html", _plan_page(folder))]
    if (folder / "results.parquet").is_file():
        return [_write(folder / "report.html", _sweep_page(folder))]
    if (folder / "sweep.toml").is_file():
        raise ScenarioError(f"{folder}: a sweep that is not finished; its own command takes it up again")
    tables, summary, scenario = read_run(folder)
    engine = scenario.get("engine")
    max_loras = int(engine["max_loras"]) if isinstance(engine, dict) else 1
    title = f"{summary['scenario']}, {summary['backend']}, seed {summary['seed']}"
    tenants = tenant_table(tables)
    tenants.to_parquet(folder / "tenants.parquet", index=False)
    trace = json.dumps(timeline(tables, max_loras, title), separators=(",", ":"))
    page = _page(title, _run_body(tables, summary, tenants, title))
    written = [
        _write(folder / "report.html", page),
        _write(folder / "timeline.json", trace),
        folder / "tenants.parquet",
    ]
    figures = {stem: [folder / f"{stem}{suffix}" for suffix in (".png", ".svg")] for stem in ("figure", "tenants")}
    caption = title + _profile(summary)
    run_figure(tables, caption, *figures["figure"])
    tenant_figure(tenants, caption, *figures["tenants"])
    return written + figures["figure"] + figures["tenants"]


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


def _run_body(tables: RunTables, summary: dict[str, object], tenants: pd.DataFrame, title: str) -> list[str]:
    caption = title + _profile(summary)
    starving = [str(name) for name in tenants.loc[tenants["starves"], "name"]]
    said = f"Starving: {', '.join(starving)}." if starving else "No adapter starves."
    wait = f"mean TTFT {_cell(jain(tenants['mean_ttft_ms'].to_numpy()))}, mean wait {_cell(summary.get('jain_wait'))}"
    shown = tenants.head(MOST_TENANTS)
    return [
        "<h2>In short</h2>",
        _table(pd.DataFrame(_short(summary), columns=["ms", "mean", "P50", "P90", "P99"])),
        "<p>All: requests unfinished at the end count, too, with the time until then.</p>",
        "<h2>Over time</h2>",
        _figures(run_panels(tables), caption),
        f"<h2>Per adapter</h2><p>{html.escape(said)} Jain's index over adapters (1: all fare alike): {wait}.</p>",
        _figures(tenant_panels(tenants), caption),
        _table(_tenants(shown, summary), marked=shown["starves"].tolist()),
        f"<p>{len(shown)} of {len(tenants)} adapters, worst P99 TTFT first; tenants.parquet has all. Cost: {COST}.</p>",
        "<h2>All numbers</h2>",
        _table(
            pd.DataFrame([(k, _cell(v)) for k, v in summary.items() if not k.endswith("_ms")], columns=["key", "value"])
        ),
    ]


def _tenants(tenants: pd.DataFrame, summary: dict[str, object]) -> pd.DataFrame:
    """The columns of the tenants that fit a page; what each pays where the run has a price."""
    names = {
        "name": "adapter", "rank": "rank", "requests": "requests", "finished": "finished",
        "longest_wait_s": "longest wait (s)", "p50_ttft_ms": "TTFT P50 (ms)", "p90_ttft_ms": "P90",
        "p99_ttft_ms": "P99", "p99_tpot_ms": "TPOT P99 (ms)", "p99_e2el_ms": "E2E P99 (ms)",
        "stages": "loads from disk", "activations": "loads to a slot",
    }  # fmt: skip
    out = tenants[list(names)].rename(columns=names).map(_cell)
    out["cost (%)"] = (100 * tenants["cost_share"]).map(_cell)
    if isinstance(price := summary.get("cost_usd"), float):
        out["USD"] = (price * tenants["cost_share"]).map(_cell)
    return out


def _profile(summary: dict[str, object]) -> str:
    error = summary.get("profile_mape")
    return f"; profile MAPE {error:.1%} on held-out steps" if isinstance(error, float) else ""


def _short(summary: dict[str, object]) -> list[tuple[str, ...]]:
    rows = []
    for label, prefix in (("finished", ""), ("all", "censored_")):
        for name, key in (("TTFT", "ttft"), ("TPOT", "tpot"), ("E2E", "e2el")):
            cells = [_cell(summary.get(f"{prefix}{s}_{key}_ms")) for s in ("mean", "p50", "p90", "p99")]
            rows.append((f"{name}, {label}", *cells))
    return rows


def _sweep_page(folder: Path) -> str:
    from sim.scenario import from_tables
    from sim.sweep_plots import MEASURES as LABELS
    from sim.sweep_plots import sweep_caption, sweep_figures, sweep_panels
    from sim.verdict import THROUGHPUT, TPOT, TTFT, verdicts

    spec = tomllib.loads((folder / "sweep.toml").read_text(encoding="utf-8"))
    results = pd.read_parquet(folder / "results.parquet")
    keys = list(spec["set"])
    scenario = from_tables(spec["scenario"], folder.name, folder)
    name = str(spec.get("name", folder.name))
    title = f"{name}: {', '.join(keys)}"
    caption = sweep_caption(results, name, keys)
    sweep_figures(results, keys, caption, folder)
    shown = [*keys, "seed", "status", THROUGHPUT, TTFT, TPOT, "num_gpu_blocks", "adapter_hit_rate"]
    body = [f"<p>{html.escape(sentence)}</p>" for sentence in verdicts(results, keys, scenario.slo)]
    body += [f"<p>Refused: {html.escape(str(why))}</p>" for why in results["error"].dropna().unique()]
    for heading, panels in sweep_panels(results, keys).items():
        body += [f"<h2>{heading.replace('_', ' ').capitalize()}</h2>", _figures(panels, caption)]
    return _page(title, [*body, "<h2>All runs</h2>", _table(results[shown].rename(columns=LABELS).map(_cell))])


def _plan_page(folder: Path) -> str:
    content = plan_content(folder)
    body = [_figures(content.panels, content.caption), *(_table(frame) for frame in content.frames)]
    words = f'<h2>As printed</h2><div class="wide"><pre>{html.escape(content.said)}</pre></div>'
    return _page(f"{folder.name}: {content.promise}", [*body, words])


def _figures(panels: Sequence[Panel], caption: str) -> str:
    """Each panel as a figure of its own: beside each other where there is room, one below another on a phone."""
    shown = (f"<figure>{alone(panel)}<figcaption>{html.escape(caption)}</figcaption></figure>" for panel in panels)
    least = 22 if len(panels) % 3 == 0 else 28  # rows of three, or of two
    return f'<div class="panels" style="--least: {least}rem">{"".join(shown)}</div>'


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
