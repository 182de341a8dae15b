"""The words of a report, with links to the papers that they are from and to the documentation."""

from __future__ import annotations

from typing import NamedTuple

from ..registry import ATTACKS, DEFENSES, INTERPRETERS
from .results import Results

DOCS = "https://github.com/robustexplain/robustexplain/tree/main/docs"


class Term(NamedTuple):
    """A word: what it means, its paper's short name and address (empty: none), its page of the documentation."""

    word: str
    means: str
    paper: str = ""
    link: str = ""
    page: str = ""


GENERAL = (
    Term(
        "worst case",
        "the share of inputs on which at least one attacker of the matrix won. Rows are ranked by it.",
        "Carlini et al. 2019",
        "https://arxiv.org/abs/1902.06705",
        "concepts.md",
    ),
    Term(
        "joint success",
        "the prediction is what the adversary wants, the map is plausible, and no alarm is raised.",
        "Zhang et al. 2020",
        "https://arxiv.org/abs/1812.00891",
        "metrics.md",
    ),
    Term(
        "map",
        "an explanation: how much each pixel, or each column of a table, counts for the prediction.",
        page="interpreters.md",
    ),
    Term(
        "plausible",
        "a map that is no further from the one it should resemble than harmless changes move it.",
        page="metrics.md",
    ),
    Term(
        "harmless changes",
        "what reaches a system with no adversary, such as noise or JPEG: each row is calibrated on them.",
        page="recipes.md",
    ),
    Term(
        "separation",
        "area under the ROC curve of the maps' distance, attacked against harmless; 0.5: nobody can tell.",
        page="metrics.md",
    ),
    Term(
        "ROC curve",
        "what share of attacked inputs a threshold finds, against the share of harmless ones it takes for such.",
    ),
    Term(
        "eps",
        "how far an attack may change a pixel, in units of the range from 0 to 1 (8/255 is eight grey levels of 256).",
    ),
    Term(
        "steps",
        "iterations of an attack's search; too few, and a system looks robust that is not.",
        "Carlini et al. 2019",
        "https://arxiv.org/abs/1902.06705",
    ),
    Term("oblivious", "an adversary who takes the deployed system for undefended.", page="concepts.md"),
    Term("transfer", "an adversary who crafts on an undefended system of its own.", page="concepts.md"),
    Term(
        "adaptive",
        "an adversary who knows the defense and attacks through it.",
        "Athalye et al. 2018",
        "https://arxiv.org/abs/1802.00420",
        "concepts.md",
    ),
    Term(
        "IoU",
        "overlap of the bright parts of two maps, each rescaled to 0 to 1 and cut at a threshold.",
        page="metrics.md",
    ),
    Term(
        "L1, L2",
        "mean absolute, and root mean square, difference of two maps that are rescaled to 0 to 1.",
        page="metrics.md",
    ),
    Term(
        "95% interval",
        "exact (Clopper and Pearson 1934) for shares; by bootstrap over inputs for means.",
        page="concepts.md",
    ),
    Term(
        "p, Holm's correction",
        "the chance of so large a difference where there is none (McNemar's exact test on the same inputs; of several "
        "trainings, by the bootstrap over them and the inputs), "
        "made larger for the number of comparisons (Holm 1979).",
    ),
    Term(
        "in doubt",
        "hatched: a check found that the attack may have been too weak, so that the cell says nothing of the defense.",
        "Carlini et al. 2019",
        "https://arxiv.org/abs/1902.06705",
        "concepts.md",
    ),
    Term(
        "dot",
        "where everything was trained several times, the figure of one training (each under another seed).",
        page="concepts.md",
    ),
    Term("false alarm", "an alarm on a clean or a harmlessly changed input.", page="production.md"),
    Term(
        "latency",
        "time until one input alone is answered and explained; an input's share of a batch is shorter.",
        page="production.md",
    ),
)

COMPONENTS = (
    Term(
        "adv2",
        "forges the prediction and keeps the map.",
        "Zhang et al. 2020",
        "https://arxiv.org/abs/1812.00891",
        "attacks.md",
    ),
    Term(
        "pgd",
        "projected gradient descent on the prediction alone.",
        "Madry et al. 2018",
        "https://arxiv.org/abs/1706.06083",
        "attacks.md",
    ),
    Term(
        "auto",
        "a fixed ensemble of attacks, each tried on the inputs that still hold, after the model of AutoAttack.",
        "Croce and Hein 2020",
        "https://arxiv.org/abs/2003.01690",
        "attacks.md",
    ),
    Term("spsa", "a search without gradients.", "Uesato et al. 2018", "https://arxiv.org/abs/1802.05666", "attacks.md"),
    Term(
        "dombrowski",
        "moves the map to a wanted one and keeps the prediction.",
        "Dombrowski et al. 2019",
        "https://arxiv.org/abs/1906.07983",
        "attacks.md",
    ),
    Term(
        "ghorbani",
        "moves the map and keeps the prediction.",
        "Ghorbani et al. 2019",
        "https://arxiv.org/abs/1710.10547",
        "attacks.md",
    ),
    Term("noise", "random changes of the same size: a control, no search.", page="attacks.md"),
    Term("clean", "the inputs as they are: no attack, and no evidence for a defense.", page="attacks.md"),
    Term(
        "gradient",
        "the gradient of the class score.",
        "Simonyan et al. 2014",
        "https://arxiv.org/abs/1312.6034",
        "interpreters.md",
    ),
    Term("cam", "class activation maps.", "Zhou et al. 2016", "https://arxiv.org/abs/1512.04150", "interpreters.md"),
    Term(
        "gradcam",
        "gradient-weighted class activation maps.",
        "Selvaraju et al. 2017",
        "https://arxiv.org/abs/1610.02391",
        "interpreters.md",
    ),
    Term(
        "rts",
        "a network trained to mask what the prediction needs.",
        "Dabkowski and Gal 2017",
        "https://arxiv.org/abs/1705.07857",
        "interpreters.md",
    ),
    Term(
        "smoothgrad",
        "gradients averaged over noisy copies.",
        "Smilkov et al. 2017",
        "https://arxiv.org/abs/1706.03825",
        "interpreters.md",
    ),
    Term(
        "aid",
        "trains an interpreter on attacked inputs so that their maps stand out.",
        "Zhang et al. 2020",
        "https://arxiv.org/abs/1812.00891",
        "zoo.md",
    ),
    Term(
        "beta-smoothing",
        "explains the network with a softplus in place of its rectifiers.",
        "Dombrowski et al. 2019",
        "https://arxiv.org/abs/1906.07983",
        "zoo.md",
    ),
    Term(
        "aggregated",
        "one map made of several methods'.",
        "Rieger and Hansen 2020",
        "https://arxiv.org/abs/2007.06381",
        "zoo.md",
    ),
    Term(
        "certified",
        "the share of noisy copies on which a cell is important, with what is proved of the cell within an L2 radius.",
        "Anani et al. 2025",
        "",
        "defenses/certificates.md",
    ),
    Term(
        "sparsified-smoothgrad",
        "the share of noisy copies on which a cell is among the largest, with a bound on how much of the top stays.",
        "Levine et al. 2019",
        "",
        "defenses/certificates.md",
    ),
    Term("metfa", "a trimmed mean of the maps of noisy copies.", "Gan et al. 2022", page="defenses/certificates.md"),
    Term("aid-consistent", "AID whose maps also stand still under harmless changes.", page="defenses/aid.md"),
    Term("revealing", "a classifier whose maps move when its prediction is forged.", page="defenses/revealing.md"),
    Term("replaced", "another method in place of the one that was there.", page="defenses/masks.md"),
    Term(
        "kernel-smoothing",
        "the mean of a method's maps over noisy copies of the input.",
        "Yeh et al. 2019",
        "https://arxiv.org/abs/1901.09392",
        "defenses/smoothing.md",
    ),
    Term(
        "uniform-gradient",
        "the mean gradient over uniform noise around the input.",
        "Wang et al. 2020 (NeurIPS)",
        "https://arxiv.org/abs/2006.06643",
        "defenses/smoothing.md",
    ),
    Term(
        "ava",
        "the mean of the maps of the kept samples nearest to the input.",
        "Bhatt et al. 2020",
        "https://arxiv.org/abs/2005.00631",
        "defenses/aggregates.md",
    ),
    Term(
        "tangent-space",
        "projects gradients on the directions in which the training images near the input differ.",
        "Anders et al. 2020",
        "https://arxiv.org/abs/2007.09969",
        "defenses/projection.md",
    ),
    Term(
        "relex",
        "finds a mask that keeps the class on noisy copies of the image, and whose complement loses it.",
        "Lim et al. 2021",
        "",
        "defenses/masks.md",
    ),
    Term(
        "x-ensemble",
        "a detector that compares several methods' maps.",
        "Wang et al. 2020",
        "https://arxiv.org/abs/2304.06919",
        "zoo.md",
    ),
)


def glossary(results: Results) -> list[Term]:
    """The general words, and those of the run's rows and columns; of one without an entry, what its class says."""
    used = {row.name for row in results.experiment.rows}
    used |= {member for row in results.experiment.rows for member in _members(row.settings)}
    labels = " ".join(column.label for column in results.experiment.columns)
    known = [term for term in COMPONENTS if term.word in used or term.word in labels]
    classes = {column.facts.name for column in results.experiment.columns}
    others = used - {term.word for term in COMPONENTS}
    return [*GENERAL, *known, *_registered(others, classes - {"Clean", "Noise"}, {term.word for term in known})]


def _registered(names: set[str], classes: set[str], known: set[str]) -> list[Term]:
    """What registered classes say of themselves in the first line of their docstring, and their paper."""
    found: dict[str, Term] = {}
    for registry, page in ((INTERPRETERS, "interpreters.md"), (DEFENSES, "zoo.md"), (ATTACKS, "attacks.md")):
        for entry in registry:
            wanted = entry.name in names if registry is not ATTACKS else entry.build.__name__ in classes
            if wanted and entry.name not in known and entry.summary:
                means = entry.summary.replace("``", "")
                found.setdefault(entry.name, Term(entry.name, means, entry.paper, "", page))
    return list(found.values())


def _members(settings: object) -> list[str]:
    return [str(getattr(member, "name", member)) for member in getattr(settings, "members", ()) or ()]
