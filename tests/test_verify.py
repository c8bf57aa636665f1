"""Live steps computed again adapter by adapter, and a deterministic mode whose tokens do not depend on the batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from exactness import LIMITS, Story, tokens_of, tokens_together

from backend import verify
from backend.base import AdapterShape, StepBatch
from backend.errors import BackendError
from backend.geometry import load_geometry
from backend.live import LiveBackend
from backend.measure import ALL_MODULES
from backend.verify import VerifyingBackend
from sim.cli import main

SCENARIO = """
[model]
geometry = "tiny"
[engine]
max_loras = 3
max_lora_rank = 16
max_num_seqs = 8
max_num_batched_tokens = 64
max_model_len = 256
[adapters]
count = 4
rank = 8
[workload]
kind = "synthetic"
rate_rps = 20
duration_s = 1
prompt = { kind = "lognormal", median = 20, sigma = 0.5, max = 60 }
output = { kind = "lognormal", median = 6, sigma = 0.5, max = 20 }
popularity = { kind = "zipf", s = 1.0 }
"""


def live(*, deterministic: bool = False) -> LiveBackend:
    backend = LiveBackend(load_geometry("tiny"), LIMITS, 200, device="cpu", seed=3, deterministic=deterministic)
    for slot, rank in enumerate((8, 8, 16)):
        adapter = AdapterShape(slot + 1, rank, ALL_MODULES)
        backend.stage(adapter)
        backend.load(adapter, slot)
    return backend


def test_a_request_gets_the_same_tokens_alone_and_in_any_batch() -> None:
    stories = [Story(prompt, 8, slot) for prompt, slot in ((30, 0), (5, 1), (17, -1), (40, 2), (3, 0))]
    backend = live(deterministic=True)
    alone = [tokens_of(backend, story) for story in stories]
    for seed in range(3):
        assert tokens_together(backend, stories, np.random.default_rng(seed)) == alone


def test_checked_steps_are_left_as_they_were() -> None:
    stories = [Story(20, 6, 0), Story(9, 6, 1), Story(12, 6, -1)]
    unchecked = live()
    plain = tokens_together(unchecked, stories, np.random.default_rng(1))
    checked = VerifyingBackend(live(), 2)
    assert tokens_together(checked, stories, np.random.default_rng(1)) == plain
    found = checked.found
    assert found.steps > 2
    assert found.lora_rows > 0
    assert found.tokens > 0
    assert found.tokens_that_differ == 0
    assert found.largest_logit_error < 1e-4
    for name in ("k_cache", "v_cache"):
        left, right = getattr(checked.live.decoder, name), getattr(unchecked.decoder, name)
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True)), f"{name} is not as it was"
    caches = zip(checked.live.decoder.k_cache, live().decoder.k_cache, strict=True)
    assert any(not torch.equal(a, b) for a, b in caches), "nothing was computed"


def test_other_bits_in_the_batch_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = verify.sgmv

    def sloppy(x: torch.Tensor, out: torch.Tensor, *rest: object) -> None:
        whole(x, out, *rest)  # type: ignore[arg-type]
        if len(x) > 5:
            out[0, 0] += 1e-3

    monkeypatch.setattr(verify, "sgmv", sloppy)
    backend = VerifyingBackend(live(), 1)
    tables = tuple((i,) for i in range(4))
    batch = StepBatch((5, 1, 1, 1), (0, 3, 2, 4), (0, 1, 1, -1), (True,) * 4, tables, (False, True, True, True))
    with pytest.raises(BackendError, match=r"verify: step 0: the LoRA product of .* has other bits in the batch"):
        backend.execute(batch)


def test_run_verifies_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "small.toml"
    file.write_text(SCENARIO)
    assert main(["run", str(file), "--backend", "cpu", "--verify", "5", "--out", str(tmp_path / "run")]) == 0
    assert "verified " in capsys.readouterr().out
    assert "verify = 5" in (tmp_path / "run" / "scenario.toml").read_text()


def test_a_negative_interval_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "demo-azure", "--backend", "cpu", "--verify", "-5", "--out", str(tmp_path / "run")]) == 2
    assert "--verify is -5, must be" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", [["--verify"], ["--deterministic"]])
def test_a_profile_has_nothing_to_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: list[str]) -> None:
    assert main(["run", "demo-azure", *flag, "--out", str(tmp_path / "run")]) == 2
    assert "executes nothing" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
