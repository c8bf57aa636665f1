"""The README's commands run as printed (but for GPUs); those of docs/ at least have flags that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from sim.cli import main, parser

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "workloads" / "data" / "azure_conv_sample.csv"
MEASURED = ROOT / "tests" / "golden" / "vllm_h100" / "ml8_rate8_"
NEEDS_A_GPU = ("cuda", "my-gpu")
"""A word of commands that this test does not run: the device, and the profile measured on it."""


def commands(text: str) -> list[list[str]]:
    """Every `multilora …` of a page, in code blocks and between backticks, without comments and continuation marks."""
    text = text.replace("\\\n", " ")
    blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    inline = re.findall(r"(?<!`)`(multilora [^`]*)`(?!`)", text)
    lines = [line for line in blocks.splitlines() if line.startswith("multilora ")] + inline
    return [shlex.split(line, comments=True)[1:] for line in lines]


def complete(argv: list[str]) -> bool:
    """Not a mention of a verb, a flag, or with something left out."""
    return len(argv) > 1 and not any("…" in word or word == "|" for word in argv)


def test_the_readme_runs_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"TRACE": str(SAMPLE), **{f"NAME_{part}.csv": f"{MEASURED}{part}.csv" for part in ("requests", "steps")}}
    done, printed = set(), ""
    for argv in filter(complete, commands((ROOT / "README.md").read_text())):
        if any(word in NEEDS_A_GPU for word in argv):
            parser().parse_args(argv)
            continue
        run = [places.get(word, word) for word in argv]
        assert main(run) == 0, f"multilora {shlex.join(run)}: {capsys.readouterr().err}"
        out = capsys.readouterr().out
        printed, last = printed + out, out.strip().splitlines()[-1]
        assert argv[0] == "validate" or Path(last).exists()
        done.add(argv[0] if argv[0] != "workload" else argv[1])
        places |= {"RUN_DIR": last} if argv[0] == "run" else {}
    quotes = re.findall(r"“(best: [^”]*)”", (ROOT / "README.md").read_text())
    assert quotes
    for part in " … ".join(quotes).split("…"):
        assert " ".join(part.split()) in printed, "the README quotes what its command no longer prints"
    assert done == {
        "run", "measure", "sweep", "plan", "copies", "effects", "curve", "report", "validate", "describe", "fit", "convert",
    }  # fmt: skip


@pytest.mark.parametrize("page", sorted(p.name for p in (ROOT / "docs").glob("*.md")))
def test_flags_in_docs_exist(page: str) -> None:
    for argv in filter(complete, commands((ROOT / "docs" / page).read_text())):
        parser().parse_args(argv)
