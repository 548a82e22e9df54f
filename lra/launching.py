"""Owns what the suite must know of Hydra's launchers: where jobs run, what an engine needs, what goes wrong with it."""

import importlib.util
import os
import warnings
from dataclasses import dataclass

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

# The presets in conf/hydra/launcher/ have the names of the plugins' own files on purpose: those check their keys.
warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/\w+' is validated against ConfigStore schema")
# joblib replaces a worker whose memory has grown by 300 MB, as that of large cells does, and loses no job by it.
warnings.filterwarnings("ignore", message="A worker stopped while some jobs were given to the executor")


@dataclass(frozen=True)
class Launcher:
    """One engine. `package` is its Hydra plugin, `install` the command that brings it."""

    package: str
    install: str
    serial: bool = False  # jobs run one after another in the process of the command
    children_on_this_machine: bool = False  # jobs run in processes that the command started itself
    shared_folder: bool = True  # jobs may run elsewhere: results need a path that means the same there

    def complaints(self, config: DictConfig) -> list[str]:
        """What stands in the way of this grid, in readable lines."""
        if self.package and importlib.util.find_spec(self.package) is None:
            return [f"hydra/launcher needs a package that is not installed; run: {self.install}"]
        paths = {"paths.runs": config.paths.runs, "paths.datasets": config.paths.datasets}
        relative = [f"{key}={value}" for key, value in paths.items() if not os.path.isabs(value)]
        if relative and self.shared_folder:
            return [f"{', '.join(relative)}: jobs start in folders of their own; give absolute paths"]
        minutes = config.hydra.launcher.get("timeout_min")
        if "submitit" in self.package and minutes is not None and minutes < 60:
            return [
                f"hydra.launcher.timeout_min={minutes}: submitit takes a preempted job that was given less than 60 minutes "
                "for one that ran out of time; give 60 or more (budget_minutes stops a job earlier)"
            ]
        return []


_SERIAL = Launcher("", "", serial=True, shared_folder=False)
_SLURM = ".venv/bin/python -m pip install --require-hashes --no-deps -r requirements/slurm.txt"
_BY_MODULE = {
    "hydra_joblib_launcher": Launcher(
        "hydra_plugins.hydra_joblib_launcher", "make setup", children_on_this_machine=True, shared_folder=False
    ),
    "hydra_submitit_launcher": Launcher("hydra_plugins.hydra_submitit_launcher", _SLURM),
    "hydra_ray_launcher": Launcher(
        "hydra_plugins.hydra_ray_launcher",
        ".venv/bin/python -m pip install --require-hashes --no-deps -r requirements/ray.txt",
    ),
}


def is_launched_job() -> bool:
    """Whether this process does one cell of a grid for a command that runs in another process."""
    if not HydraConfig.initialized():
        return False
    config = HydraConfig.get()
    return config.mode == RunMode.MULTIRUN and "BasicLauncher" not in str(config.launcher._target_)


def shares_the_machine() -> bool:
    """Whether other cells of the grid run on this machine at the same time, with no engine that deals out GPUs."""
    return is_launched_job() and "hydra_joblib_launcher" in str(HydraConfig.get().launcher._target_)


def launcher_of(config: DictConfig) -> Launcher:
    """Of a grid's configuration. An engine that is not known here is taken for one that runs elsewhere."""
    target = str(config.hydra.launcher._target_)
    if "BasicLauncher" in target:
        return _SERIAL
    module = target.split(".")[1]
    return _BY_MODULE.get(module, Launcher("", ""))
