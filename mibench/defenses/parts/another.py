"""What the controls share: another defense, by its name and parameters."""

from __future__ import annotations

from pydantic import Field, JsonValue

from mibench.backbones.base import Split
from mibench.defenses.base import Defense
from mibench.errors import InvalidParamsError
from mibench.params import build
from mibench.registry import defenses


class OfAnother(Defense.Params):
    """Which other defense."""

    of: str = Field(default="siftfunnel", description="name of the other defense")
    params: dict[str, JsonValue] = Field(
        default_factory=dict, description="its parameters, as in --set defense.params.edge=resnet"
    )


def another(control: type[Defense], split: Split, params: OfAnother) -> Defense:
    """Builds the other defense.

    Raises:
        InvalidParamsError: it is the control itself, or a parameter is wrong.
        UnknownNameError: there is none of this name.
    """
    method = defenses.load(params.of)
    if issubclass(method, control):
        raise InvalidParamsError(
            f"{control.name}.of is {params.of}: a control of itself; name another defense."
        )
    return method(split, build(method.Params, params.params, f"defense {params.of}"))
