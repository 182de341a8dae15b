"""The one training loop: it learns, resumes to the bit, and refuses what is not its own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import accelerate
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from robustexplain import files
from robustexplain.data import Data, Samples, take
from robustexplain.data.arrays import Arrays
from robustexplain.data.base import subset
from robustexplain.data.tables import TensorTable
from robustexplain.errors import DamagedFileError, InputError, RobustExplainWarning, RunMismatchError
from robustexplain.models import build
from robustexplain.training import (
    Loss,
    Selection,
    Session,
    Training,
    TrainingStep,
    Verdict,
    cross_entropy,
    eval_mode,
    fit,
    frozen,
)
from robustexplain.training.batches import Batches
from robustexplain.training.glimpse import alike, glimpse_of
from robustexplain.training.task import Task


def blobs(size: int = 96) -> TensorDataset:
    """Points in the plane, three classes, each around its own corner of a triangle."""
    rng = torch.Generator().manual_seed(0)
    y = torch.arange(size) % 3
    corners = torch.tensor([[0.0, 2.0], [2.0, -1.0], [-2.0, -1.0]])
    return TensorDataset(corners[y] + 0.5 * torch.randn(size, 2, generator=rng), y)


def net(dropout: float = 0.0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(2, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 3))


FOUR = Training(epochs=4, batch_size=32, lr=1e-2)


def trained(
    loss: Loss = cross_entropy, settings: Training = FOUR, dropout: float = 0.0, **options: object
) -> nn.Module:
    options = {"identity": "blobs", **options}
    return fit(net(dropout), loss, blobs(), settings, name="net", **options)  # type: ignore[arg-type]


def same(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return all(torch.equal(first[key], second[key]) for key in first)


def test_it_learns_and_ends_in_eval_mode() -> None:
    x, y = blobs(300).tensors
    before, after = net().eval(), trained(settings=Training(epochs=15, batch_size=32, lr=1e-2))
    assert float((after(x).argmax(1) == y).float().mean()) > 0.95
    assert float((before(x).argmax(1) == y).float().mean()) < 0.8
    assert not after.training


class Killed(Exception):
    pass


def killed_at(epoch: int, after: int = 0) -> Loss:
    """The loss of a process that dies in that epoch, after some micro batches of it."""
    left = after

    def loss(module: nn.Module, x: Tensor, y: Tensor, moment: TrainingStep) -> Tensor:
        nonlocal left
        if moment.epoch == epoch:
            left -= 1
            if left < 0:
                raise Killed
        return cross_entropy(module, x, y, moment)

    return loss


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_killed_and_resumed_equals_uninterrupted_to_the_bit(tmp_path: Path, dropout: float) -> None:
    whole = trained(dropout=dropout)
    with pytest.raises(Killed):
        trained(killed_at(2, after=2), dropout=dropout, session=Session(folder=tmp_path))
    epochs = []

    def watched(module: nn.Module, x: Tensor, y: Tensor, moment: TrainingStep) -> Tensor:
        epochs.append(moment.epoch)
        return cross_entropy(module, x, y, moment)

    torch.rand(7)  # another process has another global random state
    resumed = trained(watched, dropout=dropout, session=Session(folder=tmp_path))
    assert set(epochs) == {2, 3}
    assert same(whole, resumed)


def test_a_finished_training_is_not_done_again(tmp_path: Path) -> None:
    first = trained(session=Session(folder=tmp_path))
    again = trained(killed_at(0), session=Session(folder=tmp_path))
    assert same(first, again)


@pytest.mark.parametrize(
    "change",
    [
        {"settings": Training(epochs=4, batch_size=32, lr=2e-2)},
        {"seed": 1},
        {"identity": "other data"},
    ],
)
def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    trained(session=Session(folder=tmp_path), identity="some data")
    with pytest.raises(RunMismatchError, match="another training"):
        trained(session=Session(folder=tmp_path), **{"identity": "some data", **change})  # type: ignore[arg-type]


def test_without_an_identity_another_loss_or_module_is_refused_and_weights_are_warned_of(tmp_path: Path) -> None:
    def nothing(module: nn.Module, x: Tensor, y: Tensor, moment: TrainingStep) -> Tensor:
        return 0 * cross_entropy(module, x, y, moment)

    def again(module: nn.Module, loss: Loss = cross_entropy) -> nn.Module:
        return fit(module, loss, blobs(), FOUR, name="net", session=Session(folder=tmp_path))  # type: ignore[arg-type]

    first = again(net())
    assert same(again(net()), first)
    with pytest.raises(RunMismatchError, match="another training"):
        again(net(), nothing)
    with pytest.raises(RunMismatchError, match="a checkpoint of another module: its weights have other names or shap"):
        again(nn.Sequential(net(), nn.Identity()))
    other = net()
    with torch.no_grad():
        next(other.parameters()).add_(1)
    with pytest.warns(
        RobustExplainWarning, match="began with other weights than this module's, and goes on from there"
    ):
        assert same(again(other), first)


def test_a_half_written_checkpoint_is_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Killed):
        trained(killed_at(2), session=Session(folder=tmp_path))
    good = (tmp_path / "net.safetensors").read_bytes()

    def cut(tensors: dict[str, Tensor], name: str, metadata: dict[str, str]) -> None:
        Path(name).write_bytes(good[:100])
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(files, "save_file", cut)
        with pytest.raises(Killed):
            trained(session=Session(folder=tmp_path))
    assert (tmp_path / "net.safetensors").read_bytes() == good
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.history.json", "net.safetensors"]
    # What a killed process leaves, which had no time to clean up.
    (tmp_path / ".net.safetensors.abc.part").write_bytes(good[:100])
    assert same(trained(session=Session(folder=tmp_path)), trained())


def flip_a_bit(path: Path, key: str) -> None:
    """Change one number of a safetensors file, which stays one."""
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    start = json.loads(content[8 : 8 + length])[key]["data_offsets"][0]
    content[8 + length + start + 2] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize("key", ["module.0.weight", "optimizer.0.exp_avg"])
def test_a_checkpoint_with_a_flipped_bit_is_refused_or_set_aside(tmp_path: Path, key: str) -> None:
    whole = trained(session=Session(folder=tmp_path))
    flip_a_bit(tmp_path / "net.safetensors", key)
    with pytest.raises(DamagedFileError, match=r"net\.safetensors is damaged: .*; delete it to train again"):
        trained(session=Session(folder=tmp_path))
    assert same(trained(session=Session(folder=tmp_path, sets_aside=True)), whole)
    assert (tmp_path / "net.safetensors.1").is_file()


def test_a_checkpoint_of_a_version_without_digests_is_of_another_training(tmp_path: Path) -> None:
    trained(session=Session(folder=tmp_path))
    tensors, meta = files.read_tensors(tmp_path / "net.safetensors")
    files.write_tensors(tmp_path / "net.safetensors", tensors, {k: v for k, v in meta.items() if k != "digest"})
    with pytest.raises(RunMismatchError, match="another training"):
        trained(session=Session(folder=tmp_path))


def test_micro_batches_change_nothing_but_rounding() -> None:
    def linear() -> nn.Module:
        # Without batch norm, whose statistics are a micro batch's own.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 3)).double()

    data = blobs()
    data.tensors = (data.tensors[0].double(), data.tensors[1])
    results = [
        fit(linear(), cross_entropy, data, Training(epochs=3, batch_size=32, micro_batch=micro), name="net")
        for micro in (None, 16, 4)
    ]
    whole, *parts = ([p.detach() for p in module.parameters()] for module in results)
    for part in parts:
        for a, b in zip(part, whole, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    with pytest.raises(InputError, match="micro_batch must divide"):
        Training(batch_size=32, micro_batch=5)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.InstanceNorm1d])
def test_in_eval_mode_every_micro_batch_finds_the_same_statistics(norm: type[nn.Module]) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        own = norm(4, track_running_stats=True)
        module = nn.Sequential(nn.Unflatten(1, (1, 2)), nn.Conv1d(1, 4, 1), own, nn.Flatten(), nn.Linear(8, 3))
    seen: list[Tensor] = []

    def asking(module: nn.Module, x: Tensor, y: Tensor, moment: TrainingStep) -> Tensor:
        with eval_mode(own), torch.no_grad():
            seen.append(own(torch.arange(8.0).view(1, 4, 2)).clone())
        return cross_entropy(module, x, y, moment)

    fit(module, asking, blobs(), Training(epochs=2, batch_size=32, micro_batch=8), name="net")
    steps = [seen[i : i + 4] for i in range(0, len(seen), 4)]
    assert all(torch.equal(one, step[0]) for step in steps for one in step)
    assert not torch.equal(steps[0][0], steps[-1][0])


def test_a_training_in_eval_mode_or_with_a_choice_of_epochs_is_another_one(tmp_path: Path) -> None:
    session = Session(folder=tmp_path)
    given = {"name": "net", "session": session, "identity": "x"}
    fit(net(), cross_entropy, blobs(), FOUR, **given)  # type: ignore[arg-type]
    with pytest.raises(RunMismatchError, match="another training"):
        fit(net(), cross_entropy, blobs(), FOUR, evaluating=True, **given)  # type: ignore[arg-type]
    chosen = Selection(lambda module: Verdict({}, 0.0, True))
    with pytest.raises(RunMismatchError, match="of the other the last"):
        fit(net(), cross_entropy, blobs(), FOUR, selection=chosen, **given)  # type: ignore[arg-type]


def test_divergence_is_a_clear_error() -> None:
    def diverging(module: nn.Module, x: Tensor, y: Tensor, moment: TrainingStep) -> Tensor:
        return cross_entropy(module, x, y, moment) * (math.nan if moment.epoch == 1 else 1.0)

    with pytest.raises(InputError, match=r"diverged: the mean loss of epoch 2 is nan; try a smaller lr"):
        trained(diverging)


def test_nothing_to_train_on_is_an_error() -> None:
    with pytest.raises(InputError, match="empty"):
        fit(net(), cross_entropy, TensorDataset(torch.rand(0, 2), torch.zeros(0).long()), FOUR, name="net")
    with pytest.raises(InputError, match="'net' has nothing to train: no parameter"):
        fit(net().requires_grad_(False), cross_entropy, blobs(), FOUR, name="net")


def test_one_cycle_rises_for_a_fifth_and_falls_to_zero() -> None:
    cycle = Training(lr=0.5)
    rates = [cycle.rate(p / 100) for p in range(101)]
    assert rates[0] == pytest.approx(0.02)
    assert max(rates) == pytest.approx(0.5) == rates[20]
    assert rates[60] == pytest.approx(0.25)
    assert rates[100] == pytest.approx(0, abs=1e-12)
    assert rates[:21] == sorted(rates[:21])
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert {Training(lr=0.5, schedule="constant").rate(p) for p in (0.0, 0.3, 1.0)} == {0.5}


def test_a_parameter_that_requires_no_grad_stays_as_it_is() -> None:
    module = net()
    first = module[0]  # type: ignore[index]
    first.requires_grad_(False)
    before = first.weight.clone()
    fit(module, cross_entropy, blobs(), FOUR, name="net")
    assert torch.equal(first.weight, before)


def test_frozen_restores_each_flag_also_after_an_error() -> None:
    module = net()
    module[0].weight.requires_grad_(False)  # type: ignore[index]
    flags = [p.requires_grad for p in module.parameters()]

    def fail() -> None:
        with frozen(module):
            assert not any(p.requires_grad for p in module.parameters())
            raise Killed

    with pytest.raises(Killed):
        fail()
    assert [p.requires_grad for p in module.parameters()] == flags
    assert True in flags
    assert False in flags


def order(processes: int, epoch: int = 0) -> list[list[int]]:
    """All processes' micro batches of an epoch, as they go through the loop side by side."""
    lanes = [list(Batches(96, 32, 8, 5, i, processes).epoch(epoch)) for i in range(processes)]
    return [micro for step in zip(*lanes, strict=True) for micro in step]


class Accelerator:
    """What the division of a batch asks of Accelerate's."""

    process_index = 0

    def __init__(self, processes: int, accumulation: int = 1) -> None:
        self.num_processes, self.gradient_accumulation_steps = processes, accumulation


def test_the_order_of_the_data_does_not_depend_on_the_number_of_processes() -> None:
    assert order(1) == order(2) == order(4)
    assert sorted(i for micro in order(2) for i in micro) == list(range(96))
    assert order(1, epoch=1) != order(1)
    with pytest.raises(InputError, match="evenly among 3 processes"):
        Batches.of(Training(batch_size=32, micro_batch=8), 96, 5, Accelerator(3))


def test_accelerates_accumulation_cuts_a_batch_where_nothing_else_is_said() -> None:
    assert [Batches.of(FOUR, 96, 5, Accelerator(p, a)).micro for p, a in ((1, 1), (2, 1), (1, 4), (2, 4))] == [
        32,
        16,
        8,
        4,
    ]
    whole = trained()
    with_it = trained(session=Session(accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)))
    cut = trained(settings=replace(FOUR, micro_batch=16))
    assert same(with_it, cut)
    assert not same(with_it, whole)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_global_random_state_is_left_alone(workers: int) -> None:
    before = torch.get_rng_state()
    trained(settings=Training(epochs=1, batch_size=32, workers=workers), dropout=0.5)
    assert torch.equal(torch.get_rng_state(), before)


def test_progress_goes_from_zero_to_one() -> None:
    seen: list[float] = []

    def watched(module: nn.Module, x: Tensor, y: Tensor, moment: TrainingStep) -> Tensor:
        seen.append(moment.progress)
        return cross_entropy(module, x, y, moment)

    trained(watched, Training(epochs=2, batch_size=32, micro_batch=16))
    assert seen[0] == 0
    assert seen[-1] == 1
    assert seen == sorted(seen)
    assert len(seen) == 2 * 3 * 2


def test_a_checkpoint_of_other_data_of_the_same_length_is_refused(digits: Data, tmp_path: Path) -> None:
    first, second = (take(digits.train, 48, seed) for seed in (1, 2))
    session, settings = Session(folder=tmp_path), Training(epochs=1, batch_size=16)
    one, other = (build("small-cnn", num_classes=10, in_channels=1) for _ in range(2))
    fit(one, cross_entropy, first, settings, name="it", session=session)
    with pytest.raises(RunMismatchError, match="checkpoint of another training"):
        fit(other, cross_entropy, second, settings, name="it", session=session)


LARGE = torch.rand(3000, 1, 8, 8, generator=torch.Generator().manual_seed(0))
CLASSES = torch.arange(3000) % 5
MIXED = torch.randperm(3000, generator=torch.Generator().manual_seed(1)).tolist()
HELD: dict[str, Callable[[Tensor, Tensor], Samples]] = {
    "tensors": TensorDataset,
    "subset of a subset": lambda x, y: subset(subset(TensorDataset(x, y), MIXED), range(1, 3000)),
    "arrays": lambda x, y: Arrays(x, y.tolist()),
    "8-bit arrays": lambda x, y: Arrays((x * 255).round().byte(), y.tolist()),
    "table": lambda x, y: TensorTable(x.flatten(1), y.tolist()),
}


@pytest.mark.parametrize("kind", HELD)
def test_one_other_label_or_input_in_memory_is_other_data(kind: str) -> None:
    made = HELD[kind]
    known = json.loads(json.dumps(glimpse_of(made(LARGE, CLASSES))))
    labels, inputs = CLASSES.clone(), LARGE.clone()
    labels[1234] += 1
    inputs[1234] = 0.2
    assert alike(known, glimpse_of(made(LARGE.clone(), CLASSES)))
    assert not alike(known, glimpse_of(made(LARGE, labels)))
    assert not alike(known, glimpse_of(made(inputs, CLASSES)))


def test_mirrored_and_reordered_inputs_are_other_data() -> None:
    x = torch.rand(6000, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    y = torch.zeros(6000, dtype=torch.int64)
    known = glimpse_of(TensorDataset(x, y))
    assert not alike(known, glimpse_of(TensorDataset(x.flip(3), y)))
    swapped = x.clone()
    swapped[[60, 61]] = x[[61, 60]]
    assert not alike(known, glimpse_of(TensorDataset(swapped, y)))


def test_inputs_that_differ_in_last_bits_are_the_same_data() -> None:
    known = glimpse_of(TensorDataset(LARGE, CLASSES))
    assert alike(known, glimpse_of(TensorDataset(LARGE * (1 + 1e-6), CLASSES)))
    assert not alike([[0.0, 0.5, 0.3]], known)  # as earlier versions wrote it


class Decoded(Dataset[tuple[Tensor, int]]):
    """Samples that are made when they are asked for; counts how many were."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y, self.made = x, y, 0

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.made += 1
        return self.x[index], int(self.y[index])


def test_of_samples_that_must_be_decoded_some_are_looked_at() -> None:
    data, labels = Decoded(LARGE, CLASSES), CLASSES.clone()
    known = glimpse_of(data)
    assert 64 <= data.made < 70
    labels[3000 // 64] += 1
    assert not alike(known, glimpse_of(Decoded(LARGE, labels)))


def test_a_training_on_data_with_another_label_is_refused(tmp_path: Path) -> None:
    x, y = blobs().tensors
    for labels, fits in ((y, True), (torch.cat([y[:7], (y[7:8] + 1) % 3, y[8:]]), False)):
        with nullcontext() if fits else pytest.raises(RunMismatchError, match="another training"):
            fit(net(), cross_entropy, TensorDataset(x, labels), FOUR, name="net", session=Session(folder=tmp_path))


def seen_by(name: str, settings: Training, seed: int = 0) -> list[Tensor]:
    """The distinct inputs that a training shows its module, sorted."""
    shown: list[Tensor] = []

    def looking(module: nn.Module, x: Tensor, y: Tensor, step: TrainingStep) -> Tensor:
        shown.extend(x.detach().clone())
        return cross_entropy(module, x, y, step)

    fit(net(), looking, blobs(), settings, name=name, seed=seed)
    return sorted({tuple(x.tolist()): x for x in shown}.values(), key=lambda x: tuple(x.tolist()))


def test_trainings_of_one_seed_use_the_same_samples_and_no_more_than_were_asked_for() -> None:
    few = replace(FOUR, samples=32)
    first, other, later = seen_by("net", few), seen_by("another", few), seen_by("net", few, seed=1)
    assert len(first) == 32
    assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, later, strict=True))
    assert len(seen_by("net", replace(FOUR, samples=1000))) == 96
    larger = {tuple(x.tolist()) for x in seen_by("net", replace(FOUR, samples=64))}
    assert len(larger) == 64
    assert {tuple(x.tolist()) for x in first} <= larger


def test_samples_held_out_are_of_those_that_are_used() -> None:
    task = Task("net", cross_entropy, blobs(), replace(FOUR, samples=64, validation=0.25)).limited()
    trained_on, selection = task.split(Session())
    assert len(task.data) == 64
    assert len(trained_on.data) == 48
    assert selection is not None


def test_a_checkpoint_of_other_samples_is_refused(tmp_path: Path) -> None:
    trained(settings=replace(FOUR, samples=32), session=Session(folder=tmp_path))
    with pytest.raises(RunMismatchError):
        trained(settings=replace(FOUR, samples=64), session=Session(folder=tmp_path))
