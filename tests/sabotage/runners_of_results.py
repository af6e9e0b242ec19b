"""How cases of attacks, metrics, data and records are put through their batteries.

Cases of data and of records are no components: the first say how private images are disguised, the
second how the folder of an honest run is spoilt. Both are imported.
"""

import importlib.util
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from forged_runs import forge
from tampering import Tampered, rule

from mibench.artifacts import ArtifactStore
from mibench.checks.attack import check_attack
from mibench.checks.data import check_data
from mibench.checks.metric import check_metric
from mibench.checks.record import check_run
from mibench.protocol import DataRule
from mibench.registry import attacks, metrics

RANKED = "cifar10-lite-v1"


def attack(nursery, case, only):
    """An attack on the small undefended split of the battery."""
    return check_attack(nursery, f"{case.path}:{case.component}", only=only)


def metric(nursery, case, only):
    """A metric on generated images."""
    return check_metric(nursery, f"{case.path}:{case.component}", only=only)


def data(nursery, case, only):
    """A dataset with disguised private images among the auxiliary ones."""
    Tampered.disguise = staticmethod(_module(case).disguise)
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = check_data(DataRule.model_validate(rule()), None, ArtifactStore(Path(folder)))
    finally:
        Tampered.disguise = None
    return _of(found, only)


def record(nursery, case, only):
    """The folder of an honest run, spoilt."""
    module = _module(case)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "run"
        shutil.copytree(_honest(getattr(module, "PROTOCOL", RANKED)), place)
        module.spoil(place)
        return _of(check_run(place, cache=Path(folder)), only)


def _module(case):
    spec = importlib.util.spec_from_file_location(f"case_{case.path.stem}", case.path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def _honest(protocol):
    """Made once; lies in the temporary folder until the process ends."""
    keeper = tempfile.TemporaryDirectory()
    _keepers.append(keeper)
    forge(Path(keeper.name), protocol_id=protocol)
    return Path(keeper.name)


def _of(found, only):
    return [one for one in found if only is None or one.check in only]


_keepers = []
RESULT_RUNNERS = {"attacks": attack, "metrics": metric, "data": data, "records": record}


def _built_in(registry):
    return tuple(one.name for one in registry.entries() if one.origin == "mibench")


def _untouched(nursery, name):
    """The same roles without a disguise, or the folder of an honest run."""
    with tempfile.TemporaryDirectory() as folder:
        if name == "generated":
            return check_data(DataRule.model_validate(rule()), None, ArtifactStore(Path(folder)))
        return check_run(_honest(name), cache=Path(folder))


RESULT_HONEST = {
    "attacks": (_built_in(attacks), check_attack),
    "metrics": (_built_in(metrics), check_metric),
    "data": (("generated",), _untouched),
    "records": ((RANKED, "procedural-smoke-v1"), _untouched),
}
