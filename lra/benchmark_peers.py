"""Owns the benchmark against code that papers released: their training step and their layer beside ours, in one process.

Their code is no part of this suite: the user checks it out and names the folder. It is imported under its own names
(`models`, `config`), which are then put aside. What it needs and a benchmark does not (tensorboard, data files) is
replaced by empty modules, and on a CPU its `.cuda()` calls do nothing.
"""

import importlib
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn

from data.base import Batch
from lra.benchmark_timing import OutOfMemory, figure, interleaved, memory_limit, ratio
from lra.display import say
from lra.grid import compose_cell
from lra.protocol import Protocol
from lra.seeding import derive_seed
from lra.training import TrainStep, build_optimizer

Rows = list[dict[str, Any]]
_THEIRS = ("models", "config", "utils", "main")


def measure_peers(config: DictConfig, device: torch.device) -> tuple[Rows, Rows]:
    """Rows and figures: for every peer and pair of attentions theirs/ours of a training step, and of the released layer."""
    rows, figures = [], []
    for name, peer in config.benchmark.peers.items():
        if peer.path is None:
            raise ValueError(
                f"benchmark.peers.{name}.path is not set: `git clone {peer.source} <folder>`, `git -C <folder> checkout "
                f"{peer.commit}`, then benchmark.peers.{name}.path=<folder>"
            )
        root = Path(peer.path).expanduser() / peer.root
        if not (root / "main.py").is_file():
            raise ValueError(
                f"{root / 'main.py'} is not there; benchmark.peers.{name}.path names a checkout of {peer.source}"
            )
        commit = _commit(Path(peer.path).expanduser())
        for theirs, pair in peer.pairs.items():
            say(f"peers: training step of {name}'s {theirs} and of {pair.ours}")
            more_rows, more = _steps(config, root, (name, commit), theirs, pair, device)
            rows, figures = rows + more_rows, figures + more
        if peer.layer:
            more_rows, more = _layers(config, root, (name, commit), device)
            rows, figures = rows + more_rows, figures + more
    return rows, figures


def _steps(
    config: DictConfig, root: Path, origin: tuple[str, str], attention: str, pair: DictConfig, device: torch.device
) -> tuple[Rows, Rows]:
    """Both training loops' step on the same tokens: gradients, clipping, optimiser, schedule, and what else each does."""
    settings = config.benchmark.peer_step
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "measure"))
    tokens = torch.randint(1, 250, (settings.batch_size, settings.length), generator=generator)
    labels = torch.randint(0, 2, (settings.batch_size,), generator=generator)
    works = {
        "theirs": _their_step(root, attention, dict(pair.model), tokens, labels, device),
        "ours": _our_step(pair.ours, tokens, labels, config, device),
    }
    times = interleaved(works, warmup=1, repetitions=settings.repetitions, device=device)
    shape = {"part": "peers", "pass": "train step", "length": settings.length, "batch_size": settings.batch_size}
    rows = [
        {**shape, "subject": f"{origin[0]} {attention} / {pair.ours}: {side}", **t.summary()}
        for side, t in times.items()
    ]
    note = f"L={settings.length}, batch {settings.batch_size}, commit {origin[1]}"
    name = f"training step, {origin[0]}'s {attention} over our {pair.ours}"
    return rows, [figure(name, ratio(times["theirs"], times["ours"]), better="higher", reach=None, note=note)]


def _their_step(
    root: Path, attention: str, model: dict[str, Any], tokens: Tensor, labels: Tensor, device: torch.device
) -> Callable[[], object]:
    with _their_modules(root):
        settings = importlib.import_module("config")
        network_class = importlib.import_module("models.model_LRA").ModelForSC
        loop: dict[str, Any] = {"__name__": "theirs"}
        exec(compile((root / "main.py").read_text(), "main.py", "exec"), loop)
        shape = dict(settings.Config["lra-text"]["model"])
        extra = dict(settings.Config["lra-text"]["extra_attn_config"].get(attention, {}))
        shape |= (
            extra
            | {"max_seq_len": tokens.shape[1], "mixed_precision": False, "attn_type": attention, "device": str(device)}
            | model
        )
        _move_defaults(device)
        network: nn.Module = network_class(shape).to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.9, 0.999), eps=1e-6, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1e-4, pct_start=0.1, anneal_strategy="linear", total_steps=100_000
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scaler = torch.cuda.amp.GradScaler(enabled=False)
    summary = {"train": {"t": 0, "loss": [], "accu": []}}

    def batches() -> Iterator[tuple[int, dict[str, Tensor]]]:
        while True:
            yield 0, {"input_ids_0": tokens.clone(), "mask_0": torch.ones(tokens.shape), "label": labels.clone()}

    source = {"train": batches()}
    place = {"device": str(device)} if "device" in loop["step_LRA"].__code__.co_varnames else {}

    def step() -> object:
        with _cuda_is_nothing(device), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return loop["step_LRA"](network, optimizer, schedule, source, scaler, 1, 0.0, summary, "train", 1, **place)

    return step


def _our_step(
    name: str, tokens: Tensor, labels: Tensor, config: DictConfig, device: torch.device
) -> Callable[[], object]:
    cell = compose_cell(["task=text", "protocol=skyformer", f"attention={name}"])
    model: nn.Module = instantiate(config.model)(
        instantiate(cell.attention), seed=derive_seed(config.seed, "model"), max_len=tokens.shape[1],
        **config.benchmark.scaling.facts,
    ).to(device)  # fmt: skip
    protocol: Protocol = instantiate(cell.protocol)
    optimizer, schedule = build_optimizer(model, protocol)
    step = TrainStep(model.train(), optimizer, schedule, protocol, device=device, precision=config.precision)
    batch = Batch(tokens[:, None], None, labels)
    return lambda: step(batch.to(device))


def _layers(config: DictConfig, root: Path, origin: tuple[str, str], device: torch.device) -> tuple[Rows, Rows]:
    """ppSBN and random features as released, causal (its only form) and with its features in two products, over ours."""
    settings = config.benchmark.peer_layer
    rows, figures = [], []
    for length in settings.lengths:
        say(f"peers: layer of {origin[0]} at L={length}")
        try:
            with memory_limit(settings.memory_limit_gib, device):
                works = _layer_works(config, root, length, device)
                times = interleaved(works, warmup=1, repetitions=settings.repetitions, device=device)
        except OutOfMemory:
            note = f"their form needs more than {settings.memory_limit_gib} GiB"
            name = f"layer forward at L={length}, released code over ours"
            figures.append(figure(name, None, better="higher", reach=None, note=note))
            continue
        shape = {"part": "peers", "pass": "forward", "length": length, "batch_size": settings.batch_size}
        rows += [{**shape, "subject": f"{origin[0]} layer: {side}", **t.summary()} for side, t in times.items()]
        note = f"batch {settings.batch_size}, commit {origin[1]}"
        for side in ("causal", "bidirectional"):
            name = f"layer forward at L={length}, released code ({side}) over ours"
            measured = ratio(times[side], times["ours"])
            figures.append(figure(name, measured, better="higher", reach=None, note=note))
    return rows, figures


def _layer_works(config: DictConfig, root: Path, length: int, device: torch.device) -> dict[str, Callable[[], Tensor]]:
    layer = config.benchmark.layer
    with _their_modules(root):
        released = importlib.import_module("models.attention_rmfa").RMFA
        regularizers = importlib.import_module("models.ppSBN")
        facts = {"attention_dropout": 0.0, "head_dim": layer.head_dim, "nb_features": 128, "dotf": "exp"}
        theirs = released(facts, device=str(device))
        pre, post = regularizers.PreSBN(), regularizers.PostSBN(layer.head_dim).to(device)
    generator = torch.Generator().manual_seed(config.seed)
    shape = (config.benchmark.peer_layer.batch_size, length, layer.num_heads, layer.head_dim)
    q, k, v = (torch.randn(shape, generator=generator).to(device).transpose(1, 2) for _ in range(3))
    mask = torch.ones(shape[0], length, device=device)
    head_shape = instantiate(config.benchmark.head_shape)(
        num_heads=layer.num_heads, head_dim=layer.head_dim, max_len=length
    )
    ours = instantiate(compose_cell(["attention=schoenbat_exp"]).attention)(head_shape, generator).to(device)

    @torch.no_grad()
    def causal() -> Tensor:
        return post(theirs(pre(q), pre(k), v, mask))

    @torch.no_grad()
    def bidirectional() -> Tensor:
        x, y = (theirs.Maclaurin_projector.proj(pre(t) * layer.head_dim**-0.25) for t in (q, k))
        sums = x @ y.sum(dim=2, keepdim=True).transpose(-2, -1)
        return post(x @ (y.transpose(-2, -1) @ v) / sums)

    @torch.no_grad()
    def own() -> Tensor:
        return ours(q, k, v)

    return {"causal": causal, "bidirectional": bidirectional, "ours": own}


@contextmanager
def _their_modules(root: Path) -> Iterator[None]:
    """Imports find their packages, ours are put aside, and afterwards it is the other way round."""

    def is_theirs(name: str) -> bool:
        return name.partition(".")[0] in _THEIRS

    ours = {name: sys.modules.pop(name) for name in list(sys.modules) if is_theirs(name)}
    boards, dataset = types.ModuleType("torch.utils.tensorboard"), types.ModuleType("models.dataset_LRA")
    boards.SummaryWriter = dataset.LRADataset = object  # type: ignore[attr-defined]
    known = sys.modules.get("torch.utils.tensorboard")
    sys.modules |= {"torch.utils.tensorboard": boards, "models.dataset_LRA": dataset}
    sys.path.insert(0, str(root))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.path.remove(str(root))
        for name in [name for name in sys.modules if is_theirs(name)]:
            del sys.modules[name]
        sys.modules |= ours
        if known is None:
            del sys.modules["torch.utils.tensorboard"]
        else:
            sys.modules["torch.utils.tensorboard"] = known


def _move_defaults(device: torch.device) -> None:
    """Their classes take the device as an argument, cuda:0 unless told, and their model never tells."""
    with suppress(ImportError):  # imported when a model is built, that is too late
        importlib.import_module("models.attention_rmfa")
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in _THEIRS:
            for thing in vars(module).values():
                init = getattr(thing, "__init__", None) if isinstance(thing, type) else None
                if "cuda:0" in (getattr(init, "__defaults__", None) or ()):
                    init.__defaults__ = tuple(str(device) if x == "cuda:0" else x for x in init.__defaults__)


@contextmanager
def _cuda_is_nothing(device: torch.device) -> Iterator[None]:
    if device.type == "cuda":
        yield
        return
    original = Tensor.cuda
    Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    try:
        yield
    finally:
        Tensor.cuda = original  # type: ignore[method-assign]


def _commit(folder: Path) -> str:
    done = subprocess.run(["git", "-C", str(folder), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown (no git checkout)"
