"""captum's attribution methods by name, as interpreters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from ...autograd import layers
from ...autograd.hooks import copy_with_shared_weights
from ...checks import Kind
from ...door import answer
from ...errors import FieldError, InputError, UnknownNameError, UnsupportedModelError
from ...fields import Fraction
from ...hidden import refuse_hidden
from ...random_streams import Streams, global_state, seed_global_state
from ...registry import INTERPRETERS
from ..base import Channels, Explanation, Interpreter, explained_class, pick, reduce_channels
from ..perturbation.segments import Segments
from .guard import cause, pristine, quiet, require_relu_modules

Method = Literal[
    "Deconvolution",
    "DeepLift",
    "FeatureAblation",
    "GradientShap",
    "GuidedBackprop",
    "GuidedGradCam",
    "InputXGradient",
    "IntegratedGradients",
    "InternalInfluence",
    "KernelShap",
    "LayerConductance",
    "LayerDeepLift",
    "LayerFeatureAblation",
    "LayerGradCam",
    "LayerGradientShap",
    "LayerGradientXActivation",
    "LayerIntegratedGradients",
    "Lime",
    "Occlusion",
    "Saliency",
    "ShapleyValueSampling",
]
METHODS: tuple[str, ...] = get_args(Method)

REFUSED = {
    "LRP": "captum's is wrong on residual networks and does not say so",
    "LayerLRP": "captum's is wrong on residual networks and does not say so",
    "FeaturePermutation": "it swaps pixels between the images of a batch: a map would depend on the others",
    "LayerFeaturePermutation": "it swaps features between the images of a batch: a map would depend on the others",
    "ShapleyValues": "it evaluates every order of the pixels; use kernel-shap, exact on few patches",
    "DeepLiftShap": "it needs images to compare with",
    "LayerDeepLiftShap": "it needs images to compare with",
    "LayerActivation": "it explains no class",
    "NoiseTunnel": "it wraps another method",
}

# Methods that draw from the global random state, for all images of a batch at once.
RANDOM = frozenset({"GradientShap", "KernelShap", "LayerGradientShap", "Lime", "ShapleyValueSampling"})
OVERRIDE = frozenset({"Deconvolution", "GuidedBackprop", "GuidedGradCam"})
COMPLETE = frozenset({"DeepLift", "LayerDeepLift"})
NO_OPTIONS = frozenset(
    [
        "self",
        "model",
        "forward_func",
        "layer",
        "device_ids",
        "inputs",
        "target",
        "baselines",
        "additional_forward_args",
        "feature_mask",
        "return_convergence_delta",
        "return_input_shape",
        "show_progress",
        "custom_attribution_func",
        "interpretable_model",
        "similarity_func",
        "perturb_func",
        "layer_mask",
        "grad_kwargs",
    ]
)

Value = bool | int | float | str | tuple[int, ...] | None
Options = Mapping[str, Value] | tuple[tuple[str, Value], ...]


@INTERPRETERS.register("captum", paper="Kokhlikyan et al. 2020; the method's own")
@dataclass(frozen=True, eq=False)
class Captum(Interpreter):
    """Any of captum's attribution methods for classes, by the name of its class in ``captum.attr``.

    Explains the logit. Not differentiable: captum's graphs are partly detached, and elsewhere silently wrong. Hooks and
    attributes that captum leaves on the model are removed, also after an exception. ``DeepLift`` divides rounding noise
    by rounding noise where a filter's answer hardly differs from the baseline's (flat parts of an image, in float32):
    prefer :class:`~robustexplain.interpreters.DeepLIFT`, or set its threshold: ``options={"eps": 1e-4}``.

    Args:
        method: the class; layer methods and ``InternalInfluence`` give the map on the layer's grid.
        options: arguments of its constructor and of ``attribute``, as a mapping: numbers, words, shapes
            (``{"n_steps": 20}``).
        layer: for methods that have one; default the last that gives a feature map.
        channels: how channels become one map: signed sum, sum of magnitudes, or largest magnitude.
        baseline: the value of the baseline image, or of removed pixels, in every channel.
        segments: for methods that remove patches (``FeatureAblation``, ``Lime``, ...).
        seed: of random methods; each sample has its own random stream and is explained on its own.

    Raises:
        UnknownNameError: a method or an option that captum does not have, with the nearest ones.
        UnsupportedModelError: captum cannot handle the model (with the likely cause), or would silently compute
            something else.
    """

    method: Method = "IntegratedGradients"
    options: Options = ()
    layer: str | None = None
    channels: Channels = "sum"
    baseline: Fraction = 0.0
    segments: Segments = field(default_factory=Segments)
    seed: int = 0

    differentiable: ClassVar[bool] = False
    takes: ClassVar[tuple[Kind, ...]] = ("images",)

    def __post_init__(self) -> None:
        if self.method in REFUSED:
            raise FieldError("Captum", "method", f"cannot be {self.method!r}: {REFUSED[self.method]}")
        if self.method not in METHODS:
            raise UnknownNameError("captum method", str(self.method), METHODS)
        super().__post_init__()
        pairs = self.options.items() if isinstance(self.options, Mapping) else self.options
        object.__setattr__(self, "options", tuple((name, value) for name, value in pairs))
        # captum is imported only if there are options to check.
        known = _options(_class(self.method)) if self.options else set()
        for name in dict(self.options):
            if name not in known:
                raise UnknownNameError(f"option of captum's {self.method}", name, known or ["none"])

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        logits = answer(self.model, x)
        classes, x = explained_class(logits, target).long(), x.detach()
        cls = _class(self.method)
        refuse_hidden(self.model, "captum sets hooks on modules")
        if self.method in OVERRIDE:
            require_relu_modules(self.model, x, self.method)
        # Random states, and the warnings that quiet() suppresses, are the process's: one thread at a time.
        with global_state(x.device), quiet():
            # captum's hooks would run in the forward passes of other threads.
            model = copy_with_shared_weights(self.model)
            with pristine(model):
                attribute = self._prepared(cls, x, model, self._layer(cls, x, model))
                attributions = self._attributed(attribute, x, classes, model)
        attributions = self._checked(attributions, x, logits.detach(), classes)
        return Explanation(logits, reduce_channels(attributions, self.channels).to(x.dtype))

    def _layer(self, cls: Any, x: Tensor, model: nn.Module) -> nn.Module | None:
        if "layer" not in _parameters(cls.__init__):
            if self.layer is not None:
                raise InputError(f"captum's {self.method} has no layer, but layer={self.layer!r} was given")
            return None
        return layers.submodule(model, self.layer or layers.last_feature_layer(model, x).name)

    def _prepared(
        self, cls: Any, x: Tensor, model: nn.Module, layer: nn.Module | None
    ) -> Callable[[Tensor, Tensor], Any]:
        """The method as a function of the images and their classes."""
        options: dict[str, Any] = dict(self.options)
        arguments = {name: options.pop(name) for name in list(options) if name in _parameters(cls.__init__)}
        method = cls(model, *([] if layer is None else [layer]), **arguments)
        accepted = _parameters(cls.attribute)
        if "baselines" in accepted:
            # captum's GradientShap does not accept a number as baseline.
            needs_tensor = self.method in ("GradientShap", "LayerGradientShap")
            options["baselines"] = torch.full_like(x[:1], self.baseline) if needs_tensor else self.baseline

        def attribute(images: Tensor, classes: Tensor) -> Any:
            if "feature_mask" in accepted:
                options["feature_mask"] = self.segments(images)[:, None].expand_as(images)
            return method.attribute(images.clone().requires_grad_(), target=classes, **options)

        return attribute

    def _attributed(
        self, attribute: Callable[[Tensor, Tensor], Any], x: Tensor, classes: Tensor, model: nn.Module
    ) -> Tensor:
        try:
            if self.method not in RANDOM:
                found = attribute(x, classes)
            else:
                seeds = Streams.of(x, self.seed, "captum", self.method).integers(2**31)
                rows = zip(x.split(1), classes.split(1), seeds.tolist(), strict=True)
                found = torch.cat([_seeded(attribute, *row) for row in rows])
        except (InputError, torch.cuda.OutOfMemoryError):
            raise
        except Exception as error:
            raise UnsupportedModelError(
                f"captum's {self.method} failed on this {type(model).__name__}: {error}{cause(model, x)}"
            ) from error
        if not isinstance(found, Tensor) or found.dim() != 4:
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise UnsupportedModelError(f"captum's {self.method} gave {shape}, where a map [B, C, h, w] is expected")
        return found.detach()

    def _checked(self, found: Tensor, x: Tensor, logits: Tensor, classes: Tensor) -> Tensor:
        if self.method not in COMPLETE:
            return found
        with torch.no_grad():
            base = pick(answer(self.model, torch.full_like(x, self.baseline)), classes).float()
        expected = pick(logits, classes).float() - base
        error = (found.float().flatten(1).sum(1) - expected).abs()
        # Tolerance for the rounding of the logits and of captum's sums; half precision has two digits.
        tolerance = 1.0 if x.dtype in (torch.float32, torch.float64) else 20.0
        bad = error > tolerance * (1e-2 * expected.abs() + 1e-4 * base.abs() + 1e-6)
        if bad.any():
            raise UnsupportedModelError(
                f"captum's {self.method} does not cover this {type(self.model).__name__}: attributions add up to "
                f"{float((found.float().flatten(1).sum(1))[bad][0]):.4g} where the logit changed by "
                f"{float(expected[bad][0]):.4g}. It handles activations that are modules of their own and used once"
                f"{cause(self.model, x)}"
            )
        return found


def _class(name: str) -> Any:
    import captum.attr

    if not hasattr(captum.attr, name):
        raise InputError(f"the installed captum {captum.__version__} has no {name}; version 0.7 and later do")
    return getattr(captum.attr, name)


def _parameters(function: Any) -> set[str]:
    return {p.name for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD}


def _options(cls: Any) -> set[str]:
    return (_parameters(cls.__init__) | _parameters(cls.attribute)) - NO_OPTIONS


def _seeded(attribute: Callable[[Tensor, Tensor], Any], x: Tensor, classes: Tensor, seed: int) -> Any:
    seed_global_state(seed, x.device)
    return attribute(x, classes)
