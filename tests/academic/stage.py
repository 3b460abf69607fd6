"""Stages with a plug-in, as the loop meets them."""

from pathlib import Path
from typing import Any

from evertune.academic import plugins
from evertune.model.checkpoint import Checkpoint, describe
from evertune.recipe.plugins import Kind, Plugin
from evertune.train.material import load_material
from evertune.train.plugins import Bench
from evertune.train.spec import PluginSpec, RowsRef, SftSpec
from evertune.train.stage import Setting, make_accelerator, make_trainer, open_trained
from tests.train.stage import make_spec, open_workspace, write_rows

ALL: dict[str, tuple[Kind, Plugin]] = {
    "ewc": ("penalties", plugins.EWC),
    "online_ewc": ("penalties", plugins.ONLINE_EWC),
    "mas": ("penalties", plugins.MAS),
    "si": ("penalties", plugins.SI),
    "l2sp": ("penalties", plugins.L2SP),
    "lwf": ("penalties", plugins.LWF),
    "olora": ("penalties", plugins.OLORA),
    "agem": ("gradient_rules", plugins.AGEM),
    "gem": ("gradient_rules", plugins.GEM),
    "gpm": ("gradient_rules", plugins.GPM),
    "ogd": ("gradient_rules", plugins.OGD),
    "joint": ("gradient_rules", plugins.JOINT),
    "derpp": ("gradient_rules", plugins.DERPP),
    "inflora": ("gradient_rules", plugins.INFLORA),
    "osft": ("gradient_rules", plugins.OSFT),
    "packnet": ("gradient_rules", plugins.PACKNET),
    "progressive": ("gradient_rules", plugins.PROGRESSIVE),
    "copr": ("gradient_rules", plugins.COPR),
    "fast_slow": ("gradient_rules", plugins.FAST_SLOW),
    "dft": ("objective", plugins.DFT),
    "asft": ("objective", plugins.ASFT),
    "psft": ("objective", plugins.PSFT),
}


def memory_of(folder: Path) -> list[RowsRef]:
    """Rows of two earlier tasks."""
    return [
        write_rows(folder / "first.jsonl", 6, word="times", seed=5),
        write_rows(folder / "second.jsonl", 6, word="over", seed=9),
    ]


def plugin_spec(folder: Path, name: str, *, carried: Path | None = None, **options: Any) -> PluginSpec:
    """The order for one plug-in, with its defaults and these options."""
    kind, plugin = ALL[name]
    checked = plugin.options(**options)
    from evertune.hashing import digest_file

    return PluginSpec(
        kind=kind,
        name=name,
        method=plugin.method,
        make=plugin.make,
        version=plugin.version,
        options=checked.model_dump(mode="json"),
        memory=memory_of(folder) if hasattr(checked, "sources") else [],
        carried=str(carried) if carried else None,
        carried_digest=digest_file(carried) if carried else None,
    )


def spec_with(folder: Path, model: Path, name: str, options: dict[str, Any] | None = None, **changes: Any) -> SftSpec:
    """An 8-step stage with one plug-in, on an adapter where the method can be, and all weights where it cannot."""
    _, plugin = ALL[name]
    if "tune" not in changes and "lora" not in plugin.tunes:
        changes = {"tune": {"full": {}}, "lr": 1e-3, **changes}
    plug = plugin_spec(folder, name, carried=changes.pop("carried", None), **(options or {}))
    return make_spec(folder, model, plugins=[plug], **changes)


def bench_of(folder: Path, spec: SftSpec) -> Bench:
    """What the stage's plug-in is made from, with everything real."""
    accelerator = make_accelerator(device="cpu", track=[], logging_dir=folder)
    opened, trained = open_trained(spec, str(accelerator.device))
    material = load_material(spec, opened.codec, world_size=1)
    workspace = open_workspace(folder / "w")
    trainer = make_trainer(Setting(spec, opened, material, accelerator, workspace), trained, _lesson(spec))
    return Bench(spec, spec.plugins[0], trainer, opened, workspace)


def _lesson(spec: SftSpec) -> Any:
    from evertune.train.sft import _Supervised

    return _Supervised(spec)


def published(workspace: Any, spec: SftSpec) -> Checkpoint:
    return describe(workspace.path(spec.key))
