"""Interpreters: attribution methods that are differentiable in the input and in the model's weights."""

from .activation import CAM, GradCAM, GradCAMPlusPlus, LayerCAM
from .base import Explanation, Interpreter
from .bridge import Captum
from .deeplift import DeepLIFT
from .flatness import map_gradient_share
from .gradient import Gradient, InputXGradient
from .guided import GuidedBackprop, GuidedGradCAM
from .influence import Influence, Influential
from .lime_tabular import LIMETabular, LIMETabularTraining, draw_lime_background
from .mask import Mask, MaskState
from .masking import RTS, MaskingModel, MaskObjective
from .noise import SmoothGrad, VarGrad
from .occlusion import Occlusion
from .panel import Panel
from .path import ExpectedGradients, ExpectedGradientsTraining, IntegratedGradients, draw_background
from .reference import Reference
from .relevance import LRP
from .removal import Fill
from .rise import RISE
from .rts_training import RTSTraining, clean_objective, train_rts
from .segments import Segments
from .shap_tabular import SHAPTabular, SHAPTabularTraining, draw_shap_background, shap_background
from .smoothed import Smoothed
from .surrogates import LIME, KernelSHAP
from .transformer import AttentionRollout
from .watch import unwatched

__all__ = [
    "CAM",
    "LIME",
    "LRP",
    "RISE",
    "RTS",
    "AttentionRollout",
    "Captum",
    "DeepLIFT",
    "ExpectedGradients",
    "ExpectedGradientsTraining",
    "Explanation",
    "Fill",
    "GradCAM",
    "GradCAMPlusPlus",
    "Gradient",
    "GuidedBackprop",
    "GuidedGradCAM",
    "Influence",
    "Influential",
    "InputXGradient",
    "IntegratedGradients",
    "Interpreter",
    "KernelSHAP",
    "LIMETabular",
    "LIMETabularTraining",
    "LayerCAM",
    "Mask",
    "MaskObjective",
    "MaskState",
    "MaskingModel",
    "Occlusion",
    "Panel",
    "RTSTraining",
    "Reference",
    "SHAPTabular",
    "SHAPTabularTraining",
    "Segments",
    "SmoothGrad",
    "Smoothed",
    "VarGrad",
    "clean_objective",
    "draw_background",
    "draw_lime_background",
    "draw_shap_background",
    "map_gradient_share",
    "shap_background",
    "train_rts",
    "unwatched",
]
