"""The training loop: order of the data, updates, checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .. import files
from ..errors import InputError, RunMismatchError
from ..streams import derive, generator
from .losses import Loss, Samples, TrainingStep
from .modes import global_noise, statistics_kept
from .selection import Selection
from .session import Session
from .settings import Training


def fit(
    module: nn.Module,
    loss: Loss,
    data: Samples,
    settings: Training,
    *,
    name: str,
    seed: int = 0,
    session: Session | None = None,
    identity: object = None,
    evaluating: bool = False,
    selection: Selection | None = None,
) -> nn.Module:
    """Train ``module`` in place and return it, in eval mode.

    Args:
        module: what is trained; parameters that do not require grad stay as they are.
        loss: the loss of each sample of a micro batch.
        data: map-style, gives ``(x, label)``.
        settings: epochs, batch, optimiser.
        name: what the progress display and the checkpoint are called.
        seed: of order and noise.
        session: accelerator, checkpoints, progress.
        identity: whatever else decides the result (a hash of the data, the loss's settings); a checkpoint of another
            identity is refused.
        evaluating: train in eval mode: batch norms keep their statistics, dropout does not draw.
        selection: which epoch's weights the module ends with; default the last's.

    Raises:
        RunMismatchError: the checkpoint belongs to another training.
        InputError: the batch cannot be divided among the processes; the loss is not finite.
    """
    session = session or Session()
    accelerator = session.accelerator
    loop = _Loop(module.to(session.device), settings, derive(seed, name), len(data), session,  # type: ignore[arg-type]
                 evaluating, selection)  # fmt: skip
    stamp = files.digest([name, seed, asdict(settings), len(data), identity])  # type: ignore[arg-type]
    path = None if session.folder is None else session.folder / f"{name}.safetensors"
    start = loop.restore(path, stamp)
    if start == 0:
        loop.select()
    wrapped, optimizer = accelerator.prepare(module, loop.optimizer)
    total = settings.epochs * loop.steps
    with torch.enable_grad(), session.progress.task(name, total, start * loop.steps) as advance:
        for epoch in range(start, settings.epochs):
            mean = loop.epoch(wrapped, optimizer, loss, data, epoch, advance)
            loop.history.append(mean)
            loop.select()
            loop.save(path, stamp, epoch + 1)
    loop.share()
    if selection is not None:
        module.load_state_dict(loop.best)
    return module.eval()


class _Loop:
    """The state of one training: optimiser, history, and how an epoch goes."""

    def __init__(
        self,
        module: nn.Module,
        settings: Training,
        seed: int,
        size: int,
        session: Session,
        evaluating: bool = False,
        selection: Selection | None = None,
    ) -> None:
        if size == 0:
            raise InputError("there is nothing to train on: the data set is empty")
        self.module, self.settings, self.seed, self.size, self.session = module, settings, seed, size, session
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=settings.lr, weight_decay=settings.weight_decay)
        self.history: list[float] = []
        self.evaluating, self.selection = evaluating, selection
        self.best: dict[str, Tensor] = {}
        self.least = math.inf
        self.batch = min(settings.batch_size, size)
        self.steps = size // self.batch
        processes = session.accelerator.num_processes
        self.micro = min(settings.micro_batch or self.batch // processes, self.batch)
        if self.micro == 0 or (self.batch // self.micro) % processes:
            raise InputError(
                f"a batch of {self.batch} in micro batches of {self.micro} cannot be divided evenly among "
                f"{processes} processes"
            )

    def micro_batches(self, epoch: int) -> Iterator[list[int]]:
        """This process's micro batches, in order: batch after batch, every ``processes``-th micro batch of each."""
        order = torch.randperm(self.size, generator=generator(self.seed, "order", epoch)).tolist()
        accelerator = self.session.accelerator
        for step in range(self.steps):
            batch = order[step * self.batch : (step + 1) * self.batch]
            count = self.batch // self.micro
            for i in range(accelerator.process_index, count, accelerator.num_processes):
                yield batch[i * self.micro : (i + 1) * self.micro]

    def epoch(
        self,
        wrapped: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Loss,
        data: Samples,
        epoch: int,
        advance: Callable[[int], None],
    ) -> float:
        """One pass over the data; the mean loss."""
        accelerator = self.session.accelerator
        share = self.batch // self.micro // accelerator.num_processes
        loader = DataLoader(
            data,
            batch_sampler=list(self.micro_batches(epoch)),
            num_workers=self.settings.workers,
            generator=generator(self.seed, "workers", epoch, accelerator.process_index),
        )
        wrapped.train(not self.evaluating)
        total = torch.zeros((), device=self.session.device)
        for i, (x, y) in enumerate(loader):
            step, part = divmod(i, share)
            progress = (epoch * self.steps + step) / max(self.settings.epochs * self.steps - 1, 1)
            last = part == share - 1
            micro = part * accelerator.num_processes + accelerator.process_index
            noise = global_noise(self.session.device, derive(self.seed, "noise", epoch, step, micro))
            statistics = nullcontext() if micro == 0 else statistics_kept(self.module)
            with noise, statistics, nullcontext() if last else _no_sync(accelerator, wrapped):
                moment = TrainingStep(self.seed, epoch, progress)
                value = loss(wrapped, x.to(self.session.device), y.to(self.session.device), moment).mean()
                accelerator.backward(value / share)
            total += value.detach()
            if last:
                self._update(optimizer, progress)
                advance(1)
        mean = float(accelerator.reduce(total / (self.steps * share), "mean"))
        if not math.isfinite(mean):
            raise InputError(f"training diverged: the mean loss of epoch {epoch + 1} is {mean}; try a smaller lr")
        return mean

    def _update(self, optimizer: torch.optim.Optimizer, progress: float) -> None:
        if self.settings.clip:
            self.session.accelerator.clip_grad_norm_(self.parameters, self.settings.clip)
        for group in optimizer.param_groups:
            group["lr"] = self.settings.rate(progress)
        optimizer.step()
        optimizer.zero_grad()

    def select(self) -> None:
        """Judge the weights as they are, and keep a copy of the best admissible ones."""
        if self.selection is None:
            return
        self.share()
        self.module.eval()
        found = self.selection.evaluate(self.module)
        self.selection.history.append(found.figures)
        if not self.best or (found.admissible and found.loss < self.least):
            self.best = {name: value.detach().clone() for name, value in self.module.state_dict().items()}
            # Nothing compares with NaN: untrained weights without a loss would stay whatever comes.
            self.least = found.loss if math.isfinite(found.loss) else math.inf
            self.selection.kept = len(self.selection.history) - 1

    def share(self) -> None:
        """Give every process the main one's buffers: the last step's batch statistics are known to it alone."""
        for buffer in self.module.buffers():
            broadcast(buffer)

    def save(self, path: Path | None, stamp: str, epochs: int) -> None:
        """Write the checkpoint aside and rename it: weights, optimiser, history, in one file."""
        accelerator = self.session.accelerator
        if path is not None and accelerator.is_main_process:
            tensors = {f"module.{k}": v for k, v in self.module.state_dict().items()}
            for i, state in self.optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{i}.{k}": torch.as_tensor(v) for k, v in state.items()}
            tensors |= {f"best.{k}": v for k, v in self.best.items()}
            meta = {"stamp": stamp, "epochs": str(epochs), "history": json.dumps(self.history)}
            if self.selection is not None:
                judged = {"least": self.least, "kept": self.selection.kept, "figures": self.selection.history}
                meta["selection"] = json.dumps(judged)
            files.write_tensors(path, tensors, meta)
        accelerator.wait_for_everyone()

    def restore(self, path: Path | None, stamp: str) -> int:
        """Load a checkpoint of this same training; the number of epochs it has behind it."""
        if path is None or not path.is_file():
            return 0
        tensors, meta = files.read_tensors(path)
        if meta.get("stamp") != stamp:
            raise RunMismatchError(
                f"{path} is a checkpoint of another training (other settings, seed or data); "
                "use another output folder, or delete this one to start again"
            )
        self.module.load_state_dict({k[7:]: v for k, v in tensors.items() if k.startswith("module.")})
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, word = key.split(".", 2)
                state.setdefault(int(index), {})[word] = value
        if state:
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.history = json.loads(meta["history"])
        if self.selection is not None:
            judged = json.loads(meta["selection"])
            self.least, self.selection.kept = judged["least"], judged["kept"]
            self.selection.history[:] = judged["figures"]
            device = self.session.device
            self.best = {k[5:]: v.to(device) for k, v in tensors.items() if k.startswith("best.")}
        return int(meta["epochs"])


def _no_sync(accelerator: Accelerator, module: nn.Module) -> AbstractContextManager[None]:
    context: AbstractContextManager[None] = accelerator.no_sync(module)
    return context
