"""Choices of files on the command line: all of a folder, and projections, which no table may confuse."""

import hydra

from lra.grid import grid_of
from tests.conftest import ROOT
from tests.lra.test_cli import TINY


def test_two_projections_are_two_rows(run_cli, tmp_path):
    choice = "projection@attention.feature_map.projection"
    done = run_cli("-m", *TINY, "attention=performer", f"{choice}=orf,qmc", "tracking=disabled")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "ledger"
    assert len(list(folder.glob("*.json"))) == 2
    rendered = run_cli("job=report", "tracking=disabled")
    for name in ("orf", "qmc"):
        assert f"performer ({choice}={name})" in rendered.stdout


def test_every_projection_has_a_file_that_says_what_it_is():
    for path in (ROOT / "conf" / "projection").glob("*.yaml"):
        assert path.read_text().startswith("# "), path


def test_a_glob_is_every_file_of_the_folder():
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cells = grid_of(None, ["attention=glob(*)", "protocol=quick", "task=listops"])
    names = {path.stem for path in (ROOT / "conf" / "attention").glob("*.yaml")}
    assert {cell[0] for cell in cells} == {f"attention={name}" for name in names}
    assert len(cells) == len(names) and all(cell[1:] == ["protocol=quick", "task=listops"] for cell in cells)
