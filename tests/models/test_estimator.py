"""scikit-learn's classifiers as models: what they say, no gradient in silence, stored without pickle."""

from __future__ import annotations

import copy
import io
import json
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.calibration import CalibratedClassifierCV
from sklearn.ensemble import GradientBoostingClassifier, HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.svm import SVC, LinearSVC
from sklearn.tree import DecisionTreeClassifier
from torch import Tensor, nn

from robustexplain import System
from robustexplain.errors import InputError, NotDifferentiableError
from robustexplain.interpreters import Gradient
from robustexplain.models import Estimator, ModelSpec
from robustexplain.models import skops_file as stored
from robustexplain.models.estimator import log_probabilities
from robustexplain.registry import PARTS


def rows(count: int = 90) -> Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(0)) * 3 + 1


def labels(x: Tensor, classes: int) -> np.ndarray[Any, Any]:
    return ((x[:, 0] > 1).long() + (x[:, 1] > 3).long() * (classes == 3)).numpy()


KINDS: dict[str, Any] = {
    "forest": RandomForestClassifier(5, random_state=0),
    "tree": DecisionTreeClassifier(random_state=0),
    "boosting": GradientBoostingClassifier(n_estimators=4, random_state=0),
    "histogram-boosting": HistGradientBoostingClassifier(max_iter=4, random_state=0),
    "logistic": LogisticRegression(),
    "pipeline": make_pipeline(StandardScaler(), LogisticRegression()),
    "bayes": GaussianNB(),
    "neighbours": KNeighborsClassifier(),
    "mlp": MLPClassifier((8,), max_iter=20, random_state=0),
    "calibrated": CalibratedClassifierCV(LinearSVC(random_state=0), cv=2),
    "svm": SVC(),
    "ridge": RidgeClassifier(),
}


def fitted(kind: str = "forest", classes: int = 2, **options: Any) -> Any:
    from sklearn.base import clone

    with np.errstate(all="ignore"):
        return clone(KINDS[kind]).set_params(**options).fit(rows().double().numpy(), labels(rows(), classes))


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_says_what_its_classifier_says(kind: str, classes: int) -> None:
    classifier, x = fitted(kind, classes), rows()
    logits = Estimator(classifier)(x)
    assert logits.shape == (90, classes)
    assert logits.dtype == torch.float32
    assert logits.argmax(1).tolist() == classifier.predict(x.double().numpy()).tolist()
    torch.testing.assert_close(logits.exp().sum(1), torch.ones(90), rtol=1e-5, atol=0)
    if hasattr(classifier, "predict_proba"):
        expected = torch.from_numpy(classifier.predict_proba(x.double().numpy())).float()
        torch.testing.assert_close(logits.softmax(1), expected, rtol=1e-5, atol=1e-6)


def test_a_probability_of_zero_has_a_finite_logarithm() -> None:
    logits = Estimator(fitted("tree"))(rows())
    assert torch.isfinite(logits).all()
    assert logits.min() == pytest.approx(math.log(1e-12))
    assert logits.max() == 0


class Decided:
    """Two classes by the first column, as a distance."""

    classes_ = np.array([0, 1])

    def decision_function(self, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.asarray(x[:, 0])


class Certain:
    """Class names by the first column, and nothing else."""

    classes_ = np.array(["bad", "good"])

    def predict(self, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.where(x[:, 0] > 0, "good", "bad")


def test_a_distance_becomes_its_sigmoid_and_a_bare_prediction_a_certainty() -> None:
    x = torch.tensor([[2.0], [-0.5]], dtype=torch.float64)
    said = Estimator(Decided())(x).exp()
    expected = [[1 - 1 / (1 + math.exp(-v)), 1 / (1 + math.exp(-v))] for v in (2.0, -0.5)]
    torch.testing.assert_close(said, torch.tensor(expected, dtype=torch.float64))
    assert Estimator(Certain())(x).exp().round(decimals=9).tolist() == [[0, 1], [1, 0]]


def test_device_and_dtype_follow_the_input_and_rows_are_independent() -> None:
    model, x = Estimator(fitted("logistic")), rows()
    exact = model(x.double())
    assert exact.dtype == torch.float64
    assert model(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(model(x), exact.float())
    torch.testing.assert_close(torch.cat([model(row[None]) for row in x.double()]), exact, rtol=1e-12, atol=1e-12)


def test_columns_choose_what_the_classifier_sees() -> None:
    wide = torch.cat([torch.full((90, 2), 1e9), rows().flip(1)], 1)
    narrow = Estimator(fitted(), columns=[5, 4, 3, 2])
    assert torch.equal(narrow(wide), Estimator(fitted())(rows()))
    assert (narrow.in_features, Estimator(fitted()).in_features, narrow.num_classes) == (None, 4, 2)
    with pytest.raises(InputError, match="sees column 5, but x has 4 columns"):
        narrow(rows())


def test_a_classifier_fitted_on_a_data_frame_gets_its_names_back() -> None:
    pandas = pytest.importorskip("pandas")
    from sklearn.compose import make_column_transformer

    frame = pandas.DataFrame(rows().double().numpy(), columns=list("abcd"))
    only = make_column_transformer((StandardScaler(), ["b", "a"]))
    classifier = make_pipeline(only, LogisticRegression()).fit(frame, labels(rows(), 2))
    said = Estimator(classifier)(rows().double()).exp()
    torch.testing.assert_close(said, torch.from_numpy(classifier.predict_proba(frame)))
    again = Estimator()
    again.load_state_dict(Estimator(classifier).state_dict())
    assert torch.equal(again(rows().double()).exp(), said)


def test_a_gradient_through_a_classifier_is_refused_and_not_absent() -> None:
    model, x = Estimator(fitted()), rows(5).requires_grad_()
    logits = model(x)
    assert logits.requires_grad, "detached logits would give a gradient of the rest of a graph, silently"
    with pytest.raises(NotDifferentiableError, match=r"RandomForestClassifier.*no gradient.*shap-tabular.*'mlp'"):
        logits.sum().backward()
    with pytest.raises(NotDifferentiableError, match="no gradient"):
        torch.autograd.grad((x * model(x).sum()).sum(), x)
    with pytest.raises(NotDifferentiableError, match="no gradient"):
        Gradient(model).explain(x)
    with torch.no_grad():
        assert torch.equal(model(x), logits)
    assert not model(x.detach()).requires_grad
    assert Estimator.differentiable is False


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Estimator(RandomForestClassifier()), r"RandomForestClassifier has no classes_.*call fit"),
        (lambda: Estimator(StandardScaler()), "must be a classifier of scikit-learn"),
        (lambda: Estimator(fitted(), columns=[0, 1]), "was fitted on 4 columns, but columns names 2"),
        (lambda: Estimator(fitted(), columns=[0, 1, 2, -1]), "columns must be indices of at least 0"),
        (lambda: Estimator(fitted())(torch.zeros(2, 3)), r"x must have shape \[B, 4\]"),
        (lambda: Estimator(fitted())(torch.zeros(2, 3, 4, 4)), r"x must have shape \[B, D\]"),
        (lambda: Estimator()(torch.zeros(2, 3)), "holds no classifier"),
        (lambda: Estimator().num_classes, "holds no classifier"),
    ],
)
def test_what_is_no_fitted_classifier_is_refused(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_an_answer_of_another_shape_is_refused() -> None:
    four = KINDS["svm"].__class__(decision_function_shape="ovo")
    x = torch.cat([rows(), rows() + 20]).double().numpy()
    y = np.arange(180) % 4
    with pytest.raises(InputError, match=r"SVC.decision_function must give one number a class, \[180, 4\], got"):
        log_probabilities(four.fit(x, y), x)
    with pytest.raises(InputError, match="two classes or more"):
        Estimator(DecisionTreeClassifier().fit(x, np.stack([y, y], 1)))


# Stored ---------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_a_system_on_a_classifier_is_saved_and_loaded_to_the_bit(kind: str, tmp_path: Path) -> None:
    model = Estimator(fitted(kind, 3), columns=[3, 2, 1, 0])
    loaded = System.load(System(model, Gradient(model)).save(tmp_path)).model
    assert isinstance(loaded, Estimator)
    assert loaded.columns == [3, 2, 1, 0]
    assert loaded is not model
    assert torch.equal(loaded(rows().flip(1)), Estimator(fitted(kind, 3))(rows()))
    assert b"pickle" not in b"".join(path.read_bytes() for path in tmp_path.iterdir())


class Guard(nn.Module):
    """A classifier that watches over another: what piece of a larger model an Estimator may be."""

    def __init__(self) -> None:
        super().__init__()
        self.spec = ModelSpec("test-guard")
        self.parts = nn.ModuleList([Estimator(), Estimator()])
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.parts[0](x) * self.scale + self.parts[1](x)
        return logits


def test_classifiers_inside_another_module_are_stored_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Guard().eval()
    model.parts = nn.ModuleList([Estimator(fitted("forest")), Estimator(fitted("logistic"))])
    assert set(model.state_dict()) == {"scale", "parts.0.estimator", "parts.1.estimator"}
    monkeypatch.setitem(PARTS._entries, "test-guard", copy.copy(PARTS.get("estimator")))
    object.__setattr__(PARTS._entries["test-guard"], "build", Guard)
    folder = System(model, Gradient(model)).save(tmp_path)
    loaded = System.load(folder).model
    assert torch.equal(loaded(rows()), model(rows()))
    with pytest.raises(RuntimeError, match=r"Missing key.*parts\.1\.estimator"):
        Guard().load_state_dict({k: v for k, v in model.state_dict().items() if "1" not in k})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*parts\.0\.more"):
        Guard().load_state_dict({**model.state_dict(), "parts.0.more": torch.zeros(1)})


def test_the_same_fit_gives_the_same_bytes_and_another_does_not() -> None:
    """Addresses in memory, random file names and dates would make every run's weights look new."""
    one, same, other = (Estimator(fitted(random_state=seed)).state_dict()["estimator"] for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_copy_and_another_load_leave_nothing_behind() -> None:
    first, second = Estimator(fitted("forest")), Estimator(fitted("logistic"))
    expected = second(rows())
    first.load_state_dict(second.state_dict())
    assert torch.equal(first(rows()), expected)
    assert torch.equal(first.state_dict()["estimator"], second.state_dict()["estimator"])
    assert torch.equal(copy.deepcopy(first)(rows()), expected)


def shout(x: Any) -> Any:
    return x


class Homemade(LogisticRegression):
    """Somebody's own subclass: code that a loaded file must not name."""


def test_what_could_hold_code_is_not_stored(tmp_path: Path) -> None:
    x, y = rows().numpy(), labels(rows(), 2)
    for classifier in (
        Homemade().fit(x, y),
        make_pipeline(FunctionTransformer(shout), LogisticRegression()).fit(x, y),
    ):
        model = Estimator(classifier)
        assert model(rows()).shape == (90, 2)
        with pytest.raises(InputError, match=r"types that are not trusted to be free of code: .*estimator"):
            System(model, Gradient(model)).save(tmp_path / "system")
    model = Estimator(make_pipeline(FunctionTransformer(lambda x: x), LogisticRegression()).fit(x, y))
    with pytest.raises(InputError):
        model.state_dict()
    model = Estimator(Decided())
    with pytest.raises(InputError):
        model.state_dict()


def tampered(content: bytes, change: Any) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    schema = json.loads(parts["schema.json"])
    change(schema)
    parts["schema.json"] = json.dumps(schema).encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    return buffer.getvalue()


def test_a_planted_function_is_refused_before_it_is_looked_up() -> None:
    good = stored.dumped(fitted("logistic"))
    bad = tampered(good, lambda s: s.update(__class__="system", __module__="os", __loader__="FunctionNode"))
    state = {"estimator": torch.frombuffer(bytearray(bad), dtype=torch.uint8)}
    with pytest.raises(InputError, match=r"stored classifier (holds types.*os\.system|is damaged)"):
        Estimator().load_state_dict(state)
    typed = tampered(good, lambda s: s.update(__class__="Popen", __module__="subprocess"))
    with pytest.raises(InputError, match=r"holds types that are not trusted.*subprocess\.Popen"):
        stored.loaded(typed)


@pytest.mark.parametrize(
    "content",
    [torch.zeros(10, dtype=torch.uint8), torch.zeros(0, dtype=torch.uint8), torch.zeros(10), torch.zeros(2, 2)],
)
def test_damaged_bytes_are_refused(content: Tensor) -> None:
    with pytest.raises(InputError, match=r"stored classifier is damaged|must be bytes"):
        Estimator().load_state_dict({"estimator": content})


def test_a_stored_scaler_is_no_classifier() -> None:
    content = stored.dumped(StandardScaler().fit(rows().numpy()))
    with pytest.raises(InputError, match="must be a classifier"):
        Estimator().load_state_dict({"estimator": torch.frombuffer(bytearray(content), dtype=torch.uint8)})
