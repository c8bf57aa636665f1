"""I8: the compiled replay writes the tables that going step by step writes, byte for byte."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backend.base import EngineLimits
from backend.geometry import load_geometry
from backend.heat import HeatCurve
from backend.predictor import BAND_TERMS, BANDS, BOUNDED, HOST_TERMS, LONG_ROWS, TERMS, Predictor, Regime
from backend.profile import LoadCurve, Profile, load_profile, shipped_profiles
from backend.replay import ReplayBackend
from sim import compiled_inputs
from sim.config import EngineConfig
from sim.engine import simulate
from sim.errors import LivelockError
from sim.fleet import Fleet
from sim.fleet_config import Autoscaling, FleetConfig, FleetEvent
from sim.fleet_tables import fleet_tables
from sim.metrics import summarise
from sim.placement import PLACEMENTS
from sim.router import ROUTERS
from sim.run import execute
from sim.scenario import load_scenario
from sim.tables import RunTables
from workloads.adapters import Catalogue
from workloads.requests import PrefixTree, RequestTable

pytestmark = pytest.mark.skipif(compiled_inputs._native is None, reason="built without a C++ compiler")

WORLD = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 1_000_000),
        "count": st.integers(1, 60),
        "adapters": st.integers(1, 9),
        "rate": st.sampled_from([0.0, 5.0, 50.0, 400.0]),
        "tree": st.booleans(),
        "blocks": st.integers(20, 90),
        "profile": st.sampled_from(["random", *shipped_profiles()]),
        "horizon_s": st.sampled_from([None, 0.3, 2.0]),
        "pinned": st.booleans(),
        "registered": st.booleans(),
        "max_loras": st.integers(1, 4),
        "extra_cpu": st.integers(0, 3),
        "max_num_seqs": st.integers(1, 12),
        "budget": st.one_of(st.integers(2, 30), st.integers(12, 90)),
        "long_prefill_token_threshold": st.sampled_from([0, 3, 17]),
        "block_size": st.sampled_from([1, 3, 4, 16]),
        "scheduling_policy": st.sampled_from(["fcfs", "priority"]),
        "enable_chunked_prefill": st.booleans(),
        "enable_prefix_caching": st.booleans(),
        "async_scheduling": st.booleans(),
        "scheduler_reserve_full_isl": st.booleans(),
        "watermark": st.sampled_from([0.0, 0.1]),
        "lora_order": st.sampled_from(["requests", "set"]),
    }
)
KEYS = (
    "long_prefill_token_threshold", "block_size", "scheduling_policy", "enable_chunked_prefill", "enable_prefix_caching",
    "async_scheduling", "scheduler_reserve_full_isl", "watermark", "lora_order", "max_loras", "max_num_seqs",
)  # fmt: skip
LONGEST = 60


def requests_of(w: dict) -> RequestTable:
    """Short and long requests, some at one instant, some that begin alike."""
    rng = np.random.default_rng(w["seed"])
    n = w["count"]
    gaps = rng.exponential(1.0 / w["rate"], n) * rng.integers(0, 3, n) if w["rate"] else np.zeros(n)
    prompt, output = rng.integers(1, LONGEST // 2, n), rng.integers(1, LONGEST // 2, n)
    if rng.random() < 0.3:
        output[:] = 1
    ends = rng.integers(1, 12, 5).cumsum()
    parent = np.array([-1, 0, 1, 1, 2])
    tree = PrefixTree(parent, ends) if w["tree"] else None
    node = rng.integers(-1, 5, n)
    return RequestTable(
        gaps.cumsum(), prompt, output, rng.integers(0, w["adapters"] + 1, n), rng.integers(0, 3, n), node,
        np.where(node >= 0, rng.integers(0, prompt + output + 1), 0), tree,
    )  # fmt: skip


def profile_of(w: dict) -> Profile:
    if w["profile"] != "random":
        return load_profile(w["profile"])
    rng = np.random.default_rng(w["seed"] + 1)

    def regime(launch: bool) -> Regime:
        knots, lora_knots = tuple(sorted({1.0, 8.0, *rng.integers(2, 60, 3).astype(float)})), (1.0, 32.0)
        device = rng.random(len(knots) + 2 + len(TERMS)) * 1e-4
        bounds = {k: float(rng.integers(0, 200)) for k in BOUNDED[: rng.integers(0, len(BOUNDED))]}
        return Regime(
            knots, lora_knots, tuple(device), tuple(rng.random(HOST_TERMS) * 1e-4), dict.fromkeys(bounds, 0.0), bounds,
            tuple(rng.random(HOST_TERMS) * 1e-3) if launch else (), int(rng.choice([1, 32])), float(rng.random() * 1e-4),
            tuple(rng.random((len(BANDS) + 1) * len(BAND_TERMS)) * 1e-6) if rng.random() < 0.5 else (),
        )  # fmt: skip

    graphs = [(), (1, 2, 4, 8), (1, 2, 4, 8, LONG_ROWS + 1)][rng.integers(3)]
    heat = HeatCurve(float(rng.choice([0.0, 0.005, 0.05])), float(rng.choice([0.0, 1e3])))
    some = [name for name in ("mixed", "long") if rng.random() < 0.5]
    regimes = {"eager": regime(True), "decode": regime(False)} | {name: regime(False) for name in some}
    return Profile(
        "random", 1 << 34, Predictor(graphs, regimes, heat), LoadCurve(1e-3, 1e10), LoadCurve(1e-4, 1e11), {}, {}
    )


def config_of(w: dict) -> EngineConfig:
    keys = {key: w[key] for key in KEYS}
    # Whole prompts must fit; chunked ones may take all of a step.
    least = w["max_num_seqs"] if w["enable_chunked_prefill"] else LONGEST
    return EngineConfig(
        max_cpu_loras=w["max_loras"] + w["extra_cpu"], max_num_batched_tokens=max(w["budget"], least), max_model_len=LONGEST,
        **keys,
    )  # fmt: skip


def play(w: dict, *, fast_forward: bool, **more: object) -> RunTables:
    config = config_of(w)
    limits = EngineLimits(config.max_loras, 64, 16, 64, LONGEST, config.block_size, 0.9)
    blocks = max(w["blocks"], LONGEST // config.block_size + 2)
    backend = ReplayBackend(profile_of(w), load_geometry("llama-3.1-8b"), limits, blocks)
    pinned = (1,) if w["pinned"] and config.max_loras > 1 else ()
    registered = tuple(range(1, w["adapters"] + 1)) if w["registered"] else ()
    return simulate(
        requests_of(w), Catalogue.uniform(w["adapters"], [8, 16]), config, backend, pinned=pinned, registered=registered,
        horizon_s=w["horizon_s"], fast_forward=fast_forward, **more,
    )  # fmt: skip


def files(tables: RunTables) -> dict[str, bytes]:
    """The tables as the bytes of their files."""
    out = {}
    for name in ("requests", "steps", "adapters", "moves"):
        buffer = io.BytesIO()
        getattr(tables, name).to_parquet(buffer, index=False)
        out[name] = buffer.getvalue()
    return out


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(WORLD)
def test_i8_the_same_tables(w: dict) -> None:
    try:
        slow = play(w, fast_forward=False)
    except LivelockError as error:
        with pytest.raises(LivelockError, match=str(error).split(" preemptions", maxsplit=1)[0]):
            play(w, fast_forward=True)
        return
    fast = play(w, fast_forward=True)
    for name in ("requests", "steps", "adapters", "moves"):
        pd.testing.assert_frame_equal(getattr(fast, name), getattr(slow, name), check_exact=True, obj=name)
    assert files(fast) == files(slow)
    assert (fast.horizon_s, fast.totals) == (slow.horizon_s, slow.totals)
    assert summarise(fast) == summarise(slow)


FLEET = st.fixed_dictionaries(
    {
        "router": st.sampled_from(sorted(ROUTERS)),
        "placement": st.sampled_from(sorted(PLACEMENTS)),
        "replicas": st.integers(1, 4),
        "failure": st.sampled_from([None, 0.013, 0.1]),
        "scaling": st.booleans(),
    }
)


def play_fleet(w: dict, f: dict, *, fast_forward: bool) -> RunTables:
    config = config_of(w)
    limits = EngineLimits(config.max_loras, 64, 16, 64, LONGEST, config.block_size, 0.9)
    blocks = max(w["blocks"], LONGEST // config.block_size + 2)
    profile, geometry = profile_of(w), load_geometry("llama-3.1-8b")
    at_s = f["failure"]
    events = () if at_s is None else (FleetEvent(at_s, "fail", 0), FleetEvent(3 * at_s + 0.001, "recover", 0))
    scaling = Autoscaling(max_replicas=5, target=2.0, period_s=0.037, stabilization_s=0.2) if f["scaling"] else None
    fleet = Fleet(
        requests_of(w), Catalogue.uniform(w["adapters"], [8, 16]), config,
        lambda: ReplayBackend(profile, geometry, limits, blocks),
        FleetConfig(
            replicas=f["replicas"], router=f["router"], placement=f["placement"], startup_s=0.02, events=events,
            autoscaling=scaling,
        ),
        seed=w["seed"], fast_forward=fast_forward,
    )  # fmt: skip
    fleet.run(w["horizon_s"])
    return fleet_tables(fleet)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(WORLD, FLEET)
def test_i8_the_same_tables_of_a_fleet(w: dict, f: dict) -> None:
    try:
        slow = play_fleet(w, f, fast_forward=False)
    except LivelockError:
        with pytest.raises(LivelockError):
            play_fleet(w, f, fast_forward=True)
        return
    fast = play_fleet(w, f, fast_forward=True)
    for name in ("requests", "steps", "adapters", "moves", "replicas"):
        pd.testing.assert_frame_equal(getattr(fast, name), getattr(slow, name), check_exact=True, obj=name)
    assert (fast.horizon_s, fast.totals) == (slow.horizon_s, slow.totals)


def test_without_the_compiled_loop_everything_goes_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where no C++ compiler was when the package was built."""
    scenario = replace(load_scenario("demo-fleet"), horizon_s=30.0)
    compiled_tables, compiled_summary, _ = execute(scenario)
    monkeypatch.setattr(compiled_inputs, "_native", None)
    tables, summary, _ = execute(scenario)
    assert summary == compiled_summary
    assert files(tables) == files(compiled_tables)
