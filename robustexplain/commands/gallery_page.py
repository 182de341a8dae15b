"""Every interpreter on the same images, as one page."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import data as data_sets
from .. import files, models, pages, plots
from ..autograd.rectifiers import Softplus
from ..defenses import Aggregate
from ..door import answer
from ..errors import InputError, UnsupportedModelError
from ..interpreters import (
    Certified,
    GradCAM,
    Gradient,
    IntegratedGradients,
    Interpreter,
    InterpreterSpec,
    KernelSmoothed,
    MeTFA,
    OfTransformed,
    RelEx,
    RTSTraining,
    Smoothed,
    Sparsified,
)
from ..interpreters.base import accepted_kinds
from ..models import Transformed
from ..registry import INTERPRETERS, Entry
from ..training import Session, Training, cross_entropy, fit
from .explain import read_image


def _of_transformed(model: Transformed) -> Interpreter:
    return OfTransformed(model, Gradient(model))


PARTS: dict[str, Callable[[nn.Module], Interpreter]] = {
    "smoothed": lambda model: Smoothed(model, Gradient(model), Softplus(3.0)),
    "kernel-smoothed": lambda model: KernelSmoothed(model, GradCAM(model)),
    "certified": lambda model: Certified(model, GradCAM(model), samples=60, grid=8),
    "sparsified": lambda model: Sparsified(model, GradCAM(model), samples=64, grid=8, bound="clopper-pearson"),
    "metfa": lambda model: MeTFA(model, GradCAM(model), samples=10),
    "of-transformed": lambda model: _of_transformed(Transformed(model, ["median-2"])),
    "relex": lambda model: RelEx(model, samples=8),
    "aggregate": lambda model: Aggregate(model, (Gradient(model), GradCAM(model), IntegratedGradients(model))),
}
"""Interpreters that are made of others, and one that costs thousands of passes, as the gallery shows them."""

SETTINGS: dict[str, Any] = {
    "rts": RTSTraining(levels=2, training=Training(epochs=14, batch_size=64, micro_batch=32, lr=5e-3)),
}
"""How interpreters that are trained are trained here, where their defaults are made for more data."""


@dataclass(frozen=True)
class Line:
    """One interpreter in a section.

    Args:
        name: registered name.
        summary: the first line of its docstring.
        paper: its source.
        maps: a picture an image, as data URIs; none if it was left out.
        ms: milliseconds an image.
        note: why it was left out.
    """

    name: str
    summary: str
    paper: str
    maps: list[str] = field(default_factory=list)
    ms: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Section:
    """The same images explained by every interpreter.

    Args:
        title: model and data.
        images: plots, as data URIs.
        captions: what is predicted on each.
        lines: one an interpreter.
    """

    title: str
    images: list[str]
    captions: list[str]
    lines: list[Line]


def write_gallery(
    out: Path, photographs: Sequence[Path], session: Session, count: int = 4, size: int = 128
) -> list[Section]:
    """Explain digits, and photographs where the weights of efficientnet-lite0 are installed, by everything there is.

    Digits are explained on a small CNN and on a small vision transformer, both trained first (about a minute).

    Args:
        out: the HTML file to write.
        photographs: image files; default those that come with scikit-image, if it is installed.
        session: progress and device.
        count: how many images a section.
        size: side of the photographs in pixels. The network was made for 224, where the sampling methods take minutes.

    Raises:
        InputError: a photograph that cannot be read.
    """
    given = [read_image(path, size=size) for path in photographs]
    digits = data_sets.load("digits")
    cnn = models.build("small-cnn", num_classes=10, in_channels=1)
    sections = [
        _digits("small-cnn", cnn, Training(epochs=8, batch_size=32, lr=1e-2), digits, session, count),
        _digits(
            "small vision transformer", _vit(), Training(epochs=25, batch_size=32, lr=2e-3), digits, session, count
        ),
    ]
    shown = _photographs(given, session, count, size)
    if shown is not None:
        sections.append(shown)
    files.write_text(out, _html(sections))
    return sections


def _vit() -> nn.Module:
    import timm

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        net = timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=4, in_chans=1, num_classes=10,
            embed_dim=48, depth=4, num_heads=3,
        )  # fmt: skip
    return models.Classifier(net, [0.3], [0.35], num_classes=10)


def _digits(
    name: str, model: nn.Module, training: Training, data: data_sets.Data, session: Session, count: int
) -> Section:
    fit(model, cross_entropy, data.train, training, name=f"{name} on digits", session=session)
    model = model.requires_grad_(False).eval()
    x, _ = data_sets.stack(data_sets.take(data.test, count))

    def trained(entry: Entry) -> Interpreter:
        assert entry.train is not None
        assert entry.settings is not None
        made: Interpreter = entry.train(model, data.train, SETTINGS.get(entry.name, entry.settings()), session=session)
        return made

    return _section(f"{name}, trained on scikit-learn's digits", model, x.to(session.device), session, trained)


def _photographs(given: Sequence[Tensor], session: Session, count: int, side: int) -> Section | None:
    try:
        model = models.load("efficientnet-lite0")
    except InputError as error:
        session.progress.say(f"no photographs: {error}")
        return None
    x = torch.cat(list(given)) if given else _bundled(side)
    if x is None:
        session.progress.say("no photographs: name some with --image, or install scikit-image, which brings a few")
        return None
    model = model.to(session.device).requires_grad_(False).eval()
    return _section(
        f"efficientnet-lite0, trained on ImageNet, at {side} pixels", model, x[:count].to(session.device), session, None
    )


def _bundled(side: int) -> Tensor | None:
    try:
        from skimage import data
    except ImportError:
        return None
    crops = []
    for name in ("chelsea", "coffee"):
        image = torch.from_numpy(getattr(data, name)()).permute(2, 0, 1).float() / 255
        edge = min(image.shape[1:])
        top, left = ((length - edge) // 2 for length in image.shape[1:])
        square = image[None, :, top : top + edge, left : left + edge]
        crops.append(F.interpolate(square, size=(side, side), mode="bicubic", antialias=True).clamp(0, 1))
    return torch.cat(crops)


def _section(
    title: str, model: nn.Module, x: Tensor, session: Session, trained: Callable[[Entry], Interpreter] | None
) -> Section:
    with torch.no_grad():
        p, c = answer(model, x).softmax(1).max(1)
    captions = [f"class {int(k)}, {float(v):.0%}" for k, v in zip(c, p, strict=True)]
    lines = []
    drawable = [entry for entry in INTERPRETERS if "images" in accepted_kinds(entry.build)]
    with session.progress.task(title, len(drawable)) as step:
        for entry in drawable:
            lines.append(_line(entry, model, x, c, trained))
            step(1)
    return Section(title, [_uri(plots.picture(image.cpu(), 112)) for image in x], captions, lines)


def _line(
    entry: Entry, model: nn.Module, x: Tensor, target: Tensor, trained: Callable[[Entry], Interpreter] | None
) -> Line:
    plain = Line(entry.name, entry.summary.replace("``", ""), entry.paper)
    try:
        if entry.train is not None and trained is None:
            return Line(**{**vars(plain), "note": "needs training data"})
        maps, ms = _explain(_make(entry, model, trained), x, target)
    except UnsupportedModelError as error:
        return Line(**{**vars(plain), "note": str(error)})
    drawn = [_uri(plots.heat_map(plots.magnitudes(m), image.cpu(), 112)) for m, image in zip(maps, x, strict=True)]
    return Line(**{**vars(plain), "maps": drawn, "ms": ms})


def _make(entry: Entry, model: nn.Module, trained: Callable[[Entry], Interpreter] | None) -> Interpreter:
    if entry.train is not None:
        assert trained is not None
        return trained(entry)
    if entry.name in PARTS:
        return PARTS[entry.name](model)
    spec = InterpreterSpec(entry.name)
    if spec.refusal is not None:
        raise UnsupportedModelError("is made of parts that the gallery does not know")
    return spec.build(model)


def _explain(interpreter: Interpreter, x: Tensor, target: Tensor) -> tuple[Tensor, float]:
    start = time.perf_counter()
    with torch.no_grad():
        maps = interpreter.explain(x, target).maps.cpu()
    return maps, (time.perf_counter() - start) * 1000 / len(x)


def _html(sections: Sequence[Section]) -> str:
    return pages.render("robustexplain.commands", "gallery.html.j2", sections=sections)


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
