"""Any fitted scikit-learn classifier as a model that systems deploy, stored without pickle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InputError, NotDifferentiableError
from ..registry import PARTS
from .classifier import ModelSpec
from .skops_file import dumped, loaded

LEAST = 1e-12
"""Probabilities below it count as it: its logarithm is finite."""
STATE = "estimator"
"""The key of the stored classifier in a state dict."""


class Estimator(nn.Module):
    """A fitted scikit-learn classifier as a model: rows ``[B, D]`` to logits ``[B, K]``, without a gradient.

    Logits are log-probabilities, so that their softmax is what the classifier says: the logarithm of
    ``predict_proba`` (at least 1e-12); without one, the log-softmax of ``decision_function`` (for two classes, of 0 and
    the decision); without either, the logarithm of 1 for what ``predict`` says. Logit ``k`` is class
    ``fitted.classes_[k]``. Their largest is what ``predict`` says, unless a classifier disagrees with its own
    probabilities (scikit-learn's ``NearestCentroid``, and ``SVC`` with ``probability=True``).

    The state dict holds the classifier in skops' format, as one uint8 tensor: no pickle, no code. It can stand inside
    another module, and one without a classifier takes whichever a state dict holds.

    Args:
        fitted: the classifier; a pipeline may stand before it. ``None`` for one that a state dict will fill.
        columns: the columns of ``x`` that it sees, in its order; default all.

    Raises:
        InputError: for what is no classifier or not fitted, or columns that are not one number each of its features.
    """

    differentiable: ClassVar[bool] = False
    """Whether logits carry a gradient to ``x``. Asking for one raises ``NotDifferentiableError``."""

    def __init__(self, fitted: Any = None, columns: Sequence[int] | None = None) -> None:
        super().__init__()
        if columns is not None and (not columns or any(not _is_index(c) for c in columns)):
            raise InputError(f"columns must be indices of at least 0, got {columns!r}")
        self.columns = None if columns is None else [int(c) for c in columns]
        self.spec = ModelSpec("estimator", {"columns": self.columns})
        self._content: Tensor | None = None
        self._fitted: Any = None
        if fitted is not None:
            self._take(fitted)
        self.eval()

    @property
    def fitted(self) -> Any:
        """The classifier.

        Raises:
            InputError: if there is none yet.
        """
        if self._fitted is None:
            raise InputError("this Estimator holds no classifier: make it with Estimator(fitted), or load a state dict")
        return self._fitted

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.fitted.classes_)

    @property
    def in_features(self) -> int | None:
        """D, if the classifier uses all columns and has their number."""
        count = getattr(self.fitted, "n_features_in_", None) if self.columns is None else None
        return None if count is None else int(count)

    def forward(self, x: Tensor) -> Tensor:
        """Log-probabilities ``[B, K]`` of rows ``[B, D]``, on the device and in the dtype of ``x``.

        Raises:
            InputError: for another shape than the classifier was fitted on.
            NotDifferentiableError: later, when a gradient is taken through it.
        """
        if x.dim() != 2:
            raise InputError(f"x must have shape [B, D], rows of a table, got {list(x.shape)}")
        if torch.is_grad_enabled() and x.requires_grad:
            logits: Tensor = _Opaque.apply(x, self)
            return logits
        return self._logits(x)

    def _logits(self, x: Tensor) -> Tensor:
        # In float64, as scikit-learn computes; exact for rows of lower precision.
        rows = self._seen(x).detach().to("cpu", torch.float64).numpy()
        return torch.from_numpy(log_probabilities(self.fitted, self._named(rows))).to(x.device, x.dtype)

    def _seen(self, x: Tensor) -> Tensor:
        if self.columns is not None and max(self.columns) >= x.shape[1]:
            raise InputError(f"the classifier sees column {max(self.columns)}, but x has {x.shape[1]} columns")
        seen = x if self.columns is None else x[:, self.columns]
        count = getattr(self.fitted, "n_features_in_", seen.shape[1])
        if seen.shape[1] != count:
            name = type(self.fitted).__name__
            raise InputError(f"x must have shape [B, {count}], the columns {name} was fitted on, got {list(x.shape)}")
        return seen

    def _named(self, rows: np.ndarray[Any, Any]) -> Any:
        # A classifier that was fitted on a data frame may choose its columns by name.
        names = getattr(self.fitted, "feature_names_in_", None)
        if names is None:
            return rows
        try:
            import pandas
        except ImportError as error:
            raise InputError(
                "this classifier was fitted on a data frame, which needs pandas: pip install 'robustexplain[tabular]'"
            ) from error
        return pandas.DataFrame(rows, columns=list(names))

    def _take(self, fitted: Any) -> None:
        name = type(fitted).__name__
        if not any(hasattr(fitted, word) for word in ("predict_proba", "decision_function", "predict")):
            raise InputError(f"fitted must be a classifier of scikit-learn, with predict_proba or predict, got {name}")
        classes = getattr(fitted, "classes_", None)
        if classes is None:
            raise InputError(f"{name} has no classes_: it is no classifier, or not fitted; call fit(x, y) first")
        if isinstance(classes, list) or np.ndim(classes) != 1 or len(classes) < 2:
            raise InputError(f"{name} must tell two classes or more apart, one target, got classes_ {classes!r}")
        count = getattr(fitted, "n_features_in_", None)
        if self.columns is not None and count is not None and len(self.columns) != count:
            raise InputError(f"{name} was fitted on {count} columns, but columns names {len(self.columns)}")
        self._fitted, self._content = fitted, None

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self._fitted is None:
            return
        if self._content is None:
            self._content = torch.frombuffer(bytearray(dumped(self._fitted)), dtype=torch.uint8)
        destination[prefix + STATE] = self._content

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        content = state_dict.get(prefix + STATE)
        # Lengths differ from classifier to classifier: torch's own loading would refuse another one.
        unexpected_keys += [k for k in state_dict if k.startswith(prefix) and k != prefix + STATE]
        if content is None:
            missing_keys.append(prefix + STATE)
            return
        if not isinstance(content, Tensor) or content.dtype != torch.uint8 or content.dim() != 1:
            raise InputError(f"{prefix + STATE} must be bytes, a uint8 tensor of one dimension")
        self._take(loaded(content.cpu().numpy().tobytes()))
        self._content = content.cpu().clone()


PARTS.register("estimator")(Estimator)


class _Opaque(torch.autograd.Function):
    """Logits that are attached to ``x`` so that a gradient is refused: detached ones would be silently wrong."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, estimator: Estimator) -> Tensor:
        ctx.name = type(estimator.fitted).__name__
        return estimator._logits(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotDifferentiableError(
            f"{ctx.name} is a scikit-learn classifier and has no gradient: explain it with a method that only asks for "
            "predictions, such as lime-tabular or shap-tabular, or deploy a network (models.load('mlp', ...))"
        )


def log_probabilities(fitted: Any, rows: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """``[B, K]``: the logarithm of a fitted classifier's probabilities for ``rows``; see :class:`Estimator`.

    Raises:
        InputError: for an answer that is not one number a class.
    """
    count, name = len(fitted.classes_), type(fitted).__name__
    if hasattr(fitted, "predict_proba"):
        outputs = np.asarray(fitted.predict_proba(rows), dtype=np.float64)
        _check_answer(outputs, (len(rows), count), name, "predict_proba")
        return np.asarray(np.log(np.maximum(outputs, LEAST)))
    if hasattr(fitted, "decision_function"):
        outputs = np.asarray(fitted.decision_function(rows), dtype=np.float64)
        if count == 2 and outputs.ndim == 1:
            outputs = np.stack([np.zeros_like(outputs), outputs], 1)
        _check_answer(outputs, (len(rows), count), name, "decision_function")
        return np.asarray(torch.from_numpy(outputs).log_softmax(1).numpy())
    certain = np.asarray(fitted.predict(rows))[:, None] == np.asarray(fitted.classes_)[None]
    _check_answer(certain, (len(rows), count), name, "predict")
    return np.asarray(np.log(np.where(certain, 1.0, LEAST)))


def _check_answer(outputs: np.ndarray[Any, Any], expected: tuple[int, int], name: str, method: str) -> None:
    if outputs.shape != expected:
        raise InputError(f"{name}.{method} must give one number a class, {list(expected)}, got {list(outputs.shape)}")
    if not np.isfinite(outputs).all():
        raise InputError(f"{name}.{method} gave NaN or infinity")


def _is_index(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and int(value) >= 0
