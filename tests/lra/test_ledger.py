"""Ledger and records: whole or absent, claimed by one, damaged ones named; identities are stable and exact."""

import dataclasses
import json
import multiprocessing
import os

import pytest
from hydra import compose, initialize_config_dir

from lra.identity import identity_of, run_id_of
from lra.ledger import Ledger, RunInProgress, read_records, write_atomically
from lra.records import RunRecord
from tests.conftest import ROOT

RECORD = RunRecord(
    run_id="abc", status="finished", experiment=None, task="text", attention="softmax", protocol="quick", seed=0,
    overrides=[], identity={"precision": "fp32"}, data={"stand_in": True, "dataset": "text-imdb20k"},
)  # fmt: skip


def composed(*overrides: str):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", overrides=list(overrides), return_hydra_config=True)


def identify(*overrides: str) -> str:
    from hydra.core.hydra_config import HydraConfig

    config = composed(*overrides)
    HydraConfig.instance().set_config(config)
    return run_id_of(identity_of(config))


def test_a_record_survives_the_way_to_disk_and_back(tmp_path):
    ledger = Ledger(tmp_path)
    assert ledger.find("abc") is None
    ledger.write(RECORD)
    assert ledger.find("abc") == RECORD


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        (RECORD.to_json().replace('"schema_version": 1', '"schema_version": 99'), "schema version 99"),
        (json.dumps({"schema_version": 1, "run_id": "abc"}), "missing fields"),
        (RECORD.to_json().replace('"seed"', '"sead"'), "unknown fields"),
    ],
)
def test_a_damaged_record_is_named_and_left_out(tmp_path, text, reason):
    ledger = Ledger(tmp_path)
    ledger.write(dataclasses.replace(RECORD, run_id="good"))
    ledger.path("abc").write_text(text)
    records, damaged = ledger.read_all()
    assert [record.run_id for record in records] == ["good"]
    assert len(damaged) == 1 and "abc.json" in damaged[0] and reason in damaged[0]
    with pytest.raises(ValueError, match="Delete the file to run this cell again"):
        ledger.find("abc")


def test_a_number_that_is_no_number_never_enters_a_record():
    with pytest.raises(ValueError, match="JSON compliant"):
        dataclasses.replace(RECORD, result={"loss": float("nan")}).to_json()


def test_a_write_that_fails_leaves_the_old_content_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_atomically(path, b"old")

    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [item.name for item in tmp_path.iterdir()] == ["x.json"]


def test_two_processes_cannot_own_one_run(tmp_path):
    ledger = Ledger(tmp_path)
    with ledger.claim("abc"), pytest.raises(RunInProgress, match=f"process {os.getpid()}"), ledger.claim("abc"):
        pass
    with ledger.claim("abc"):
        pass


def _write_many(folder, place):
    ledger = Ledger(folder)
    for number in range(20):
        ledger.write(dataclasses.replace(RECORD, run_id=f"{number:03d}", seed=place))


def test_many_writers_never_leave_half_a_record(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_write_many, args=(tmp_path, place)) for place in range(4)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        assert read_records(tmp_path / "ledger")[1] == []
    for worker in workers:
        worker.join()
    records, damaged = Ledger(tmp_path).read_all()
    assert (len(records), damaged) == (20, [])


def test_identity_ignores_where_and_how_a_run_is_watched():
    plain = identify()
    for same in (
        "paths.runs=/x",
        "paths.datasets=/x",
        "tracking=disabled",
        "device=cpu",
        "threads=1",
        "experiment=quick",
    ):
        assert identify(same) == plain, same


def test_identity_sees_everything_that_changes_a_number():
    seen = {
        identify(*overrides)
        for overrides in (
            [], ["seed=1"], ["precision=bf16"], ["attention=performer"], ["task=image"], ["protocol=schoenbat"],
            ["protocol.num_steps=7"], ["task.brackets=none"], ["model.dropout=0.2"], ["per_task.listops.batch_size=8"],
        )
    }  # fmt: skip
    assert len(seen) == 10


def test_identity_does_not_depend_on_other_tasks_numbers():
    assert identify("per_task.image.batch_size=8") == identify()


def test_variants_of_one_attention_get_labels_of_their_own():
    assert RECORD.label == "softmax"
    variant = dataclasses.replace(RECORD, overrides=["attention.dropout=0.1", "threads=1"])
    assert variant.label == "softmax (attention.dropout=0.1)"


def test_a_stand_in_is_named_wherever_its_task_is():
    assert RECORD.dataset == "text (stand-in: text-imdb20k)"
