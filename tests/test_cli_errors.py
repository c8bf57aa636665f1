"""Bad input at the command line: one sentence, exit status 2, and no run directory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from worlds import WorldBackend

import sim.run
from sim.cli import main

SCENARIO = """
[model]
geometry = "{geometry}"
[engine]
max_lora_rank = 16
max_model_len = 64
[adapters]
count = 2
rank = {rank}
pinned = {pinned}
[workload]
kind = "synthetic"
rate_rps = 5.0
duration_s = 1.0
prompt = {{ kind = "fixed", tokens = {prompt} }}
output = {{ kind = "fixed", tokens = 4 }}
popularity = {{ kind = "uniform" }}
{more}
[backend]
kind = "{kind}"
profile = "{profile}"
"""
GOOD = {"geometry": "tiny", "rank": 8, "prompt": 8, "kind": "cpu", "profile": "none", "more": "", "pinned": "[]"}


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def _cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps cost what `WorldBackend` says."""
    monkeypatch.setattr(sim.run, "open_backend", lambda *_, limits, **__: WorldBackend(100, limits.max_loras))


def refused(capsys: pytest.CaptureFixture[str], work: Path, *argv: str) -> str:
    """The sentence that `argv` is refused with; nothing else may be left or said."""
    before = sorted(work.rglob("*"))
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("multilora: ")
    assert captured.err.count("\n") == 1
    assert sorted(work.rglob("*")) == before
    return captured.err


def write(work: Path, **changes: object) -> str:
    (work / "s.toml").write_text(SCENARIO.format_map(GOOD | changes))
    return "s.toml"


@pytest.mark.usefixtures("_cheap")
def test_good_input_ends_with_the_run_directory(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", write(work), "--out", "run"]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == "run"
    assert captured.err == ""  # standard error is no terminal here: no progress bar
    assert (work / "run" / "summary.json").is_file()


@pytest.mark.usefixtures("_cheap")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": 100}, "workload request 0: 100 prompt + 4 output tokens are more than engine.max_model_len (64)"),
        ({"rank": 32}, "adapter adapter-1 has rank 32, more than engine.max_lora_rank (16)"),
        ({"rank": 12}, "rank is 12, must be a multiple of 8"),
        ({"more": "speed = 1"}, "workload.speed: unknown key; known: "),
        ({"geometry": "lama"}, "model.geometry lama: neither a shipped geometry"),
        (
            {"pinned": '["a"]'},
            "adapters.pinned names 'a', which the workload does not have; it has adapter-1, adapter-2",
        ),
        ({"pinned": '["adapter-1", "adapter-2"]'}, "adapters.pinned names 2 adapters, more than engine.max_loras (1)"),
        (
            {"pinned": '["adapter-1"]'},
            "adapter adapter-2 can never run, adapters.pinned takes all engine.max_loras (1)",
        ),
    ],
)
def test_what_cannot_be_served(
    work: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object], message: str
) -> None:
    assert message in refused(capsys, work, "run", write(work, **changes), "--out", "run")


def test_unknown_profile(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, work, "run", write(work, kind="profile", profile="h1000"), "--out", "run")
    assert "profile h1000: neither a shipped profile" in said


def test_unknown_backend_in_the_file(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "backend tpu: unknown" in refused(capsys, work, "run", write(work, kind="tpu"))


def test_unknown_scenario(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such file, and no shipped scenario" in refused(capsys, work, "run", "nowhere.toml")


def test_syntax_error(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "s.toml").write_text("[model\n")
    assert "s.toml:1: not TOML" in refused(capsys, work, "run", "s.toml")


@pytest.mark.parametrize("duration", ["0", "-1", "nan", "inf"])
def test_impossible_durations(work: Path, capsys: pytest.CaptureFixture[str], duration: str) -> None:
    assert "must be finite and > 0" in refused(capsys, work, "run", write(work), f"--duration-s={duration}")


@pytest.mark.parametrize(
    "argv",
    [[], ["run"], ["jump"], ["run", "demo-azure", "--backend", "tpu"], ["measure"], ["run", "x", "--duration-s", "a"]],
)
def test_argparse_exits_with_two(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert "usage: multilora" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_without_cuda(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "torch sees no CUDA device" in refused(capsys, work, "run", write(work), "--backend", "cuda")


def test_a_model_that_does_not_fit(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(work).replace("s.toml", "big.toml")
    text = (
        (work / "s.toml").read_text().replace('profile = "none"', 'profile = "h100-llama-3.1-8b"\ngpu_memory_gib = 16')
    )
    text = text.replace('"tiny"', '"llama-3.1-8b"').replace('kind = "cpu"', 'kind = "profile"')
    (work / "s.toml").write_text(text)
    assert "llama-3.1-8b does not fit: 16.0 GiB" in refused(capsys, work, "run", "s.toml")


def test_a_host_cache_smaller_than_the_slots(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(work)
    text = (work / "s.toml").read_text().replace("[engine]", "[engine]\nmax_loras = 2\nmax_cpu_loras = 1")
    (work / "s.toml").write_text(text)
    assert "engine.max_cpu_loras is 1, must be >= engine.max_loras (2)" in refused(capsys, work, "run", "s.toml")


def test_a_trace_out_of_order(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "t.csv").write_text("arrival_s,prompt_tokens,output_tokens,adapter\n1,5,5,a\n0.5,5,5,a\n")
    (work / "s.toml").write_text(
        '[model]\ngeometry = "tiny"\n[workload]\nkind = "table"\npath = "t.csv"\n[backend]\nkind = "cpu"\n'
    )
    assert "t.csv:3: arrival_s is before the row above" in refused(capsys, work, "run", "s.toml")
