"""What ``test_two_processes.py`` runs in one process and in two: ``python two_processes.py OUT``, under Accelerate."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from robustexplain import System
from robustexplain.attacks import ADV2, PGD
from robustexplain.attacks.manipulation import LocationFooling
from robustexplain.defenses import (
    ATEX,
    CURE,
    TRADES,
    ADV2Training,
    AdversarialSaliencyGuided,
    AdversarialTraining,
    AttributionRegularisers,
    ConsistentAID,
    DefensiveDistillation,
    EnsembleAdversarialTraining,
    FeatureDenoising,
    FinePruning,
    GradientAlignment,
    GuidedDenoiser,
    ImageAlignment,
    InfoDrop,
    InputGradientPenalty,
    InterpretabilityTraining,
    MagNetReformer,
    ModelDefense,
    RankThickness,
    Retrained,
    Revealing,
    RobustAttribution,
    SaliencyGuided,
    SelfExplaining,
    SmoothCurvature,
    SmoothSurface,
    Woods,
)
from robustexplain.defenses.interpreters.aid import AIDLoss, OwnNetworks
from robustexplain.defenses.models.inner_attacks import Divergence, RandomFGSM
from robustexplain.interpreters import RTS, Gradient, MaskingModel
from robustexplain.training import Session, Training, TrainingStep, accelerator_for, cross_entropy, fit
from robustexplain.transforms import Brightness, UniformNoise


def net(seed: int, kink: type[nn.Module] = nn.ReLU) -> nn.Module:
    """No batch norm: its statistics are those of a process's own share of the batch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1),
            kink(),
            nn.Conv2d(6, 8, 3, stride=2, padding=1),
            kink(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 4),
        ).eval()


def samples(size: int, dtype: torch.dtype = torch.float32) -> TensorDataset:
    rng = torch.Generator().manual_seed(7)
    x = torch.rand(size, 1, 12, 12, generator=rng).to(dtype)
    return TensorDataset(x, torch.arange(size) % 4)


def weights(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": p.detach().clone() for name, p in module.named_parameters()}


def aid_gradients(accelerator: Accelerator) -> dict[str, Tensor]:
    """The gradient of AID's loss on eight samples, shared out among the processes."""
    model = net(1).double().requires_grad_(False)
    x, y = samples(8, torch.float64).tensors
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        masker = MaskingModel.around(net(2), x.float(), width=4, levels=2).double()
    aid = ConsistentAID(attack=ADV2(0.1, steps=6, step_size=0.02, warm_start=0.5))
    networks = OwnNetworks(RTS(model, masker.eval()))
    loss = AIDLoss(aid, networks, (UniformNoise(), Brightness()))
    wrapped = accelerator.prepare(networks)
    wrapped.train()
    mine = slice(accelerator.process_index, None, accelerator.num_processes)
    value = loss(wrapped, x[mine], y[mine], TrainingStep(5, 0, 0.0)).mean()
    accelerator.backward(value)
    return {f"aid.{name}": p.grad.clone() for name, p in masker.named_parameters() if p.grad is not None}


def fitted(accelerator: Accelerator) -> dict[str, Tensor]:
    """Two epochs in micro batches of 16, with dropout."""
    module = nn.Sequential(*list(net(4))[:-1], nn.Dropout(0.3), list(net(4))[-1])
    settings = Training(epochs=2, batch_size=32, micro_batch=16, lr=1e-2)
    return weights("fit", fit(module, cross_entropy, samples(96), settings, name="fit", session=Session(accelerator)))


def told(accelerator: Accelerator, name: str, **settings: Any) -> dict[str, Tensor]:
    """Augmented images, averaged weights, and the epoch that is best on samples held out; brightness is the class."""
    x, y = samples(98).tensors
    data = TensorDataset(x * (1 + y[:, None, None, None]) / 4, y)
    training = Training(epochs=3, batch_size=24, micro_batch=12, augment=("flip", "crop-2"), ema=0.5, **settings)
    return weights(name, fit(net(5), cross_entropy, data, training, name=name, session=Session(accelerator)))


def hardened(accelerator: Accelerator) -> dict[str, Tensor]:
    """Adversarial training of a net with batch norms, whose running statistics the attack inside looks at."""
    plain = list(net(9))
    model = nn.Sequential(plain[0], nn.BatchNorm2d(6), *plain[1:3], nn.BatchNorm2d(8), *plain[3:]).double().eval()
    # AdamW would make steps of full length out of the rounding of gradients that are zero, of biases before a norm.
    training = Training(epochs=2, batch_size=16, micro_batch=4, lr=0.2, optimizer="sgd")
    defense = AdversarialTraining(PGD(0.1, steps=3, step_size=0.05), training, clean_weight=0.3)
    found = defense.hardened(model, samples(48, torch.float64), Session(accelerator))
    return {f"hardened.{name}": value for name, value in found.state_dict().items()}


def revealing(accelerator: Accelerator) -> dict[str, Tensor]:
    """Two epochs of a loss on maps and of attacks on them, in a network that is smooth."""
    training = Training(epochs=2, batch_size=16, micro_batch=4, lr=1e-2, weight_decay=0.0)
    attack = ADV2(0.1, steps=4, step_size=0.03, warm_start=0.5)
    defense = Revealing(("gradient",), attack=attack, training=training, rise=0.5)
    found = defense.hardened(net(10, nn.Softplus).double(), samples(32, torch.float64), Session(accelerator))
    return weights("revealing", found)


def networks(accelerator: Accelerator) -> dict[str, Tensor]:
    """Trainings of networks whose draws, neighbours or weights depend on the inputs, or on the steps before."""
    training = Training(epochs=2, batch_size=16, micro_batch=4, lr=0.05, optimizer="sgd", weight_decay=0.0)
    pgd = PGD(0.1, steps=2, step_size=0.05)
    forger = ADV2(0.1, steps=4, step_size=0.03, warm_start=0.5)
    made: dict[str, ModelDefense] = {
        "adv2": ADV2Training(interpreters=("cam",), attack=forger, training=training),
        "asgt": AdversarialSaliencyGuided(attack=pgd, training=training),
        "fine-pruning": FinePruning(share=0.25, training=training),
        "atex": ATEX(samples=2, draws=2, training=training),
        "infodrop": InfoDrop(training=training, after=training),
        "saliency-guided": SaliencyGuided(training=training),
        "senn": SelfExplaining(classes=1, training=training),
        "woods": Woods(psi=1.0, target=50.0, better=50.0, attack=pgd, training=training),
    }
    found: dict[str, Tensor] = {}
    for name, defense in made.items():
        model = defense.hardened(net(11).double(), samples(16, torch.float64), Session(accelerator))
        found |= weights(f"network.{name}", model)
    return found


def for_maps(accelerator: Accelerator) -> dict[str, Tensor]:
    """An epoch of each training for steady maps; those that draw or attack do so alike."""
    training, attack = Training(epochs=1, batch_size=16, micro_batch=8, lr=1e-2), PGD(0.1, 3, 0.05, random_start=True)
    defenses: dict[str, ModelDefense] = {
        "aga": GradientAlignment(training=training),
        "art": ImageAlignment(training=training, attack=attack),
        "attribution-regularisers": AttributionRegularisers(training=training, attack=attack, points=2, inner_points=1),
        "input-gradient-penalty": InputGradientPenalty(training=training),
        "r2et": RankThickness(training=training, k=8),
        "rar": RobustAttribution(training=training, attack=attack, points=3, inner_points=2, distance="cosine"),
        "smooth-curvature": SmoothCurvature(training=training),
        "ssr": SmoothSurface(training=training, classes=2),
    }
    found: dict[str, Tensor] = {}
    for name, defense in defenses.items():
        model = defense.hardened(net(12).double(), samples(32, torch.float64), Session(accelerator))
        found |= weights(f"steady.{name}", model)
    return found


def for_predictions(accelerator: Accelerator) -> dict[str, Tensor]:
    """An epoch of each training for robust predictions, in a network without kinks."""
    training = Training(epochs=1, batch_size=16, micro_batch=8, lr=1e-2)
    fgsm, other = RandomFGSM(0.1), net(3).double()
    # AdamW makes a step of full length of the rounding of a gradient that is zero, of a bias before a batch norm.
    plain = replace(training, optimizer="sgd", lr=0.1)
    defenses: dict[str, ModelDefense] = {
        "retrained": Retrained(training, norms="train"),
        "denoised": FeatureDenoising(("2",), attack=PGD(0.1, steps=2, step_size=0.05), training=plain),
        "trades": TRADES(attack=Divergence(0.1, steps=3, step_size=0.05), training=training),
        "ensemble": EnsembleAdversarialTraining((), networks=(other,), attack=fgsm, training=training),
        "distilled": DefensiveDistillation(5.0, training=training),
        "cure": CURE(training, h=(0.5,)),
        "int": InterpretabilityTraining(training, attack=PGD(0.1, 3, 0.05, random_start=True), ramp=(0, 0)),
    }
    found: dict[str, Tensor] = {}
    for name, defense in defenses.items():
        model = net(11, nn.Softplus).double()
        found |= weights(name, defense.hardened(model, samples(32, torch.float64), Session(accelerator)))
    return found


def reformed(accelerator: Accelerator) -> dict[str, Tensor]:
    """Two epochs of each network in front of a classifier: attacks on that one, and noise, are drawn alike."""
    training = Training(epochs=2, batch_size=16, micro_batch=4, lr=1.0, optimizer="sgd", weight_decay=0.0)
    model = net(13)
    defenses = {
        "hgd": GuidedDenoiser(PGD(0.1, 2, 0.05, random_start=True), 4, 2, training),
        "magnet-reformer": MagNetReformer(training=training),
    }
    found: dict[str, Tensor] = {}
    for name, defense in defenses.items():
        system = defense(System(model, Gradient(model)), samples(32), Session(accelerator))
        found |= weights(f"reformed.{name}", system.model.get_submodule("transforms"))
    return found


class Explained(nn.Module):
    """Logits and gradient maps from one forward pass, so that data parallelism sees both."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net(6, nn.Softplus)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = Gradient(self.net.eval(), of="logit").explain(x)
        return found.logits, found.maps


def flat_maps(module: nn.Module, x: Tensor, y: Tensor, moment: TrainingStep) -> Tensor:
    """A loss on the explanation, by double backward, with a term on the logits."""
    logits, maps = module(x)
    return 100 * maps.square().flatten(1).mean(1) + 0.1 * nn.functional.cross_entropy(logits, y, reduction="none")


def explained(accelerator: Accelerator) -> dict[str, Tensor]:
    settings = Training(epochs=1, batch_size=16, micro_batch=8, lr=1e-2, clip=0)
    found = fit(Explained(), flat_maps, samples(48), settings, name="maps", session=Session(accelerator))
    return weights("maps", found)


def fooled(accelerator: Accelerator, name: str, **settings: Any) -> dict[str, Tensor]:
    """A manipulation through gradient maps: double backward into the weights, and the epoch that is kept."""
    model = net(8, nn.Softplus)
    attack = LocationFooling(
        weight=5.0,
        budget=1.0,
        **settings,
        training=Training(epochs=2, batch_size=16, micro_batch=8, lr=1e-2, weight_decay=0.0, clip=0),
    )
    lied = attack(System(model, Gradient(model, of="logit")), samples(60), Session(accelerator))
    return weights(name, lied.model)


def main(out: Path) -> None:
    torch.set_num_threads(1)
    accelerator = accelerator_for(cpu=True)
    found = aid_gradients(accelerator) | fitted(accelerator) | explained(accelerator) | fooled(accelerator, "fooled")
    found |= fooled(accelerator, "shifted", shift=True)
    found |= fooled(accelerator, "unseen", evade=("gradient-free-disagreement", "trusted-reference"))
    found |= told(accelerator, "told", lr=0.2, validation=0.25, patience=2, optimizer="sgd", label_smoothing=0.1)
    # A single sample held out: there are fewer than processes.
    found |= told(accelerator, "single", lr=0.02, validation=0.01)
    found |= hardened(accelerator) | revealing(accelerator) | networks(accelerator) | for_predictions(accelerator)
    found |= for_maps(accelerator) | reformed(accelerator)
    found["processes"] = torch.tensor(accelerator.num_processes)
    if accelerator.num_processes > 1:
        assert dist.group.WORLD is not None
        waits = dist.group.WORLD._get_backend(accelerator.device).options._timeout
        found["hours"] = torch.tensor(waits.total_seconds() / 3600)
    save_file(found, str(out / f"{accelerator.num_processes}-{accelerator.process_index}.safetensors"))
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
