"""What the GPU's clocks did while something was measured, as `nvidia-smi` tells it."""

from __future__ import annotations

import statistics
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

QUERY = "clocks.sm,clocks_throttle_reasons.active,power.draw,temperature.gpu"

THROTTLES = {0x4: "power cap", 0x8: "hardware slowdown", 0x20: "thermal (software)", 0x40: "thermal (hardware)"}
"""Bits of NVML's clock event reasons that mean the GPU ran slower than it would."""


class Watch:
    """Filled when the watching ends: `facts` for a profile, `{"clocks": "not measured"}` where there is no `nvidia-smi`."""

    def __init__(self) -> None:
        self.facts: dict[str, object] = {"clocks": "not measured"}


@contextmanager
def watching(*, enabled: bool, every_ms: int = 500) -> Iterator[Watch]:
    """Sample the first GPU's clock, throttling, power and temperature while the body runs."""
    watch = Watch()
    command = ["nvidia-smi", "--id=0", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits", f"-lms={every_ms}"]
    try:
        process = (
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) if enabled else None
        )
    except OSError:
        process = None
    try:
        yield watch
    finally:
        if process is not None:
            process.terminate()
            output, _ = process.communicate()
            watch.facts = summary(output.splitlines())


def summary(lines: Sequence[str]) -> dict[str, object]:
    """Samples of `QUERY` in one line each to facts; lines that are not samples are passed over.

    `sm_clock_mhz` median and least, `power_w` median, `temperature_c` highest, `throttled`: share of the samples by cause.
    """
    samples = []
    for line in lines:
        parts = [part.strip() for part in line.split(",")]
        try:
            samples.append((float(parts[0]), int(parts[1], 16), float(parts[2]), float(parts[3])))
        except (ValueError, IndexError):
            continue
    if not samples:
        return {"clocks": "not measured"}
    clocks, reasons, powers, temperatures = zip(*samples, strict=True)
    throttled = {name: sum(bool(r & bit) for r in reasons) / len(samples) for bit, name in THROTTLES.items()}
    return {
        "clocks": {
            "samples": len(samples),
            "sm_clock_mhz": {"median": statistics.median(clocks), "least": min(clocks)},
            "power_w": statistics.median(powers),
            "temperature_c": max(temperatures),
            "throttled": {name: round(share, 3) for name, share in throttled.items() if share},
        }
    }
