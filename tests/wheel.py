"""Build the wheel, install it outside the checkout, and run the demo from there: data and profiles must be inside."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from sim import compiled_inputs

ROOT = Path(__file__).parents[1]


def run(*command: str, cwd: Path) -> None:
    subprocess.run(command, cwd=cwd, check=True)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="wheel-") as name:
        place = Path(name)
        # Through a source distribution: a wheel made in the checkout would also pack what an old build/ still holds.
        run(sys.executable, "-m", "build", "--outdir", str(place), str(ROOT), cwd=place)
        run(sys.executable, "-m", "venv", "venv", cwd=place)
        python = place / "venv" / "bin" / "python"
        wheel = next(place.glob("*.whl"))
        run(str(python), "-m", "pip", "install", "-q", "--no-deps", str(wheel), cwd=place)
        # The dependencies of the checkout's environment serve here too; its editable install must not.
        site = next((place / "venv").glob("lib/python*/site-packages"))
        (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        check = f"import sim, backend, workloads; assert all({str(place)!r} in m.__file__ for m in (sim, backend, workloads))"
        run(str(python), "-c", check, cwd=place)
        # Where the checkout was built with a C++ compiler the wheel must be; without one both go step by step.
        same = f"from sim import compiled_inputs; assert (compiled_inputs._native is None) is {compiled_inputs._native is None}"
        run(str(python), "-c", same, cwd=place)
        run(str(python), "-c", "from backend.sgmv import nvrtc; assert b'shrink' in nvrtc.source()", cwd=place)
        run(str(place / "venv" / "bin" / "multilora"), "run", "demo-servegen", "--duration-s", "60", cwd=place)


if __name__ == "__main__":
    main()
