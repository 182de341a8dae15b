"""Names in recipes, saved systems and data files of earlier versions, for hints in error messages."""

from __future__ import annotations

SECTIONS = {"judge": "evaluation"}
"""Sections of a recipe."""
KNOWLEDGE = {"ignores": "oblivious", "carried-over": "transfer", "adapts": "adaptive"}
"""What an adversary knows of a defense."""
PARTS = {"judge": "test"}
"""Parts of a data set."""
FIELDS = {
    "queries": "batch_size",
    "chunk": "batch_size",
    "batch": "batch_size",
    "n_samples": "samples",
    "num_samples": "samples",
    "nsamples": "samples",
    "masks": "samples",
    "n_steps": "steps",
    "judge_every": "evaluate_every",
    "draws": "adapt.draws",
    "straight": "adapt.straight",
    "evade": "adapt.evade",
    "rehearse": "from_start",
}
"""Settings of components."""


def renamed(name: object, names: dict[str, str]) -> str:
    """A hint for an error's end: ``; it is called 'test' now``, or nothing where no name has changed."""
    return f"; it is called {names[name]!r} now" if isinstance(name, str) and name in names else ""
