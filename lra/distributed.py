"""Owns one run over several ranks: its process group, the shares of a batch, sums over ranks, and how all end together.

Every rank builds the same seeded model and makes the same global batch, for batch i depends on (seed, i) alone; it computes
on its share, and gradients are summed before they are clipped. So the weights stay equal, and equal to those of one device
up to the order of additions. Three things do depend on the number of ranks, and differ statistically, not systematically:
dropout (rank 0 has the stream of one device, each other rank one of its own per step, from seed, rank and step), draws of a
mechanism in training, and statistics over a batch (`regularizers.BatchPreSBN`), which are those of a rank's share, as with
`protocol.micro_batches` they are those of a part.

Rank 0 alone holds the claim, validates, tests, measures and writes. The others wait for it by asking the rendezvous's
store now and then, not in a collective: a wait has no time limit, hears signals, and learns how the run ended.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from data.base import Batch
from lra.ranks import Place
from lra.stopping import Stop, Stopped

_PATIENCE = timedelta(minutes=30)  # in a collective: the slowest rank's step, or its checkpoint on a slow disk
_FAREWELL = 5.0  # seconds that a rank gives the others to hear how the run ended
_GLANCE = 0.1


class LeaderEnded(BaseException):
    """To ranks other than 0: the run is over, with this exit code. No error of this rank, so no Exception."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


class RankFailed(RuntimeError):
    """To rank 0: another rank failed, and said why."""


class RankLost(RuntimeError):
    """Another rank went without a word: killed, or its machine is gone. Not a result of the run, which can go on."""


class World:
    """The ranks of one run. Of size 1 it is one device: nothing is shared, summed or waited for."""

    def __init__(self, place: Place, store: distributed.Store | None = None, backend: str | None = None) -> None:
        self.rank, self.size, self.num_nodes = place.rank, place.size, place.num_nodes
        self.backend = backend
        self._store: Any = store
        self._announced = 0

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def describe(self) -> dict[str, Any]:
        """For a record: what trained, and on how many devices `efficiency` was measured."""
        return {
            "world_size": self.size, "num_nodes": self.num_nodes, "devices": self.size // self.num_nodes,
            "backend": self.backend, "efficiency_devices": 1,
        }  # fmt: skip

    def share(self, batch: Batch) -> Batch:
        """This rank's examples, in order; shares differ by one at most. The padding is that of the whole batch."""
        if self.size == 1:
            return batch
        first, last = (len(batch.labels) * rank // self.size for rank in (self.rank, self.rank + 1))
        mask = batch.key_padding_mask
        return Batch(batch.tokens[first:last], None if mask is None else mask[first:last], batch.labels[first:last])

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks. One message: the models of the arena are a few megabytes."""
        if self.size == 1:
            return
        bucket = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with self._with_peers():
            distributed.all_reduce(bucket)
        for tensor, part in zip(tensors, bucket.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def heed(self, stop: Stop, save: Callable[[], None]) -> None:
        """`stop.point` for all ranks at once: when one was asked to stop, rank 0 saves, and all end at this very step.
        Rank 0 calls a launcher's handler; where that returns, all go on."""
        if self.size == 1:
            stop.point(save)
            return
        wish = torch.tensor(stop.exit_code)
        with self._with_peers():
            distributed.all_reduce(wish, distributed.ReduceOp.MAX)
        if not wish:
            return
        if self.leads:
            stop.adopt(int(wish))
            stop.point(save)
        else:
            stop.forget()
        self.follow()

    def follow(self) -> None:
        """Rank 0 says that it got here; the others wait for that. They leave (LeaderEnded) when the run ends instead."""
        if self.size == 1:
            return
        self._announced += 1
        if self.leads:
            self._store.set(f"announced/{self._announced}", b"")
        else:
            self._await(f"announced/{self._announced}")

    def compare(self, facts: dict[str, Any], advice: str) -> None:
        """Raises ValueError with `advice` on every rank unless all state the same facts."""
        if self.size == 1:
            return
        self._announced += 1
        keys = [f"facts/{self._announced}/{rank}" for rank in range(self.size)]
        self._store.set(keys[self.rank], json.dumps(facts, sort_keys=True))
        for rank, key in enumerate(keys):
            self._await(key)
            theirs = json.loads(self._store.get(key))
            for name in facts:
                if theirs[name] != facts[name]:
                    raise ValueError(f"{name}: {facts[name]} here, {theirs[name]} on rank {rank}; {advice}")

    def await_end(self) -> None:
        """Ranks other than 0: raises LeaderEnded when rank 0 is through."""
        self._await("never")

    def _await(self, key: str) -> None:
        try:
            while not self._store.check([key]):
                self._raise_if_ended()
                time.sleep(_GLANCE)
        except RuntimeError as error:
            if isinstance(error, RankFailed):
                raise
            raise self._loss(error) from error

    def _raise_if_ended(self) -> None:
        if not self._store.check(["end"]):
            return
        end = json.loads(self._store.get("end"))
        if not self.leads:
            raise LeaderEnded(end["exit_code"])
        if end["exit_code"] != 1:
            raise Stopped(f"rank {end['rank']} was {end['reason']}", end["exit_code"])
        raise RankFailed(f"rank {end['rank']} of {self.size} failed: {end['reason']}")

    @contextmanager
    def _with_peers(self) -> Iterator[None]:
        """A collective fails when a rank is gone: tell how the run ended, not how the connection did."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            limit = time.monotonic() + 1  # a rank that can, says why before it goes
            with suppress(distributed.DistError):  # the store is gone with rank 0
                while time.monotonic() < limit:
                    self._raise_if_ended()
                    time.sleep(_GLANCE)
            raise self._loss(error) from error

    def _loss(self, error: Exception) -> RankLost:
        return RankLost(
            f"another rank of this run is gone (killed, or its machine lost; {str(error).strip().splitlines()[0]}). "
            "Type the same command again to go on from the last checkpoint."
        )

    def leave(self, error: BaseException | None) -> None:
        """Let the others know how this rank ended, and give them the time to hear it."""
        if self.size == 1:
            return
        code = _exit_code(error)
        end = {"rank": self.rank, "reason": _reason(error), "exit_code": code}
        with suppress(distributed.DistError, RuntimeError):
            if self.leads or not isinstance(error, LeaderEnded | None):
                self._store.compare_set("end", "", json.dumps(end))
            self._store.set(f"left/{self.rank}", b"")
            # a rank that waits in a collective hears of it by this; nccl may hang here, and is ended with the process
            if code == 0 or self.backend == "gloo":
                distributed.destroy_process_group()
            if isinstance(error, RankLost | LeaderEnded):
                return  # nobody to wait for
            awaited = [f"left/{rank}" for rank in (range(1, self.size) if self.leads else (0,))]
            limit = time.monotonic() + _FAREWELL
            while not self._store.check(awaited) and time.monotonic() < limit:
                time.sleep(_GLANCE)


ALONE = World(Place())


@contextmanager
def joined(place: Place, device: torch.device) -> Iterator[World]:
    """The world of this process. Ranks other than 0 leave the block quietly when rank 0 ends well, and with its exit code
    (SystemExit) when it does not: rank 0 has said why."""
    if place.size == 1:
        yield ALONE
        return
    store, _, _ = next(distributed.rendezvous("env://", place.rank, place.size, timeout=_PATIENCE))
    store = distributed.PrefixStore("lra", store)
    # gloo carries what the ranks agree on; on GPUs nccl carries the gradients
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(
        backend,
        store=distributed.PrefixStore("group", store),
        rank=place.rank,
        world_size=place.size,
        timeout=_PATIENCE,
    )
    world = World(place, store, backend)
    try:
        yield world
    except LeaderEnded as ended:
        world.leave(ended)
        if ended.exit_code:
            time.sleep(_FAREWELL / 2)  # torchrun ends all ranks when the first fails: let rank 0 say why
            raise SystemExit(ended.exit_code) from None
    except BaseException as error:
        world.leave(error)
        raise
    else:
        world.leave(None)


def _reason(error: BaseException | None) -> str:
    return str(error) if error is None or isinstance(error, Stopped) else f"{type(error).__name__}: {error}".strip()


def _exit_code(error: BaseException | None) -> int:
    if error is None:
        return 0
    if isinstance(error, Stopped | LeaderEnded):
        return error.exit_code
    if isinstance(error, SystemExit):
        return error.code & 255 if isinstance(error.code, int) else int(error.code is not None)
    return 130 if isinstance(error, KeyboardInterrupt) else 1
