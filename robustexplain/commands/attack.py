"""``robustexplain attack``: one image, attacked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from .explain import image_of, refuse_others, systems_of_model, systems_of_run, warn_of_random_weights
from .options import Size, TrustCode

if TYPE_CHECKING:
    from torch import Tensor

    from ..attacks import Attack, Attacked
    from ..system import System


def attack(
    image: Annotated[Path, typer.Argument(help="An image file.")],
    attack: Annotated[str, typer.Option(help="The attack; see `robustexplain list attacks`.")] = "adv2",
    interpreter: Annotated[
        str | None, typer.Option(help="Whose maps are attacked and shown, for --model; default gradcam.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The classifier, such as efficientnet-lite0.")] = None,
    weights: Annotated[Path | None, typer.Option(help="A file with the weights of --model.")] = None,
    run: Annotated[Path | None, typer.Option(help="Or attack a system of this run directory.")] = None,
    row: Annotated[str | None, typer.Option(help="Which row of the run; default the first.")] = None,
    changes: Annotated[list[str] | None, typer.Option("--set", help="A setting: eps=8/255. Repeatable.")] = None,
    goal_class: Annotated[int | None, typer.Option(min=0, help="What should be predicted; default random.")] = None,
    untargeted: Annotated[bool, typer.Option(help="Any other class will do.")] = False,
    goal_map: Annotated[str, typer.Option(help="benign, or random-patch.")] = "benign",
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("attacked"),
    size: Size = None,
    trust_code: TrustCode = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the random class and patch.")] = 0,
) -> None:
    """Attack one image: the attacked image, the maps before and after, and the numbers."""
    refuse_others(run, {"--interpreter": interpreter, "--weights": weights}, {"--row": row})
    goal = AdversaryGoal(goal_class, untargeted, goal_map, seed)
    for line in attack_image(
        image,
        attack,
        changes or [],
        out,
        run=run,
        row=row,
        model=model,
        interpreter=interpreter or "gradcam",
        weights=weights,
        goal=goal,
        size=size,
        trust_code=trust_code,
    ):
        typer.echo(line)


@dataclass(frozen=True)
class AdversaryGoal:
    """The adversary's goal for the image.

    Args:
        goal_class: what should be predicted; ``None``: a random other class.
        untargeted: anything but the present prediction will do.
        goal_map: ``benign`` (the map of the clean image) or ``random-patch``.
        seed: of the random class and patch.
    """

    goal_class: int | None = None
    untargeted: bool = False
    goal_map: str = "benign"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.goal_map not in ("benign", "random-patch"):
            raise InputError(f"--goal-map: expected benign or random-patch, got {self.goal_map!r}")
        if self.untargeted and self.goal_class is not None:
            raise InputError(f"--untargeted and --goal-class {self.goal_class} contradict each other")


def attack_image(
    image: Path,
    name: str,
    settings: Sequence[str],
    out: Path,
    *,
    run: Path | None = None,
    row: str | None = None,
    model: str | None = None,
    interpreter: str = "gradcam",
    weights: Path | None = None,
    goal: AdversaryGoal | None = None,
    size: int | None = None,
    trust_code: bool = False,
) -> list[str]:
    """Attack an image and write the attacked image, the maps before and after, and the numbers.

    The folder gets ``attacked.png`` (8 bits), ``attacked.safetensors`` (exact, with the maps), ``compare.png`` and
    ``numbers.json``.

    Args:
        image: a file that PIL reads.
        name: of the attack.
        settings: ``key=value`` of the attack, as in a recipe (``eps=8/255``).
        out: the folder to write.
        run: a run directory whose system is attacked, ...
        row: ... which of its rows; default the first.
        model: a classifier's name, instead of a run, ...
        interpreter: ... and its interpreter's.
        weights: a file with the weights of ``model``.
        goal: what the adversary wants.
        size: side to resize to; default what the system was made for.
        trust_code: whether code of the user's own that the run's recipe names may run.

    Returns:
        The numbers, a line each.

    Raises:
        InputError: neither or both of ``run`` and ``model``; unknown names, settings or classes; an unreadable image.
    """
    if (run is None) == (model is None):
        raise InputError("attack needs either --run DIRECTORY or --model NAME")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; the name of a folder is needed")
    attack = attack_of(name, settings)
    rows = [row] if row else []
    systems, side = (
        systems_of_run(run, rows, trust_code)
        if run is not None
        else systems_of_model(str(model), [interpreter], weights)
    )
    label, system = next(iter(systems.items()))
    x = image_of(system, image, size or side)
    warn_of_random_weights(model, weights)
    return [f"system: {label}", *_attack(attack, system, x, goal or AdversaryGoal(), out)]


def attack_of(name: str, settings: Sequence[str]) -> Attack:
    """The registered attack of that name with ``key=value`` settings, checked as in a recipe.

    Raises:
        InputError: an unknown name or setting, or an attack that has to be fitted on a data set first.
    """
    import yaml

    from ..registry import ATTACKS
    from ..schema import make, numbers

    given: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise InputError(f"--set takes key=value, got {setting!r}")
        given[key] = yaml.safe_load(text)
    build: Any = ATTACKS.get(name).build
    attack: Attack = make(build, numbers(given), name)
    if attack.needs_data:
        raise InputError(f"{name!r} is fitted on images of the adversary's own first; name it in a recipe instead")
    return attack


def _attack(attack: Attack, system: System, x: Tensor, goal: AdversaryGoal, out: Path) -> list[str]:
    import torch

    from .. import files
    from ..attacks import random_patch_maps
    from ..metrics import L1, IoU, Spearman

    with torch.no_grad():
        benign = system(x)
    goal_class = _goal_class(attack, x, benign.prediction, benign.logits.shape[1], goal)
    goal_map = random_patch_maps(x, goal.seed) if goal.goal_map == "random-patch" else None
    made = attack(system, x, benign.prediction, goal_class, goal_map)
    stored = (made.x * 255).round() / 255
    with torch.no_grad():
        seen, seen_stored = system(made.x), system(stored)
    wanted = benign.maps if goal_map is None else goal_map
    found = {
        "clean": _said(benign.logits, benign.prediction),
        "attacked": _said(seen.logits, seen.prediction),
        "goal_class": None if goal_class is None else int(goal_class),
        "success": bool(made.success),
        "success_in_8_bits": bool(_success(attack, seen_stored.logits, benign.prediction, goal_class)),
        "map_l1": _number(L1()(seen.maps, wanted)),
        "map_iou": _number(IoU()(seen.maps, wanted)),
        "map_rank_correlation": _number(Spearman()(seen.maps, wanted)),
        "perturbation_linf": float((made.x - x).abs().amax()),
        "perturbation_l2": float((made.x - x).norm()),
        "queries": int(made.queries),
        **{name: bool(getattr(made, name)) for name in ("zero_direction", "stalled", "surrogate_misled")},
        "alarm": None if seen.alarm is None else bool(seen.alarm),
    }
    maps = {"map": benign.maps, "attacked_map": seen.maps, "goal_map": wanted}
    files.write_tensors(out / "attacked.safetensors", {"x": x, "attacked_x": made.x, **maps})
    files.write_json(out / "numbers.json", found)
    _write_pictures(out, x, made, stored, maps, found)
    return [f"{key}: {_short(value)}" for key, value in found.items()] + [f"written: {out}"]


def _number(value: Tensor) -> float | None:
    """Of one sample; ``None`` where the measure is undefined, such as a correlation with a constant map."""
    return float(value) if bool(value.isfinite()) else None


def _goal_class(attack: Attack, x: Tensor, label: Tensor, num_classes: int, goal: AdversaryGoal) -> Tensor | None:
    import torch

    from ..attacks import random_classes

    if attack.keeps_prediction or goal.untargeted:
        if goal.goal_class is not None:
            raise InputError(f"{type(attack).__name__} keeps the prediction: it takes no --goal-class")
        return None
    if goal.goal_class is None:
        return random_classes(x, label, num_classes, goal.seed)
    return torch.tensor([goal.goal_class])


def _success(attack: Attack, logits: Tensor, label: Tensor, goal_class: Tensor | None) -> Tensor:
    from ..metrics import hit

    return ~hit(logits, label) if attack.keeps_prediction else hit(logits, label, goal_class)


def _said(logits: Tensor, prediction: Tensor) -> dict[str, float]:
    return {"prediction": int(prediction), "probability": float(logits.softmax(1).amax(1))}


def _write_pictures(
    out: Path, x: Tensor, made: Attacked, stored: Tensor, maps: dict[str, Tensor], found: dict[str, Any]
) -> None:
    import numpy as np
    import torch
    from PIL import Image

    from .. import files, plots

    pixels = (stored[0].expand(3, -1, -1).permute(1, 2, 0) * 255).round().to(torch.uint8).cpu().numpy()
    files.replace_file(out / "attacked.png", lambda aside: Image.fromarray(pixels).save(aside, format="PNG"))
    shown = x[0].expand(3, -1, -1).permute(1, 2, 0).cpu()
    attacked = made.x[0].detach().expand(3, -1, -1).permute(1, 2, 0).cpu()
    change = (0.5 + 10 * (attacked - shown)).clamp(0, 1)
    before, after = found["clean"], found["attacked"]
    panels = [
        (f"clean\nclass {before['prediction']}, {before['probability']:.0%}", shown),
        (f"attacked\nclass {after['prediction']}, {after['probability']:.0%}", attacked),
        (f"difference x 10\nat most {found['perturbation_linf'] * 255:.1f}/255", change),
        ("map of the clean image", plots.coloured(maps["map"][0], x[0])),
        (f"map of the attacked image\nIoU with the goal {found['map_iou']:.2f}",
         plots.coloured(maps["attacked_map"][0], made.x[0].detach())),
        ("map that was wanted", plots.coloured(maps["goal_map"][0], x[0])),
    ]  # fmt: skip
    drawn = plots.strip([(caption, np.asarray(panel)) for caption, panel in panels])
    files.replace_file(out / "compare.png", lambda aside: aside.write_bytes(drawn))


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return f"class {value['prediction']}, {value['probability']:.1%}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
