"""The adapters of a scenario: made up by rank, or read from the user's own adapter folders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from backend.peft import adapter_folders, read_adapter
from sim.errors import ScenarioError
from workloads.adapters import TARGET_MODULES, Adapter, Catalogue
from workloads.build import NAMES_ITS_OWN

if TYPE_CHECKING:
    from backend.geometry import ModelGeometry
    from sim.scenario import Scenario
    from workloads.workload import Workload


def drawn_from(scenario: Scenario) -> int | None:
    """How many adapters the workload draws from: `adapters.count`, or those in `adapters.folder`; None: its own."""
    if scenario.adapter_folder is None:
        return scenario.adapter_count
    folders = adapter_folders(Path(scenario.adapter_folder))
    return None if scenario.workload.get("kind") in NAMES_ITS_OWN else len(folders)


def catalogue_of(scenario: Scenario, workload: Workload, geometry: ModelGeometry) -> Catalogue:
    """The adapters that the workload names, or draws by number: ranks in rotation, or what `adapters.folder` holds.

    From a folder only shapes are read. Raises `ScenarioError` for a name that is not there, `BackendError` for a
    malformed adapter.
    """
    names = enumerate(workload.adapter_names, start=1)
    if scenario.adapter_folder is None:
        modules, ranks = scenario.target_modules or TARGET_MODULES, scenario.ranks
        return Catalogue(tuple(Adapter(i, name, ranks[(i - 1) % len(ranks)], modules) for i, name in names))
    folders = {folder.name: folder for folder in adapter_folders(Path(scenario.adapter_folder))}
    if scenario.workload.get("kind") not in NAMES_ITS_OWN:
        names = enumerate(folders, start=1)
    adapters = []
    for i, name in names:
        if name not in folders:
            some = ", ".join(list(folders)[:3])
            raise ScenarioError(
                f"adapters.folder {scenario.adapter_folder}: no adapter {name!r}, which the workload names; it has {some}, …"
            )
        peft = read_adapter(folders[name], geometry)
        adapters.append(Adapter(i, name, peft.rank, peft.target_modules, str(peft.folder), peft.scaling))
    return Catalogue(tuple(adapters))


def pinned_ids(scenario: Scenario, catalogue: Catalogue) -> tuple[int, ...]:
    """Ids of the adapters that `adapters.pinned` names. Raises `ScenarioError` for a name that the workload lacks."""
    ids = {adapter.name: adapter.adapter_id for adapter in catalogue}
    for name in scenario.pinned:
        if name not in ids:
            some = ", ".join(list(ids)[:3])
            raise ScenarioError(f"adapters.pinned names {name!r}, which the workload does not have; it has {some}, …")
    return tuple(dict.fromkeys(ids[name] for name in scenario.pinned))
