"""Requests that a metric answers, in its own process."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mibench import seeding
from mibench.checks.host import Answer, State, Tensors, handles
from mibench.errors import PluginError, UnavailableError
from mibench.metrics.base import Metric

BACKBONES = ("alexnet", "vgg16", "squeezenet1_1")
"""Networks of torchvision that perceptual metrics are built on."""
SCALES = "ScalingLayer"
"""First layer of LPIPS in all its codes; what reaches it must span [-1, 1]."""


@handles("metric.prepare")
def prepare(state: State, header: Mapping[str, Any], tensors: Tensors) -> Answer:  # noqa: ARG001
    """Puts random weights where a metric would download some; before it is loaded.

    What it computes is then no LPIPS, but still has to obey all that is checked here.
    """
    import torchvision

    used: list[str] = state.parts.setdefault("stand-ins", [])

    def stand_in(name: str, build: Any, *_: Any, **__: Any) -> nn.Module:
        used.append(name)
        with seeding.stream(0, "stand-in", name):
            network: nn.Module = build(weights=None)
        return network.eval()

    for name in BACKBONES:
        plain = getattr(torchvision.models, name)
        setattr(torchvision.models, name, functools.partial(stand_in, name, plain))
    _without_downloads()
    return {}, {}


@handles("metric.open")
def open_metric(state: State, header: Mapping[str, Any], tensors: Tensors) -> Answer:  # noqa: ARG001
    """Makes the metric; answers what it declares."""
    metric: Metric = state.parts["class"]()
    state.parts["metric"] = metric
    bounds = metric.bounds
    return {
        "unit": metric.unit,
        "direction": metric.more_leakage,
        "bounds": [str(float(one)) for one in bounds],  # JSON has no infinity
        "chunk": metric.chunk,
        "higher_is_better": bool(metric.higher_is_better),
        "context": type(metric).__dict__.get("bound") is not None
        or getattr(type(metric), "bound", None) is not getattr(Metric, "bound", None),
    }, {}


@handles("metric.score")
def score(state: State, header: Mapping[str, Any], tensors: Tensors) -> Answer:
    """Scores ``reconstructions`` against ``originals``.

    Answers:
        ``values``, or what the metric said: ``refused`` (the input), ``broken`` (its own output) or
        ``unavailable``. With ``watch``, the range of what reached the first layer of a known
        network is in ``reached``.
    """
    metric: Metric = state.parts["metric"]
    reached: list[tuple[float, float]] = []

    def look(module: nn.Module, given: tuple[Any, ...]) -> None:
        if type(module).__name__ == SCALES and given and isinstance(given[0], Tensor):
            low, high = given[0].aminmax()
            reached.append((float(low), float(high)))

    hook = nn.modules.module.register_module_forward_pre_hook(look)
    try:
        with seeding.stream(int(header.get("seed", 0)), "metric"):
            values = metric(tensors["reconstructions"], tensors["originals"])
    except UnavailableError as error:
        return {"unavailable": str(error)}, {}
    except PluginError as error:
        return {"broken": str(error)}, {}
    except ValueError as error:
        return {"refused": str(error)}, {}
    finally:
        hook.remove()
    ends = [min(low for low, _ in reached), max(high for _, high in reached)] if reached else None
    stand_ins = sorted(set(state.parts.get("stand-ins", [])))
    return {"reached": ends, "stand_ins": stand_ins}, {"values": torch.as_tensor(values)}


def _without_downloads() -> None:
    """The built-in LPIPS asks for its backbone's file before it builds the network."""
    from mibench.metrics import perceptual

    for name in ("_obtain_backbone", "obtain_backbone"):
        if hasattr(perceptual, name):
            setattr(perceptual, name, lambda: None)
