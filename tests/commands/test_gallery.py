"""The gallery shows every interpreter, or says why it does not."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from robustexplain import models, plots
from robustexplain.cli import app
from robustexplain.commands import gallery_page as gallery
from robustexplain.errors import MissingDataError
from robustexplain.interpreters.base import accepted_kinds
from robustexplain.registry import INTERPRETERS
from robustexplain.training import Training


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """An epoch instead of twenty, few samples instead of thousands; a tiny classifier in the place of lite0."""
    cheap = {
        "rise": {"samples": 20},
        "mask": {"steps": 3},
        "relex": {"steps": 2, "samples": 2},
        "lime": {"samples": 20},
        "kernel-shap": {"samples": 100},
        "captum": {"options": {"n_steps": 2}},
        "occlusion": {"window": 16, "stride": 16},
    }

    def make(entry: object, model: nn.Module, trained: object) -> object:
        name = entry.name  # type: ignore[attr-defined]
        return entry.build(model, **cheap[name]) if name in cheap else plain(entry, model, trained)  # type: ignore

    plain = gallery._make
    monkeypatch.setattr(gallery, "_make", make)
    monkeypatch.setattr(gallery, "Training", lambda **given: Training(**{**given, "epochs": 1}))
    monkeypatch.setitem(gallery.SETTINGS, "rts", gallery.RTSTraining(levels=2, training=Training(epochs=1)))
    tiny = models.build("small-cnn", num_classes=5, in_channels=3, seed=1)
    monkeypatch.setattr(models, "load", lambda name: tiny)


def test_the_page_shows_every_interpreter_or_says_why_not(tmp_path: Path, quick: None) -> None:
    photograph = tmp_path / "cat.png"
    Image.fromarray((torch.rand(40, 50, 3) * 255).byte().numpy()).save(photograph)
    out = tmp_path / "page.html"
    arguments = ["gallery", "--out", str(out), "--image", str(photograph), "--count", "2", "--size", "32"]
    done = CliRunner().invoke(app, [*arguments, "--device", "cpu"])
    assert done.exit_code == 0, done.output
    names = [entry.name for entry in INTERPRETERS if "images" in accepted_kinds(entry.build)]
    page = out.read_text()
    assert all(f'<th scope="row" class="name">{name}' in page for name in names)
    assert f"small-cnn, trained on scikit-learn's digits: {len(names) - 5} of {len(names)}" in done.output
    for reason in (
        "made of parts that the gallery does not know",
        "computes no self-attention",
        "is no self-explaining network",
        "take a convolutional network as the encoder",
        "needs training data",
    ):
        assert reason in page
    # Two digits on two networks, one photograph; every map that is shown is a picture of its own.
    assert page.count('alt="image"') == 5
    assert page.count('alt="gradcam"') == 5
    assert page.count('alt="attention-rollout"') == 2


def test_a_photograph_that_is_not_there_is_an_error(tmp_path: Path, quick: None) -> None:
    with pytest.raises(MissingDataError, match="no image at"):
        gallery.write_gallery(tmp_path / "page.html", [tmp_path / "no.png"], gallery.Session(), count=1)
    assert not (tmp_path / "page.html").exists()


def test_one_bright_pixel_does_not_leave_the_rest_black() -> None:
    attribution = torch.linspace(-1, 1, 400).reshape(20, 20)
    attribution[0, 0] = 100
    assert float(plots.magnitudes(attribution).max()) < 1.1
    assert not plots.magnitudes(torch.zeros(4, 4)).any()


def test_no_label_of_a_matrix_is_cut_off() -> None:
    for name in ("shap k-means 10", "an interpreter with a long name"):
        drawn = plots.matrix(["a row " * 8], ["lime", name], np.zeros((1, 2)), [["0", "0"]], "neither")
        pixels = np.asarray(Image.open(io.BytesIO(drawn)).convert("L"))
        assert pixels.min() < 100
        assert all((edge == 255).all() for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))


def test_long_labels_leave_the_cells_of_a_matrix_their_width() -> None:
    rows, columns = ["a manipulation (of one of the interpreters): what is measured of it"] * 2, ["one", "two"]
    figure = plots.matrix_figure(rows, columns, np.zeros((2, 2)), [["0.01"] * 2] * 2, "neither")
    figure.draw_without_rendering()
    assert figure.axes[0].get_position().width * figure.get_size_inches()[0] > 2
