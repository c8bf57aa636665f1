"""The generic trace table: `arrival_s, prompt_tokens, output_tokens, adapter` as CSV, JSONL or Parquet.

Optional columns: `priority` (smaller first), `prefix_id` (any text; empty: none) and `prefix_tokens` (how many
tokens are the common beginning of that `prefix_id`; a session's go on through the output), or `prefix_path`: where
beginnings grow out of one another, `end_tokens:id` pairs from the root, separated by spaces.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from workloads.errors import WorkloadError
from workloads.reader import LARGEST
from workloads.requests import BASE, NO_PREFIX, PrefixTree, RequestTable

REQUIRED = ("arrival_s", "prompt_tokens", "output_tokens", "adapter")
OPTIONAL = ("priority", "prefix_id", "prefix_tokens", "prefix_path")


def _read_csv(path: Path) -> pd.DataFrame:
    # Where rows are longer than the header pandas only warns, and drops or shifts columns.
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)
        try:
            # Only an empty cell is empty: pandas would also take an adapter named NA or null for the base model.
            table = pd.read_csv(
                path,
                dtype={"adapter": str, "prefix_id": str, "prefix_path": str},
                keep_default_na=False,
                na_values=[""],
                skip_blank_lines=False,
                low_memory=False,
                index_col=False,
            )
        except pd.errors.ParserWarning as error:
            raise WorkloadError(f"{path}:2: the rows have more fields than the header names") from error
    table.index = pd.RangeIndex(2, len(table) + 2)
    return table.dropna(how="all")


def _read_jsonl(path: Path) -> pd.DataFrame:
    rows: dict[int, dict[str, object]] = {}
    for line, text in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except ValueError as error:
            raise WorkloadError(f"{path}:{line}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise WorkloadError(f"{path}:{line}: must be a JSON object with {', '.join(REQUIRED)}")
        rows[line] = row
    return pd.DataFrame(list(rows.values()), index=list(rows), dtype=object)


def _read(path: Path) -> pd.DataFrame:
    """The table, indexed by line of the file (Parquet: by row, from 1)."""
    if not path.is_file():
        raise WorkloadError(f"{path}: no such file; workload.path must name a trace table")
    if path.suffix not in (".csv", ".jsonl", ".parquet"):
        raise WorkloadError(f"{path}: a trace table must be .csv, .jsonl or .parquet")
    try:
        if path.suffix == ".csv":
            return _read_csv(path)
        if path.suffix == ".jsonl":
            return _read_jsonl(path)
        table = pd.read_parquet(path)
    except WorkloadError:
        raise
    except (ValueError, OSError) as error:
        raise WorkloadError(f"{path}: cannot be read as a table ({error})") from error
    table.index = pd.RangeIndex(1, len(table) + 1)
    return table


def _numbers(table: pd.DataFrame, name: str, path: Path) -> npt.NDArray[np.float64]:
    """A column of finite numbers in range, whole but for `arrival_s`."""
    column = table[name]
    values = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    whole = name != "arrival_s"
    least = {"arrival_s": 0, "prefix_tokens": 0, "priority": -LARGEST}.get(name, 1)
    with np.errstate(invalid="ignore"):
        good = np.isfinite(values) & (values >= least)
        if whole:
            good &= (values % 1 == 0) & (values < LARGEST)
    if column.dtype.kind in "bO":
        good &= ~column.map(lambda v: isinstance(v, bool)).to_numpy(dtype=bool)
    if not good.all():
        row = int(np.argmin(good))
        want = f"a {'whole ' if whole else ''}number >= {least}" + (f" and < {LARGEST}" if whole else "")
        raise WorkloadError(f"{path}:{table.index[row]}: {name} is {column.iloc[row]}, must be {want}")
    return values


def load(path: Path) -> tuple[RequestTable, tuple[str, ...]]:
    """The requests and the adapters' names in order of first appearance; an empty adapter is the base model."""
    table = _read(path)
    missing = [name for name in REQUIRED if name not in table]
    unknown = [name for name in table if name not in REQUIRED + OPTIONAL]
    if missing or unknown:
        known = ", ".join(REQUIRED + OPTIONAL)
        raise WorkloadError(f"{path}:1: columns missing: {missing}, unknown: {unknown}; a trace table has {known}")
    columns = {
        name: _numbers(table, name, path)
        for name in ("arrival_s", "prompt_tokens", "output_tokens", "priority", "prefix_tokens")
        if name in table
    }
    back = np.nonzero(np.diff(columns["arrival_s"]) < 0)[0]
    if len(back):
        line = table.index[int(back[0]) + 1]
        raise WorkloadError(f"{path}:{line}: arrival_s is before the row above, rows must be in order")
    if ("prefix_id" in table) != ("prefix_tokens" in table):
        raise WorkloadError(f"{path}:1: prefix_id and prefix_tokens must both be there, or neither")
    longest = columns["prompt_tokens"] + columns["output_tokens"]
    too_long = columns.get("prefix_tokens", np.zeros(len(table))) > longest
    if too_long.any():
        line = table.index[int(np.argmax(too_long))]
        raise WorkloadError(f"{path}:{line}: prefix_tokens must be <= prompt_tokens + output_tokens")
    adapter, names = _coded(table["adapter"])
    whole = {name: column.astype(np.int64) for name, column in columns.items() if name != "arrival_s"}
    if "prefix_id" in table:
        whole["prefix_id"] = _coded(table["prefix_id"])[0]
    tree = None
    if "prefix_path" in table:
        if "prefix_id" in table:
            raise WorkloadError(f"{path}:1: prefix_path and prefix_id: give one of them")
        texts = table["prefix_path"].fillna("").astype(str)
        whole["prefix_id"], whole["prefix_tokens"], tree = _tree(texts, longest, path)
    requests = RequestTable(columns["arrival_s"], adapter=adapter + 1 + BASE, tree=tree, **whole)
    return requests, names


def _tree(
    paths: pd.Series[str], longest: npt.NDArray[np.float64], file: Path
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], PrefixTree]:
    """(leaf, tokens) of each row and the tree of all its `prefix_path`s. A node is an id under its parent.

    A path may end inside a node, so a node reaches as far as the longest path through it; where one continues it, it
    ends for all rows.
    """
    nodes: dict[tuple[int, str], int] = {}
    ends: list[int] = []
    continued: list[bool] = []
    leaves, tokens = np.full(len(paths), NO_PREFIX), np.zeros(len(paths), dtype=np.int64)
    for row, (line, text) in enumerate(paths.items()):
        leaf, last, pairs = NO_PREFIX, 0, text.split()
        for depth, pair in enumerate(pairs, start=1):
            end, _, name = pair.partition(":")
            if not (end.isascii() and end.isdigit() and name and last < int(end) <= longest[row]):
                raise WorkloadError(
                    f"{file}:{line}: prefix_path has {pair!r}, must be end_tokens:id with rising ends up to prompt_tokens"
                    " + output_tokens"
                )
            last = int(end)
            leaf = nodes.setdefault((leaf, name), len(nodes))
            if leaf == len(ends):
                ends.append(last)
                continued.append(False)
            goes_on = depth < len(pairs)
            if (continued[leaf] and last > ends[leaf]) or (goes_on and last < ends[leaf]):
                raise WorkloadError(f"{file}:{line}: prefix_path has {pair!r}, but {name} ends at {ends[leaf]} above")
            ends[leaf] = max(ends[leaf], last)
            continued[leaf] |= goes_on
        leaves[row], tokens[row] = leaf, last
    parents = np.array([parent for parent, _ in nodes], dtype=np.int64)
    return leaves, tokens, PrefixTree(parents, np.array(ends, dtype=np.int64))


def _coded(column: pd.Series[str]) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    """Texts as numbers in order of first appearance, empty as -1, and the texts."""
    texts = column.fillna("").astype(str)
    codes, uniques = pd.factorize(texts.where(texts != "", None))
    return codes.astype(np.int64), tuple(str(u) for u in uniques)
