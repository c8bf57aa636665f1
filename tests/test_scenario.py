"""Scenario files: what they mean, what is refused, and that the one written back means the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tomli_w

from sim.config import EngineConfig
from sim.errors import ScenarioError
from sim.scenario import find, from_tables, load_scenario

MINIMAL = {"model": {"geometry": "tiny"}, "workload": {"kind": "synthetic"}}


def load(tmp_path: Path, text: str) -> object:
    file = tmp_path / "s.toml"
    file.write_text(text)
    return load_scenario(str(file))


def test_defaults() -> None:
    scenario = from_tables(MINIMAL, "s", Path())
    assert (scenario.geometry, scenario.engine, scenario.ranks) == ("tiny", EngineConfig(), (16,))
    assert (scenario.backend, scenario.profile, scenario.seed, scenario.horizon_s) == ("profile", None, 0, None)
    assert scenario.adapter_count is None


@pytest.mark.parametrize("name", ["demo-servegen", "demo-azure"])
def test_shipped_scenarios_load_by_name(name: str) -> None:
    scenario = load_scenario(name)
    assert scenario.name == name
    assert max(scenario.ranks) <= scenario.engine.max_lora_rank


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"enigne": {}}, "[enigne]: unknown table; known: model, engine"),
        ({"model": "tiny"}, "model is 'tiny', must be a table"),
        ({"model": {}}, "model.geometry is missing"),
        ({"model": {"geometry": 8}}, "model.geometry is 8, must be a text"),
        ({"engine": {"max_lora": 4}}, "engine.max_lora: unknown key; known: max_loras, "),
        ({"engine": {"max_loras": "4"}}, "engine.max_loras is '4', must be a whole number"),
        ({"engine": {"max_loras": True}}, "engine.max_loras is True, must be a whole number"),
        ({"engine": {"max_loras": 0}}, "engine.max_loras is 0, must be >= 1"),
        ({"engine": {"max_loras": 8, "max_cpu_loras": 4}}, "engine.max_cpu_loras is 4, must be >= engine.max_loras"),
        (
            {"engine": {"scheduling_policy": "lifo"}},
            "engine.scheduling_policy is 'lifo', must be one of fcfs, priority",
        ),
        ({"engine": {"scheduling_policy": 1}}, "engine.scheduling_policy is 1, must be a text"),
        ({"engine": {"lora_eviction_policy": "mru"}}, "engine.lora_eviction_policy is 'mru', must be one of lru, "),
        ({"engine": {"lora_loading": "eager"}}, "engine.lora_loading is 'eager', must be one of blocking, overlapped"),
        ({"engine": {"async_scheduling": 1}}, "engine.async_scheduling is 1, must be true or false"),
        ({"engine": {"ageing_s": 0}}, "engine.ageing_s is 0, must be > 0 seconds"),
        ({"engine": {"watermark": 1.0}}, "engine.watermark is 1.0, must be in [0, 1)"),
        (
            {"engine": {"enable_chunked_prefill": False}},
            "engine.max_num_batched_tokens is 8192, must be >= engine.max_mod",
        ),
        ({"adapters": {"pinned": "a"}}, "adapters.pinned is 'a', must be a list of texts"),
        ({"run": {"check": "yes"}}, "run.check is 'yes', must be true or false"),
        ({"adapters": {"rank": 8, "ranks": [8]}}, "adapters.rank and adapters.ranks: give one of them"),
        ({"adapters": {"ranks": []}}, "adapters.ranks is []"),
        ({"adapters": {"ranks": [8.0]}}, "adapters.ranks is [8.0], must be a list of whole numbers"),
        ({"adapters": {"count": 0}}, "adapters.count is 0, must be finite and > 0"),
        ({"adapters": {"target_modules": "q_proj"}}, "adapters.target_modules is 'q_proj', must be a list of texts"),
        ({"backend": {"gpu_memory_gib": 0}}, "backend.gpu_memory_gib is 0, must be finite and > 0"),
        ({"backend": {"gpu_memory_gib": float("nan")}}, "backend.gpu_memory_gib is nan, must be finite and > 0"),
        ({"run": {"seed": -1}}, "run.seed is -1, must be finite and > -1"),
        ({"run": {"horizon_s": float("nan")}}, "run.horizon_s is nan, must be finite and > 0"),
        ({"run": {"horizon_s": float("inf")}}, "run.horizon_s is inf, must be finite and > 0"),
        ({"engine": {"max_cpu_loras": 2**70}}, f"engine.max_cpu_loras is {2**70}, must be below 2**53"),
        ({"adapters": {"count": 10**7}}, "adapters.count is 10000000, must be at most 1000000"),
        ({"fleet": {"replicas": 10**6}}, "fleet.replicas is 1000000, must be at most 10000"),
    ],
)
def test_refused(tables: dict[str, object], message: str) -> None:
    with pytest.raises(ScenarioError, match=f"^{re.escape(message)}"):
        from_tables(MINIMAL | tables, "s", Path())


def test_workload_is_wanted() -> None:
    with pytest.raises(ScenarioError, match=r"^\[workload\] is missing"):
        from_tables({"model": {"geometry": "tiny"}}, "s", Path())


def test_a_syntax_error_names_file_and_line(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match=r"s\.toml:2: not TOML"):
        load(tmp_path, "[model]\ngeometry = \n")


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ScenarioError, match="UTF-8"):
        load_scenario(str(tmp_path / "s.toml"))


def test_an_unknown_name_lists_the_shipped_ones() -> None:
    with pytest.raises(ScenarioError, match="demo-azure, demo-fleet, demo-plan, demo-servegen"):
        find("demo-azur")


def test_paths_are_relative_to_the_scenario_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    (tmp_path / "my-gpu").mkdir()
    tables = MINIMAL | {
        "model": {"geometry": "config.json"},
        "backend": {"profile": "my-gpu"},
        "workload": {"kind": "table", "path": "trace.csv"},
    }
    scenario = from_tables(tables, "s", tmp_path)
    assert scenario.geometry == str(tmp_path / "config.json")
    assert scenario.profile == str(tmp_path / "my-gpu")
    assert scenario.resolved()["workload"] == {"kind": "table", "path": str(tmp_path / "trace.csv")}


def test_a_shipped_name_wins_over_a_file_beside(tmp_path: Path) -> None:
    (tmp_path / "tiny").touch()
    assert from_tables(MINIMAL, "s", tmp_path).geometry == "tiny"


def test_the_resolved_scenario_means_the_same(tmp_path: Path) -> None:
    tables = MINIMAL | {
        "engine": {"max_loras": 4, "gpu_memory_utilization": 0.5, "scheduling_policy": "sjf", "async_scheduling": True},
        "adapters": {"count": 6, "ranks": [8, 16], "target_modules": ["q_proj", "v_proj"], "pinned": ["adapter-2"]},
        "backend": {"kind": "cpu", "gpu_memory_gib": 1.5},
        "run": {"seed": 7, "horizon_s": 3.0},
    }
    before = from_tables(tables, "s", tmp_path)
    after = load(tmp_path, tomli_w.dumps(before.resolved()))
    assert after.engine.max_cpu_loras == before.engine.host_loras == 4
    assert after.resolved() == before.resolved()
