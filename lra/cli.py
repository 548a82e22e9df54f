"""Owns the way from the command line to a job, and of an error to a person: what, where, what to do; exit code 1."""

import difflib
import errno
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from hydra.errors import HydraException, InstantiationException
from hydra.utils import get_method
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

import lra.launching  # noqa: F401 (quietens Hydra before it composes, here and in the jobs of a launcher)
from lra import ranks
from lra.stopping import Stopped, stop
from lra.targets import refuse_foreign_targets


def hand_over(config: DictConfig) -> float | None:
    """Call the job that the configuration names."""
    stop.listen(_budget(config))
    refuse_foreign_targets(config)
    for key, least in (("seed", 0), ("threads", 1), ("devices", 1), ("num_nodes", 1)):
        if type(config[key]) is not int or config[key] < least:
            raise ValueError(f"{key}={config[key]} must be a whole number of at least {least}")
    if config.precision not in ("fp32", "bf16"):
        raise ValueError(f"unknown precision={config.precision!r}; choose fp32 or bf16")
    if config.devices * config.num_nodes > 1 and config.job._target_ != "lra.experiment.train":
        raise ValueError(
            f"devices={config.devices} num_nodes={config.num_nodes}: several devices are for job=train alone; leave both out"
        )
    return get_method(config.job._target_)(config)


def _budget(config: DictConfig) -> float | None:
    minutes = config.budget_minutes
    if minutes is not None and (type(minutes) not in (int, float) or not 0 < minutes < float("inf")):
        raise ValueError(f"budget_minutes={minutes} must be a number above 0, or null for no limit")
    return minutes


def explained(main: Callable[[], object], conf: Path) -> int:
    """Run `main`; turn every failure into exit code 1 and, where the user can mend it, into a few readable lines.
    LRA_TRACEBACK=1 shows where an error came from. A stop that was asked for has exit codes of its own (lra.stopping)."""
    sys.argv[1:] = [_listed(item) for item in sys.argv[1:]]
    try:
        main()
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else 1
    except KeyboardInterrupt:
        if ranks.speaks():
            print("\nstopped; type the same command again to go on from the last checkpoint", file=sys.stderr)
        return 130
    except Exception as error:
        grid_code = _finish_grid(error)
        if grid_code is not None:
            return grid_code
        if isinstance(error, Stopped):
            if ranks.speaks():
                print(f"{error}; type the same command again to go on", file=sys.stderr)
            return error.exit_code
        tell(error, conf)
        return 1
    return 0


def tell(error: Exception, conf: Path) -> None:
    """What went wrong, for a person; where it went wrong only if the person cannot mend it."""
    if os.environ.get("LRA_TRACEBACK") == "1" or not _is_for_the_user(error):
        print(ranks.who(), end="", file=sys.stderr)
        traceback.print_exception(error)
    else:
        print(f"error: {ranks.who()}{_message(error, conf)}", file=sys.stderr)


def _listed(item: str) -> str:
    """runs=a,b means the list of both, as text: Hydra reads a plain comma as two jobs, and the id 951e88 as a number."""
    key, _, value = item.partition("=")
    if key != "runs":
        return item
    names = [part.strip(" '") for part in value.strip("[]").split(",")]
    return f"runs=[{','.join(repr(name) for name in names if name)}]"


def _finish_grid(error: Exception) -> int | None:
    """When a cell of a grid failed the others have run: render what there is, list the failures; the grid's exit code."""
    grid = sys.modules.get("lra.grid")
    return None if grid is None else grid.finish_grid(error)


def _is_for_the_user(error: BaseException) -> bool:
    from lra.distributed import RankFailed, RankLost
    from lra.ledger import RunInProgress
    from lra.training import Diverged

    if isinstance(error, TypeError):
        return re.search(r"__init__\(\) (got an unexpected keyword|missing \d+ required)", str(error)) is not None
    of_the_run = RunInProgress | Diverged | ranks.RanksFailed | RankFailed | RankLost
    return isinstance(error, HydraException | OmegaConfBaseException | ValueError | OSError | of_the_run)


def _message(error: BaseException, conf: Path) -> str:
    text, cause = str(error).strip(), error.__cause__
    if isinstance(error, InstantiationException) and cause is not None:
        where = re.search(r"full_key: (\S+)", text)
        return f"{cause}" + (f" (config node `{where.group(1)}`)" if where else "")
    if isinstance(error, HydraException) and cause is not None:
        text = f"{text}\n{cause}"
    if isinstance(error, OSError) and not isinstance(error, HydraException):
        return text + _advice_on_files(error)
    return text.split("\nConfig search path:")[0] + _advice(text, conf)


def _advice_on_files(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "\nThere is no room for it. Make room and type the same command again: what is finished is kept."
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return "\nIt may not be written or read here. Name other folders: LRA_RUNS and LRA_DATASETS, or paths.runs= and paths.datasets=."
    return ""


def _advice(text: str, conf: Path) -> str:
    """Name the choices where Hydra does not: unknown keys, and protocols without numbers for a task."""
    if "Could not override 'projection@" in text:
        return "\nThis attention has no projection there, and appending one is no way: choose one with random features."
    choice = re.search(r"Could not find '(\w+)/([\w-]+)'", text)
    if choice:
        close = difflib.get_close_matches(choice.group(2), re.findall(r"^\t([\w-]+)$", text, re.M), n=1)
        return f"\nDid you mean {choice.group(1)}={close[0]}?" if close else ""
    unknown = re.search(r"[Kk]ey '([^']+)' (?:is )?not in (?:struct|')", text)
    if unknown:
        typed = re.search(r"Could not override '([^']+)'", text)
        return _known_keys(typed.group(1) if typed else unknown.group(1), conf)
    missing = re.search(r"Interpolation key 'per_task\.(\w+)\.(\w+)' not found", text)
    if missing:
        return (
            f"\nThis protocol states no {missing.group(2)} for task {missing.group(1)}. "
            f"Give it: +per_task.{missing.group(1)}.{missing.group(2)}=<value>, or choose another protocol."
        )
    return ""


def _known_keys(key: str, conf: Path) -> str:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    choices = [item for item in sys.argv[1:] if re.fullmatch(r"(task|attention|model|protocol|job)=[\w-]+", item)]
    try:
        with initialize_config_dir(str(conf), version_base="1.3"):
            node = compose("config", overrides=choices)
    except Exception:
        return ""
    parents, _, leaf = key.rpartition(".")
    for part in filter(None, parents.split(".")):
        if not isinstance(node, DictConfig) or part not in node:
            break
        node = node[part]
    known = sorted(str(item) for item in node if not str(item).startswith("_")) if isinstance(node, DictConfig) else []
    close = difflib.get_close_matches(leaf, known, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    return f"\nKnown keys{f' of {parents}' if parents else ''}: {', '.join(known)}.{hint}"
