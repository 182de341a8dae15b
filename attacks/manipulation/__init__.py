"""Attacks on a system itself: its weights, a wrapper around its model, or its interpreter's reference samples."""

from .backdoor import ExplanationBackdoor, Trigger
from .background_audit import BackgroundAudit, audit_background, audit_outputs
from .base import Manipulation, View
from .biased_sampling import Sampled, StealthilyBiasedSampling
from .bouncer import Bouncer, BouncerReasons
from .fairwashing import ConcealFeature, GradientFairwashing
from .finetuned import FineTuned
from .fool_shap import Chosen, FoolSHAP, Tried
from .fooling import ActiveFooling, CenterFooling, LocationFooling, TopKFooling, UniformFooling, block_images
from .fooling_batch import FoolingBatch
from .influence_poisoning import InfluencePoisoning, Poisoned, Round
from .laundryml import LaundryML, SurrogateQuality, surrogate_quality
from .output_shuffling import OutputShuffling
from .rule_lists import Condition, Rule, RuleList, RuleReasons
from .rule_table import RuleSearch
from .scaffolded_model import Scaffold
from .scaffolding import Quality, Scaffolding, scaffold_quality
from .shuffled_model import Shuffled
from .surrogate_choice import LocalRuleReasons

__all__ = [
    "ActiveFooling",
    "BackgroundAudit",
    "Bouncer",
    "BouncerReasons",
    "CenterFooling",
    "Chosen",
    "ConcealFeature",
    "Condition",
    "ExplanationBackdoor",
    "FineTuned",
    "FoolSHAP",
    "FoolingBatch",
    "GradientFairwashing",
    "InfluencePoisoning",
    "LaundryML",
    "LocalRuleReasons",
    "LocationFooling",
    "Manipulation",
    "OutputShuffling",
    "Poisoned",
    "Quality",
    "Round",
    "Rule",
    "RuleList",
    "RuleReasons",
    "RuleSearch",
    "Sampled",
    "Scaffold",
    "Scaffolding",
    "Shuffled",
    "StealthilyBiasedSampling",
    "SurrogateQuality",
    "TopKFooling",
    "Tried",
    "Trigger",
    "UniformFooling",
    "View",
    "audit_background",
    "audit_outputs",
    "block_images",
    "scaffold_quality",
    "surrogate_quality",
]
