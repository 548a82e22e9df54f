"""The one entry: compose the configuration, hand it to the job that it names.

python run.py task=listops attention=schoenbat_exp protocol=schoenbat seed=1
python run.py -m task=listops,text attention=softmax,schoenbat_exp seed=0,1,2
python run.py experiment=accuracy
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
os.environ.setdefault("LRA_ROOT", str(ROOT))
os.environ.setdefault("PYTHONSAFEPATH", "1")  # jobs that a launcher starts must not import a `data` folder of their own
os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach lra.cli, which explains them

import hydra
from omegaconf import DictConfig

from lra.cli import explained, hand_over


@hydra.main(config_path="conf", config_name="config", version_base="1.3")
def main(config: DictConfig) -> float | None:
    return hand_over(config)


if __name__ == "__main__":
    sys.exit(explained(main, ROOT / "conf"))
