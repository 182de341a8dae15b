"""Reading what a model answers: one tensor, or a tuple, a list, a dictionary or an object that holds several."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from .errors import InputError

Name = str | int
"""An output by its key or attribute, or by its place."""


class TrainingLogits(NamedTuple):
    """The answer in train mode of a model with auxiliary heads: logits ``[B, K]``, and those of the other heads."""

    logits: Tensor
    auxiliary: tuple[Tensor, ...]


def with_auxiliary(answer: Any) -> tuple[Any, tuple[Tensor, ...]]:
    """The main logits of what a model answers in train mode, and those of its auxiliary heads.

    Auxiliary heads are recognised by name: an answer with ``logits`` and ``aux...``, as of torchvision's GoogLeNet and
    Inception v3. Any other answer is returned as it is.
    """
    if isinstance(answer, TrainingLogits):
        return answer
    logits = None if isinstance(answer, Tensor) else named(answer).get("logits")
    if not isinstance(logits, Tensor):
        return answer, ()
    heads = tuple(named(answer)[name] for name in auxiliary(answer, logits))
    return (logits, heads) if heads else (answer, ())


def auxiliary(answer: Any, logits: Tensor) -> tuple[str, ...]:
    """The names of an answer's auxiliary heads: ``aux...``, of the shape of its logits."""
    found = ((n, v) for n, v in named(answer).items() if n.startswith("aux") and isinstance(v, Tensor))
    return tuple(name for name, value in found if value.shape == logits.shape)


def read(answer: Any, name: Name, who: str = "the model") -> Tensor:
    """One output of an answer, by key, attribute or place.

    Raises:
        InputError: there is none of that name, or it is no tensor; lists what there is.
    """
    if isinstance(answer, Tensor):
        raise InputError(f"{who} answers with one tensor {list(answer.shape)}: it has no output {name!r} to name")
    if not has(answer, name):
        raise InputError(f"{who} answers with a {type(answer).__name__} that has no output {name!r}{offered(answer)}")
    value = _at(answer, name)
    if not isinstance(value, Tensor):
        raise InputError(
            f"the output {name!r} of {who} must be a tensor of logits, got {type(value).__name__}{offered(answer)}"
        )
    return value


def named(answer: Any) -> dict[str, Any]:
    """The outputs of an answer by name: keys of a dictionary, fields of a named tuple or attributes of an object."""
    if isinstance(answer, Mapping):
        return {key: value for key, value in answer.items() if isinstance(key, str)}
    if isinstance(answer, tuple):
        return dict(zip(getattr(answer, "_fields", ()), answer, strict=False))
    return {n: v for n, v in getattr(answer, "__dict__", {}).items() if not n.startswith("_")}


def outputs(answer: Any) -> Iterator[tuple[Name, Any]]:
    """The outputs of an answer, each with the name that :class:`Output` takes."""
    found = named(answer)
    if found:
        yield from found.items()
    elif isinstance(answer, (tuple, list)):
        yield from enumerate(answer)


def has(answer: Any, name: Name) -> bool:
    """Whether an answer has an output of that name."""
    if isinstance(name, str):
        return name in named(answer)
    if isinstance(answer, Mapping) and name in answer:
        return True
    return isinstance(answer, (tuple, list, Mapping)) and -len(answer) <= name < len(answer)


def _at(answer: Any, name: Name) -> Any:
    if isinstance(name, str):
        return named(answer)[name]
    if isinstance(answer, Mapping):
        return answer[name] if name in answer else list(answer.values())[name]
    return answer[name]


def offered(answer: Any) -> str:
    """The outputs that an answer has, as the end of a message; empty where it has none by name or place."""
    found = [f"{n!r} ({_shown(value)})" for n, value in outputs(answer)]
    return f"; it has: {', '.join(found[:12])}" if found else ""


def _shown(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__
