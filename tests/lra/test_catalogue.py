"""The committed catalogue is what the configurations say."""

from tests.conftest import ROOT


def test_the_committed_catalogue_is_up_to_date(run_cli, tmp_path):
    fresh = tmp_path / "README.md"
    done = run_cli("job=catalogue", f"catalogue.path={fresh}", "tracking=disabled")
    assert done.returncode == 0, done.stderr
    committed = (ROOT / "attention" / "README.md").read_text()
    assert fresh.read_text() == committed, "run `python run.py job=catalogue` and commit attention/README.md"
