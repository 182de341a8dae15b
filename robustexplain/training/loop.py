"""The training loop: updates, epochs, checkpoints."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from .. import files
from ..data.base import Item, Samples
from ..errors import FieldError, InputError, doing
from ..progress import Advance
from ..random_streams import derive, generator
from .augmentation import Augmented
from .averaging import Average
from .batches import Batches
from .checkpoint import Checkpoint, set_aside
from .losses import ClassifierLoss, Loss, TrainingStep
from .modes import eval_mode, global_noise
from .parts import at_rest, groups, resting
from .precision import check_precision, own_precision, prepared
from .selection import Selection
from .session import Session
from .settings import Training
from .shown import Notes, closing_line
from .statistics import Statistics
from .task import Task
from .tracking import EpochRecord, record, tracked


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
    source: Samples | None = None,
) -> nn.Module:
    """Train ``module`` in place and return it, in eval mode and in its own precision.

    Args:
        module: what is trained; parameters that do not require grad stay as they are.
        loss: the loss of each sample of a micro batch.
        data: map-style, gives ``(x, label)``.
        settings: epochs, batch, optimiser.
        name: what the progress display, the checkpoint and the history are called.
        seed: of order and noise.
        session: accelerator, checkpoints, progress, trackers.
        identity: whatever else decides the result (a hash of the data and of the weights before, the loss's settings);
            a checkpoint of another identity is refused. Without one a checkpoint of another loss is refused, and other
            weights before are warned of.
        evaluating: train in eval mode: batch norms keep their statistics, dropout does not draw.
        selection: which epoch's weights the module ends with; default the last's, or, with ``settings.validation``,
            those that are best on samples held out.
        source: what ``data`` were computed from, if they were: a checkpoint is compared by these samples.

    Raises:
        DamagedFileError: a checkpoint that cannot be read or was changed, where the session does not set it aside.
        RunMismatchError: the checkpoint belongs to another training (and the session does not set it aside), or to one
            of another precision.
        InputError: the batch cannot be divided among the processes; settings that are for classifiers, for a loss that
            is not a classifier's; layers that the module has not; half precision on a CPU; loss, weights or a
            classifier's logits are not finite.
    """
    task = Task(name, loss, data, settings, seed, identity, evaluating, source)
    with doing(f"training {name!r}"):
        return _Loop(module, task, session or Session(), selection).run()


class _Loop:
    """The state of one training: optimiser, history, and how an epoch goes."""

    def __init__(self, module: nn.Module, task: Task, session: Session, selection: Selection | None = None) -> None:
        if task.settings.validation and selection is not None:
            raise FieldError("Training", "validation", f"has no effect on {task.name!r}, which chooses by itself")
        check_precision(session.accelerator)
        self.module, self.session = module.to(session.device), session
        self.stamp, self.glimpse = ("", {}) if session.folder is None else (task.stamp, task.glimpse)
        told = session.folder is None or task.identity is not None
        self.begun = "" if told else files.digest_tensors(module.state_dict())
        part, held = task.limited().smoothed().split(session)
        self.task = part.weighted()
        self.settings, self.selection = task.settings, selection or held
        self.batches = Batches.of(self.settings, len(self.task.data), task.stream, session.accelerator)
        self.resting, trained = resting(module, self.settings), groups(module, self.settings)
        self.parameters = [p for group in trained for p in group["params"]]
        if not self.parameters:
            raise InputError(f"{task.name!r} has nothing to train: no parameter of the module requires grad")
        self.optimizer = self.settings.optimizer_of(trained)
        self.average = Average(module, self.settings.ema) if self.settings.ema else None
        self.statistics = Statistics(module, self.batches.batch > self.batches.micro)
        self.history: list[EpochRecord] = []
        self.notes = Notes()
        self.best: dict[str, Tensor] = {}
        self.least = math.inf

    def run(self) -> nn.Module:
        """Train, or go on from the checkpoint; the module, as it is to be used."""
        session = self.session
        path = None if session.folder is None else session.folder / f"{self.task.name}.safetensors"
        with (
            at_rest(self.resting),
            prepared(session.accelerator, self.module, self.optimizer) as (wrapped, optimizer),
            torch.enable_grad(),
        ):
            self.take(path)
            start = self.restore(path)
            if start == 0:
                self.select()
            self._epochs(wrapped, optimizer, start, path)
        self.share()
        if self.average is not None:
            self.module.load_state_dict(self.average.values)
        if self.selection is not None:
            self.module.load_state_dict(self.best)
        return self.module.eval()

    def _epochs(self, wrapped: nn.Module, optimizer: torch.optim.Optimizer, start: int, path: Path | None) -> None:
        session, steps, total = self.session, self.batches.steps, self.settings.epochs
        trackers = session.trackers if start < total else ()
        with (
            tracked(trackers, self.task.name, session.folder) as tell,
            session.progress.task(self.task.name, total * steps, start * steps) as advance,
        ):
            for epoch in range(start, total):
                if self.selection is not None and self.selection.exhausted:
                    break
                self.close(epoch, self.epoch(wrapped, optimizer, epoch, advance))
                tell(self.history[-1])
                self.save(path)
        if len(self.history) > start:
            session.progress.say(closing_line(self.task.name, self.history, self.selection))

    def epoch(self, wrapped: nn.Module, optimizer: torch.optim.Optimizer, epoch: int, advance: Advance) -> float:
        """One pass over the data; the mean loss."""
        accelerator, device, batches = self.session.accelerator, self.session.device, self.batches
        wrapped.train(not self.task.evaluating)
        for part in self.resting:
            part.eval()
        total = torch.zeros((), device=device, dtype=torch.float32)
        for i, (x, y) in enumerate(self._loader(epoch)):
            step, micro_batch = divmod(i, batches.share)
            progress = self._progress(epoch, step)
            last = micro_batch == batches.share - 1
            micro = micro_batch * accelerator.num_processes + accelerator.process_index
            noise = global_noise(device, derive(self.task.stream, "noise", epoch, step, micro))
            statistics = self.statistics.of_micro_batch(first=micro == 0)
            with noise, statistics, nullcontext() if last else _no_sync(accelerator, wrapped):
                moment = TrainingStep(self.task.stream, epoch, progress, epoch * batches.steps + step)
                value = self.task.loss(wrapped, x.to(device), y.to(device), moment).mean()
                # Accelerate divides by its own number of steps, which the micro batches have in them already.
                accelerator.backward(value / (batches.share / accelerator.gradient_accumulation_steps))
            total += value.detach()
            if last:
                self.statistics.update(accelerator.num_processes)
                self._update(optimizer, progress)
                rate = self.settings.rate(progress)
                advance(1, note=self.notes.of(total, i + 1, rate, last=step == batches.steps - 1))
        if epoch == self.settings.epochs - 1:
            self._check_logits(x.to(device))
        mean = float(accelerator.reduce(total / (batches.steps * batches.share), "mean"))
        if not math.isfinite(mean):
            raise InputError(f"training diverged: the mean loss of epoch {epoch + 1} is {mean}; try a smaller lr")
        return mean

    def close(self, epoch: int, loss: float) -> None:
        """Check and judge the weights after an epoch, and write it down."""
        self._check_weights(epoch)
        self.select()
        figures = {} if self.selection is None else self.selection.history[-1]
        rate = self.settings.rate(self._progress(epoch, self.batches.steps - 1))
        self.history.append(record(epoch + 1, loss, rate, figures))

    def select(self) -> None:
        """Judge the weights as they are (averaged, where they are), and keep a copy of the best admissible ones."""
        if self.selection is None:
            return
        self.share()
        self.module.eval()
        averaged = nullcontext() if self.average is None else self.average.applied(self.module)
        with averaged, own_precision(self.module):
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
        if self.average is not None:
            for name, _ in self.module.named_buffers():
                if name in self.average.values:
                    broadcast(self.average.values[name])

    def save(self, path: Path | None) -> None:
        """Write the checkpoint and the history, each aside and then renamed."""
        accelerator = self.session.accelerator
        if path is not None and accelerator.is_main_process:
            self._checkpoint.write(path, self.history)
        accelerator.wait_for_everyone()

    def take(self, path: Path | None) -> None:
        """Copy the checkpoint of this same training from another run, where there is one and none here."""
        session = self.session
        if session.shelf is None or path is None or path.is_file() or self.task.identity is None:
            return
        # Every process has looked before the main one writes.
        session.accelerator.wait_for_everyone()
        if session.accelerator.is_main_process:
            source = session.shelf.take(self.stamp, self.glimpse, session.accelerator.mixed_precision, path)
            if source is not None:
                session.progress.say(f"{self.task.name}: taken from {source}")
        session.accelerator.wait_for_everyone()

    def restore(self, path: Path | None) -> int:
        """Load a checkpoint of this same training; the number of epochs it has behind it."""
        if path is None or not path.is_file():
            return 0
        checkpoint = self._checkpoint
        if self.session.sets_aside and (why := checkpoint.unfit(path)):
            return self._set_aside(path, why)
        self.history = checkpoint.read(path, self.session.device)
        self.best, self.least = checkpoint.best, checkpoint.least
        return len(self.history)

    def _set_aside(self, path: Path, why: str) -> int:
        accelerator = self.session.accelerator
        accelerator.wait_for_everyone()  # until every process has looked at it
        if accelerator.is_main_process:
            set_aside(path)
            self.session.progress.say(f"{self.task.name} {why} and is trained anew; its old checkpoint is kept aside")
        accelerator.wait_for_everyone()
        return 0

    @property
    def _checkpoint(self) -> Checkpoint:
        accelerator = self.session.accelerator
        return Checkpoint(self.stamp, self.glimpse, accelerator.mixed_precision, self.module, self.optimizer,
                          self.average, self.selection, accelerator.scaler, self.best, self.least,
                          self.begun)  # fmt: skip

    def _loader(self, epoch: int) -> DataLoader[Item]:
        data, workers = self.task.data, self.settings.workers
        if self.settings.augment:
            data = Augmented(data, self.settings.augment, self.task.stream, epoch)
        return DataLoader(
            cast(Dataset[Item], data),
            batch_sampler=list(self.batches.epoch(epoch)),
            num_workers=workers,
            generator=generator(self.task.stream, "workers", epoch, self.session.accelerator.process_index),
        )

    def _progress(self, epoch: int, step: int) -> float:
        return (epoch * self.batches.steps + step) / max(self.settings.epochs * self.batches.steps - 1, 1)

    def _update(self, optimizer: torch.optim.Optimizer, progress: float) -> None:
        if self.settings.clip:
            self.session.accelerator.clip_grad_norm_(self.parameters, self.settings.clip)
        for group in optimizer.param_groups:
            group["lr"] = self.settings.rate(progress) * group["factor"]
        optimizer.step()
        optimizer.zero_grad()
        if self.average is not None:
            self.average.update(self.module)

    def _check_weights(self, epoch: int) -> None:
        """Refuse weights that are not finite, or so large that their squares are not: the loss was taken before."""
        with torch.no_grad():
            wide = [v.to(torch.promote_types(v.dtype, torch.float32)) for v in _floating(self.module)]
            bad = [~v.square().sum().isfinite() for v in wide]
            found = self.session.accelerator.reduce(torch.stack(bad).sum(), "sum")
        if int(found):
            raise InputError(
                f"training diverged: after epoch {epoch + 1} weights are not finite, or beyond 1e19; try a smaller lr"
            )

    def _check_logits(self, x: Tensor) -> None:
        """Refuse a classifier whose last update left it without an answer."""
        if not isinstance(self.task.loss, ClassifierLoss):
            return
        with torch.no_grad(), eval_mode(self.module), own_precision(self.module):
            bad = self.session.accelerator.reduce((~self.module(x).isfinite()).sum(), "sum")
        if int(bad):
            raise InputError("training diverged: after the last update logits are not finite; try a smaller lr")


def _floating(module: nn.Module) -> list[Tensor]:
    return [value for value in module.state_dict().values() if value.is_floating_point()]


def _no_sync(accelerator: Accelerator, module: nn.Module) -> AbstractContextManager[None]:
    context: AbstractContextManager[None] = accelerator.no_sync(module)
    return context
