"""Classifiers of scikit-learn as bytes, in skops' format: no pickle, no code, the same bytes for the same fit."""

from __future__ import annotations

import io
import json
import zipfile
from typing import Any

from ..errors import InputError

TRUSTED = (
    "sklearn.calibration._CalibratedClassifier",
    "sklearn.calibration._SigmoidCalibration",
    "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor",
    "sklearn.gaussian_process._gpc._BinaryGaussianProcessClassifierLaplace",
    "sklearn.gaussian_process.kernels.ConstantKernel",
    "sklearn.gaussian_process.kernels.Matern",
    "sklearn.gaussian_process.kernels.Product",
    "sklearn.gaussian_process.kernels.RBF",
    "sklearn.gaussian_process.kernels.Sum",
    "sklearn.gaussian_process.kernels.WhiteKernel",
    "sklearn.metrics._dist_metrics.EuclideanDistance64",
    "sklearn.metrics._dist_metrics.ManhattanDistance64",
    "sklearn.neighbors._ball_tree.BallTree",
    "sklearn.neighbors._kd_tree.KDTree",
    "sklearn.neural_network._stochastic_optimizers.AdamOptimizer",
    "sklearn.neural_network._stochastic_optimizers.SGDOptimizer",
    "sklearn.tree._tree.Tree",
)
"""What scikit-learn's classifiers are made of and skops does not trust by itself: numbers and settings, no code."""
SPARE, RATIO = 64 << 20, 100
"""The largest inflated size of an archive: a constant plus a multiple of its own size."""
_SCHEMA = "schema.json"
_EPOCH = (1980, 1, 1, 0, 0, 0)


def dumped(fitted: Any) -> bytes:
    """A classifier as bytes.

    Raises:
        InputError: for one that skops cannot store, or whose file :func:`loaded` would refuse.
    """
    from skops import io as skops

    name = type(fitted).__name__
    try:
        content = _canonical(skops.dumps(fitted))
    except Exception as error:  # skops raises what the object at hand leads to
        raise InputError(f"{name} cannot be stored without pickle: {error}") from error
    _check_types(content, name)
    return content


def loaded(content: bytes) -> Any:
    """The classifier in bytes of :func:`dumped`, or of skops.

    Raises:
        InputError: if they name a type that is not trusted, or cannot be read.
    """
    from skops import io as skops

    _check_types(content, "the stored classifier")
    try:
        return skops.loads(content, trusted=list(TRUSTED))
    except Exception as error:  # a damaged file leads into any kind of error
        raise InputError(f"the stored classifier cannot be read by this version of scikit-learn: {error}") from error


def _check_size(content: bytes, name: str) -> None:
    """Refuse what is no archive, or inflates beyond reason; nothing is inflated to find out."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            # Reading stops at the size that the directory claims, whatever the compressed bytes hold.
            total = sum(info.file_size for info in archive.infolist())
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
        raise InputError(f"{name} is damaged: it is no archive of skops: {error}") from error
    most = SPARE + RATIO * len(content)
    if total > most:
        raise InputError(f"{name} would inflate from {len(content)} to {total} bytes, more than the {most} allowed")


def _check_types(content: bytes, name: str) -> None:
    from skops import io as skops

    _check_size(content, name)
    try:
        unknown = sorted(set(skops.get_untrusted_types(data=content)) - set(TRUSTED))
    except Exception as error:
        raise InputError(f"{name} is damaged: {error}") from error
    if unknown:
        raise InputError(
            f"{name} holds types that are not trusted to be free of code: {', '.join(unknown)}; only scikit-learn's "
            "own classifiers and transformers can be stored"
        )


def _canonical(content: bytes) -> bytes:
    """The same file without what differs from run to run: addresses of objects in memory, file names, dates."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        schema = json.loads(archive.read(_SCHEMA))
        numbers: dict[int, int] = {}
        names: dict[str, str] = {}
        _renumber(schema, numbers, names)
        parts = [(new, archive.read(old)) for old, new in names.items()]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, part in [*parts, (_SCHEMA, json.dumps(schema).encode())]:
            info = zipfile.ZipInfo(name, _EPOCH)
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, part)
    return buffer.getvalue()


def _renumber(node: Any, numbers: dict[int, int], names: dict[str, str]) -> None:
    """Number objects and files in the order in which they appear; in place."""
    if isinstance(node, list):
        for item in node:
            _renumber(item, numbers, names)
    if not isinstance(node, dict):
        return
    if node.get("__loader__") == "JsonNode":
        # Whether two equal numbers are one object is up to the Python interpreter; numbers need no identity.
        node.pop("__id__", None)
    elif isinstance(node.get("__id__"), int):
        node["__id__"] = numbers.setdefault(node["__id__"], len(numbers) + 1)
    if "__loader__" in node and isinstance(node.get("file"), str):
        ending = node["file"].rpartition(".")[2]
        node["file"] = names.setdefault(node["file"], f"{len(names)}.{ending}")
    for value in node.values():
        _renumber(value, numbers, names)
