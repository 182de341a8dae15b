"""How cells are checked before they are believed: what is run for it, and from where on a cell is flagged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..errors import InputError
from ..fields import Count, Fraction, Natural, Positive, check_fields
from ..schema import make


@dataclass(frozen=True)
class Auditing:
    """The audit of a matrix's cells.

    ``audit: full`` alone stands for ``{level: full}``. The thresholds are proposals of ours, but for those with a
    source. In a recipe ``raises`` is written ``raise``.

    Args:
        level: ``cheap``: what follows from the figures, and some passes of each row; ``full``: also each attack again
            on ``images`` with twice the steps, twice the eps, eps 1 and five restarts, where it has such settings,
            beside random draws, and with the draws of a random classifier frozen (Carlini et al. 2019, section 5).
        planted: whether each attack must find maps and predictions that are known to be reachable; default: in a
            ``full`` audit, and maps in a cheap one too, of attacks on a defense that none of those who know it hurts.
        raises: whether an attack that wins more with twice the steps takes them on all inputs, up to eight times the
            steps that were asked for.
        images: how many images each of these looks at.
        output_change: L2 by which repeated logits of one input may differ (as in AutoAttack's checks).
        map_change: the same of maps, largest difference of any pixel.
        stalled: share of searches that may never improve.
        few_steps: an iterative attack of fewer steps is called weak.
        undefended: share that an attack must reach on the undefended system.
        random_factor: by how much an attack must surpass random perturbations.
        transfer_gap: by how much the same attack may do better without knowledge of the defense.
        false_alarms: share of clean or of harmless inputs that may raise the alarm beyond chance.
        significance: p-value below which two columns differ.
        steps_gain: what twice the steps may add.
        restarts_gain: what five restarts may add.
        eps_loss: what twice the eps may take away.
        unbounded: share that eps 1 must reach.
        unhurt: share below which a defense's worst figure under attackers who know it is suspected.
        found: share of planted maps or predictions that an attack must find (Zimmermann et al. 2022).
        fixed_noise: share that must be misled where a random classifier's draws are frozen.
        draws: random perturbations of each input, of which the best is set against the attack.
        unstable: share of inputs at which a small step along the gradient may not change the margin as it promises.
        weights: share of inputs whose map may stay where the weights are drawn anew.
    """

    level: Literal["cheap", "full"] = "cheap"
    planted: bool | None = None
    raises: bool = False
    images: Count = 16
    output_change: Positive = 1e-4
    map_change: Positive = 1e-5
    stalled: Fraction = 0.05
    few_steps: Natural = 20
    undefended: Fraction = 0.9
    random_factor: Positive = 1.5
    transfer_gap: Fraction = 0.02
    false_alarms: Fraction = 0.1
    significance: Fraction = 0.01
    steps_gain: Fraction = 0.01
    restarts_gain: Fraction = 0.03
    eps_loss: Fraction = 0.01
    unbounded: Fraction = 0.99
    unhurt: Fraction = 0.1
    found: Fraction = 0.95
    fixed_noise: Fraction = 0.95
    draws: Count = 50
    unstable: Fraction = 0.1
    weights: Fraction = 0.5

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def plants(self) -> bool:
        """Whether maps and predictions are planted."""
        return self.level == "full" if self.planted is None else self.planted

    @classmethod
    def from_entry(cls, entry: Any, path: str) -> Auditing:
        """What a recipe's ``audit`` says: a level, or settings.

        Raises:
            InputError: an unknown level or setting.
        """
        if isinstance(entry, dict) and "raise" in entry:
            if "raises" in entry:
                raise InputError(f"{path}.raises: it is written raise, and stands there too")
            entry = {("raises" if key == "raise" else key): value for key, value in entry.items()}
        made: Auditing = make(cls, {"level": entry} if isinstance(entry, str) else entry or {}, path)
        return made
