"""Code that papers released, beside ours: imported from a checkout under its own names, timed, and put aside again."""

import json
import textwrap

PEER = {  # the shape of the authors' repositories, in a few lines of our own
    "config.py": "Config = {'lra-text': {'model': {'vocab_size': 300, 'dim': 8}, 'extra_attn_config': {'rmfa': {'nb_features': 4}}}}",
    "models/__init__.py": "",
    "models/model_LRA.py": """
        import torch
        from models.dataset_LRA import LRADataset
        class ModelForSC(torch.nn.Module):
            def __init__(self, config):
                super().__init__()
                assert config["device"] == "cpu" and config["former"] in ("transformer", "maclauformer")
                self.embedding, self.head = torch.nn.Embedding(config["vocab_size"], config["dim"]), torch.nn.Linear(config["dim"], 2)
            def forward(self, input_ids_0, mask_0, label):
                logits = self.head(self.embedding(input_ids_0).mean(dim=1))
                return {"loss": torch.nn.functional.cross_entropy(logits, label)}
    """,
    "main.py": """
        from torch.utils.tensorboard import SummaryWriter
        def step_LRA(model, optimizer, lr_scheduler, ds_iter, scaler, accumu_steps, init_t, summary, component, step_idx):
            _, batch = next(ds_iter[component])
            loss = model(**{key: value.cuda() for key, value in batch.items()})["loss"]
            optimizer.zero_grad(); loss.backward(); optimizer.step(); lr_scheduler.step()
    """,
}
SMALL = (
    "job=benchmark", "benchmark=peers", "threads=1", "benchmark.peer_step={length: 32, batch_size: 2, repetitions: 1}",
    "benchmark.peers.schoenbat.layer=false",
)  # fmt: skip


def test_a_released_loop_runs_beside_ours(run_cli, tmp_path):
    for name in ("one", "two"):
        for path, text in PEER.items():
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_text(textwrap.dedent(text))
    paths = [
        f"benchmark.peers.{peer}.path={tmp_path / name}" for peer, name in (("schoenbat", "one"), ("skyformer", "two"))
    ]
    done = run_cli(*SMALL, *paths, "benchmark.peers.skyformer.root=.", "~benchmark.peers.skyformer.pairs",
                   "+benchmark.peers.skyformer.pairs={softmax: {ours: softmax, model: {former: transformer}}}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads(next((tmp_path / "runs" / "benchmark").glob("*.json")).read_text())
    assert [figure["figure"] for figure in record["figures"]] == [
        "training step, schoenbat's softmax over our softmax",
        "training step, schoenbat's rmfa over our schoenbat_exp",
        "training step, skyformer's softmax over our softmax",
    ]
    assert all(figure["value"] > 0 for figure in record["figures"])


def test_a_missing_checkout_is_asked_for(run_cli, tmp_path):
    done = run_cli(*SMALL)
    assert done.returncode == 1 and "git clone https://github.com/1911416-GuoYuhan/SchoenbAt <folder>" in done.stderr
    done = run_cli(*SMALL, f"benchmark.peers.schoenbat.path={tmp_path}")
    assert done.returncode == 1 and "main.py is not there" in done.stderr
