"""Interpreters: attribution methods that are differentiable in the input and in the model's weights."""

from .backward_rules.deeplift import DeepLIFT
from .backward_rules.guided import GuidedBackprop, GuidedGradCAM
from .backward_rules.lrp import LRP
from .base import Explanation, Interpreter
from .cam.attention_rollout import AttentionRollout
from .cam.cam import CAM, GradCAM, GradCAMPlusPlus, LayerCAM
from .captum.bridge import Captum
from .certificate import Certificate
from .composed.aggregate import Aggregate
from .composed.base import Composed, Wrapper
from .composed.beta_smoothed import Smoothed
from .composed.certified import Certified
from .composed.kernel_smoothed import KernelSmoothed
from .composed.map_bound import curvature, map_bound
from .composed.metfa import MeTFA
from .composed.neighbours import NeighbourMean
from .composed.of_draws import OfDraws
from .composed.of_transformed import OfTransformed
from .composed.projected import Projected
from .composed.sparsified import Sparsified
from .gradients.gradient import Gradient, InputXGradient
from .gradients.integrated import ExpectedGradients, ExpectedGradientsTraining, IntegratedGradients, draw_background
from .gradients.smoothgrad import SmoothGrad, VarGrad
from .influence.influence import Influence, Influential
from .iterative import IterativeInterpreter, MaskState
from .map_gradient_share import map_gradient_share
from .masks.mask import Mask
from .masks.relex import RelEx
from .masks.rts import RTS, MaskingModel, MaskObjective
from .masks.rts_training import RTSTraining, clean_objective, train_rts
from .perturbation.lime_shap import LIME, KernelSHAP
from .perturbation.occlusion import Occlusion
from .perturbation.removal import Fill
from .perturbation.rise import RISE
from .perturbation.segments import Segments
from .reference import Reference
from .scalar import Scalar, Target
from .spec import InterpreterSpec
from .tabular.generating import RowGenerating
from .tabular.generators import AutoEncoderRows, NeighbourRows, RowGenerator, TreeRows
from .tabular.lime import LIMETabular, LIMETabularTraining, draw_lime_background
from .tabular.shap import SHAPTabular, SHAPTabularTraining, draw_shap_background, shap_background
from .theta import Theta
from .zero_gradient import unchecked

__all__ = [
    "CAM",
    "LIME",
    "LRP",
    "RISE",
    "RTS",
    "Aggregate",
    "AttentionRollout",
    "AutoEncoderRows",
    "Captum",
    "Certificate",
    "Certified",
    "Composed",
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
    "InterpreterSpec",
    "IterativeInterpreter",
    "KernelSHAP",
    "KernelSmoothed",
    "LIMETabular",
    "LIMETabularTraining",
    "LayerCAM",
    "Mask",
    "MaskObjective",
    "MaskState",
    "MaskingModel",
    "MeTFA",
    "NeighbourMean",
    "NeighbourRows",
    "Occlusion",
    "OfDraws",
    "OfTransformed",
    "Projected",
    "RTSTraining",
    "Reference",
    "RelEx",
    "RowGenerating",
    "RowGenerator",
    "SHAPTabular",
    "SHAPTabularTraining",
    "Scalar",
    "Segments",
    "SmoothGrad",
    "Smoothed",
    "Sparsified",
    "Target",
    "Theta",
    "TreeRows",
    "VarGrad",
    "Wrapper",
    "clean_objective",
    "curvature",
    "draw_background",
    "draw_lime_background",
    "draw_shap_background",
    "map_bound",
    "map_gradient_share",
    "shap_background",
    "train_rts",
    "unchecked",
]
