"""ADV2 training: the forgery fails, the terms of its loss, and what it refuses."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import robustexplain as rx
from robustexplain import maps as ops
from robustexplain.attacks import ADV2, random_classes
from robustexplain.data import Data, take
from robustexplain.defenses import ADV2Training
from robustexplain.defenses.models.adv2_training import ADV2Loss
from robustexplain.defenses.models.forger import Forger, apart
from robustexplain.defenses.models.loss_module import LossModule
from robustexplain.errors import InputError, NotDifferentiableError, UnsupportedModelError
from robustexplain.interpreters import CAM, GradCAM
from robustexplain.metrics import L1
from robustexplain.models import Classifier
from robustexplain.training import Training, TrainingStep, cross_entropy, fit

EPS = 0.06
INNER = ADV2(EPS, steps=5, step_size=0.025, warm_start=0.5)
NOW = TrainingStep(3, 1, 0.5)
SETTINGS = Training(epochs=3, batch_size=32, lr=3e-3, weight_decay=0.0)
CHEAP = ADV2Training(interpreters=("cam",), attack=INNER, training=SETTINGS)


def test_forgeries_fail_where_plain_fine_tuning_of_the_same_length_leaves_them(
    trained: Classifier, digits: Data, judged: tuple[Tensor, Tensor]
) -> None:
    x, y = judged[0][:24], judged[1][:24]
    data = take(digits.train, 192)
    plain = fit(copy.deepcopy(trained), cross_entropy, data, SETTINGS, name="plain", evaluating=True)
    control = rx.System(plain, CAM(plain))
    after = CHEAP(rx.System(trained, CAM(trained)), data)
    goal = random_classes(x, y, 10)
    joint = []
    for system in (control, after):
        attacked = ADV2(EPS, steps=25, weight=50.0)(system, x, y, goal)
        with torch.no_grad():
            near = L1()(system(attacked.x).maps, system(x).maps) < 0.1
        joint.append(float((attacked.success & near).float().mean()))
    accuracy = [float((s.model(x).argmax(1) == y).float().mean()) for s in (control, after)]
    print(f"forged {joint}, accuracy {accuracy} (plain, ADV2 training)")
    assert joint[1] < joint[0] - 0.3
    assert accuracy[1] > accuracy[0] - 0.1


def test_its_loss_is_the_one_that_is_stated(trained: Classifier, judged: tuple[Tensor, Tensor]) -> None:
    x, y = judged[0][:6], judged[1][:6]
    model = copy.deepcopy(trained).eval()
    forger = Forger.against(model, CHEAP._specs, (INNER,))
    found = ADV2Loss(model, forger, steady=5.0, clean_weight=0.3)(LossModule(model, model), x, y, NOW)
    forged, goal = forger(x, y, NOW)
    assert not bool((goal == y).any())
    clean, attacked = (F.cross_entropy(model(v), y, reduction="none") for v in (x, forged))
    moved = apart(*(ops.minmax(CAM(model)(v, y)) for v in (x, forged)))
    assert float(moved.detach().min()) > 0
    torch.testing.assert_close(found, 0.3 * clean + 0.7 * attacked + 5.0 * moved, rtol=1e-4, atol=1e-5)


def test_it_refuses_what_it_cannot_train(trained: Classifier, digits: Data) -> None:
    with pytest.raises(InputError, match=r"attack\.eps must be above 0: no other input"):
        ADV2Training(attack=ADV2(0.0))
    with pytest.raises(InputError, match="norms must be 'eval'"):
        ADV2Training(norms="train")
    with pytest.raises(InputError, match="interpreters must name one at least"):
        ADV2Training(interpreters=())
    with pytest.raises(NotDifferentiableError, match=r"adv2-at differentiates maps .* those of 'rise' have no such"):
        ADV2Training(interpreters=("rise",))
    with pytest.raises(UnsupportedModelError, match="adv2-at trains the maps of cam, and the system explains by Grad"):
        CHEAP(rx.System(trained, GradCAM(trained)), digits.train)
    assert replace(CHEAP, interpreters=(CAM,)).misfit((4,)) is not None
