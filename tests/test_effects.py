"""One change at a time: what must come out of each, and the command that shows it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from backend.profile import load_profile
from sim.cli import main
from sim.config import EngineConfig
from sim.deployment import Deployment
from sim.effects import KINDS, Effect, effects, hottest
from sim.errors import ScenarioError
from sim.fleet_config import FleetConfig
from sim.traffic import Traffic
from workloads.adapters import Catalogue
from workloads.requests import RequestTable

H100 = "h100-llama-3.1-8b"
ENGINE = EngineConfig(max_loras=4, max_lora_rank=16, max_num_seqs=16, max_model_len=1024)
DEPLOYMENT = Deployment("llama-3.1-8b", H100, ENGINE, FleetConfig())


def traffic(seed: int = 1, count: int = 60, adapters: int = 12) -> Traffic:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(20, 200, count), rng.integers(2, 20, count)
    ids = np.minimum(rng.geometric(0.2, count), adapters)
    return Traffic(
        RequestTable(rng.exponential(0.05, count).cumsum(), *lengths, ids), Catalogue.uniform(adapters, [8, 16])
    )


def rows(kind: str, share: float = 0.0) -> dict[str, Effect]:
    found = list(effects(KINDS[kind](DEPLOYMENT, (traffic(), traffic(2)), share)))
    assert len({row.name for row in found}) == len(found)
    return {row.name.strip(): row for row in found}


def test_what_hides_loads() -> None:
    found = rows("loads")
    small, large = found["host cache of 4 (max_cpu_loras = max_loras)"], found["host cache of 12, all adapters"]
    assert small.disk_loads > large.disk_loads
    assert large.disk_loads <= 2 * 12, "each adapter is read once a seed"
    assert found["and the 2 hottest pinned"].slot_loads < large.slot_loads
    assert found["and loads overlapped with steps"].load_share == 0
    assert found["nothing to load"].load_share == 0
    read = found["and all read from disk before (prefetch into host memory)"]
    assert found["nothing to load"].mean_ttft_ms < read.mean_ttft_ms < large.mean_ttft_ms < small.mean_ttft_ms
    assert {row.requests for row in found.values()} == {120}


def test_base_requests_pay_for_their_neighbours_only() -> None:
    found = rows("base", 0.5)
    off, on = found["no LoRA, all are base requests: these"], found["LoRA on, all are base requests: these"]
    beside, others = (found[f"LoRA on, the others use adapters: {who}"] for who in ("these", "the others"))
    assert off.num_gpu_blocks > on.num_gpu_blocks == beside.num_gpu_blocks, "slots take KV blocks"
    assert off.mean_tpot_ms == on.mean_tpot_ms < beside.mean_tpot_ms
    assert off.slot_loads == on.slot_loads == 0 < beside.slot_loads
    assert beside.requests + others.requests == 120
    assert off.requests == beside.requests


def test_without_base_requests_there_is_nothing_to_tell() -> None:
    with pytest.raises(ScenarioError, match="give --base-share"):
        rows("base")
    everyone = rows("base", 1.0)
    assert [row.requests for row in everyone.values()] == [120, 120, 120]


def test_a_high_max_lora_rank_costs_memory_and_where_padded_time() -> None:
    found = rows("rank")
    own = [found[f"rank 8, max_lora_rank {r}, own ranks"] for r in (8, 16, 32, 64, 128)]
    padded = [found[f"rank 8, max_lora_rank {r}, padded"] for r in (16, 32, 64, 128)]
    assert all(a.num_gpu_blocks > b.num_gpu_blocks for a, b in pairwise(own))
    assert len({row.mean_tpot_ms for row in own}) == 1
    steps = [own[0].mean_tpot_ms, *(row.mean_tpot_ms for row in padded)]
    assert steps == sorted(steps)
    assert steps[-1] > steps[0]


def test_the_hottest_adapters() -> None:
    some = traffic()
    requests = replace(some.requests, adapter=np.array([3] * 30 + [7] * 20 + [0] * 10))
    assert hottest(replace(some, requests=requests), 2) == (3, 7)


def test_effects_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "e"
    what = ["effects", "demo-plan", "--of", "base", "--base-share", "0.5", "--duration-s", "3", "--seeds", "1"]
    assert main([*what, "--max-loras", "8", "--rank", "64", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("an adapter of rank") == 1
    assert "an adapter of rank 64 (336 MB): disk to host" in printed
    assert f"max_loras 8; profile MAPE {load_profile('h100-llama-3.1-8b').accuracy['mape']:.1%}" in printed
    assert len(pd.read_parquet(out / "effects.parquet")) == 4
    assert (out / "effects.txt").read_text() in printed


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--base-share", "2"], "--base-share is 2.0"),
        (["--max-loras", "0"], "--max-loras is 0"),
        (["--rank", "12"], "rank is 12, must be a multiple of 8"),
        (["--seeds", "0"], "--seeds is 0"),
        (["--base-share", "0.5", "--profile", "none"], "profile none"),
    ],
)
def test_effects_that_cannot_be(more: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "o"
    assert main(["effects", "demo-plan", "--of", "base", "--duration-s", "2", *more, "--out", str(out)]) == 2
    assert says in capsys.readouterr().err
    assert not out.exists()
