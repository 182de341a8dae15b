"""Attacks on systems themselves: on weights, on what stands around a model, on an interpreter's reference samples."""

from .audit import Audit, audit_background, audit_outputs
from .backdoor import ExplanationBackdoor, Trigger
from .background import Chosen, FoolSHAP, Tried
from .base import ModelAttack, View
from .bouncer import Bouncer, BouncerReasons
from .fairwashing import ConcealFeature, GradientFairwashing
from .finetuned import FineTuned
from .fooling import ActiveFooling, CenterFooling, LocationFooling, TopKFooling, UniformFooling, block_images
from .laundering import LaundryML, Whitewash, whitewash
from .laundry import LocalRuleReasons
from .lesson import Lesson
from .rule_lists import Condition, Rule, RuleList, RuleReasons
from .rule_table import RuleSearch
from .sampling import Sampled, StealthilyBiasedSampling
from .scaffold import Scaffold
from .scaffolding import Quality, Scaffolding, scaffold_quality

__all__ = [
    "ActiveFooling",
    "Audit",
    "Bouncer",
    "BouncerReasons",
    "CenterFooling",
    "Chosen",
    "ConcealFeature",
    "Condition",
    "ExplanationBackdoor",
    "FineTuned",
    "FoolSHAP",
    "GradientFairwashing",
    "LaundryML",
    "Lesson",
    "LocalRuleReasons",
    "LocationFooling",
    "ModelAttack",
    "Quality",
    "Rule",
    "RuleList",
    "RuleReasons",
    "RuleSearch",
    "Sampled",
    "Scaffold",
    "Scaffolding",
    "StealthilyBiasedSampling",
    "TopKFooling",
    "Tried",
    "Trigger",
    "UniformFooling",
    "View",
    "Whitewash",
    "audit_background",
    "audit_outputs",
    "block_images",
    "scaffold_quality",
    "whitewash",
]
