"""Checks of a finished run's folder: does the record follow from its files and its protocol?

Nothing that the folder names is imported or run; components are compared by name with those that
come with mibench.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
from pydantic import ValidationError

from mibench.checks import record_facts, record_numbers, record_rules
from mibench.checks.base import Finding, Verdict, one_line
from mibench.checks.record_run import Problem, Run
from mibench.files import Json
from mibench.outputs import GRID, MANIFEST, OF_CONTROLS, PER_IMAGE, RECONSTRUCTIONS, RECORD
from mibench.record import CONTROLLED, FORMAT, Record
from mibench.stored import from_png

LARGEST = 2**28
"""Bytes of the largest file that is read."""
MOST_ROWS = 10**6
"""Attacked images, at most."""
MOST_LINES = 20
"""Problems that one check tells one by one."""


@dataclass(frozen=True)
class _Check:
    name: str
    tried: str
    advice: str
    look: Callable[[Run], Iterator[Problem]]


def check_run(
    folder: Path, data_root: Path | None = None, cache: Path | None = None
) -> list[Finding]:
    """Checks the folder of a finished run; of a suite, the folders of its attacks as well.

    Args:
        folder: what `mibench run` has written.
        data_root: datasets in the hub's layout; with it, stored reconstructions are scored again.
        cache: where decoded images are kept; needed with ``data_root``.

    Returns:
        One finding for each problem, and one for each check that found none; of the parts of a
        suite, what is wrong with them.
    """
    found, record = _read(folder)
    if record is None:
        return [replace(one, found=one_line(one.found)) for one in found]
    run = Run(folder, record, _table(folder), _manifest(folder), data_root, cache)
    found += _looked(run, _CHECKS)
    parts: dict[str, Run] = {}
    inside = [
        one for part in record.suite if part.scores for one in _of_part(run, part.attack, parts)
    ]
    found += [one for one in inside if one.verdict is not Verdict.PASSED]
    if inside and not any(one.verdict is Verdict.FAILED for one in inside):
        words = f"{len(parts)} folders hold: {', '.join(parts)}"
        found.append(Finding("record-parts", Verdict.PASSED, _PARTS_TRIED, words))
    if record.suite:
        found += [
            Finding(_SUITE.name, one.verdict, _SUITE.tried, one.text, _SUITE.advice)
            for one in record_numbers.of_parts(run, parts)
        ]
    return [replace(one, found=one_line(one.found)) for one in found]


def check_numbers(folder: Path) -> list[Finding]:
    """Checks a record with its values per image alone, as they lie on the leaderboard.

    Args:
        folder: holds ``record.json`` and ``per_image.parquet``.

    Returns:
        As `check_run`, without what needs images, the manifest or the folders of a suite's attacks.
    """
    found, record = _read(folder)
    if record is not None:
        run = Run(folder, record, _table(folder), None, None, None)
        found += _looked(run, [check for check in _CHECKS if check.name not in _WITH_FOLDER])
    return [replace(one, found=one_line(one.found)) for one in found]


def _looked(run: Run, checks: Iterable[_Check]) -> list[Finding]:
    found = []
    for check in checks:
        problems = list(check.look(run))
        if not problems:
            found.append(Finding(check.name, Verdict.PASSED, check.tried, "it holds"))
        for problem in problems[:MOST_LINES]:
            advice = "" if problem.verdict is Verdict.SKIPPED else check.advice
            found.append(Finding(check.name, problem.verdict, check.tried, problem.text, advice))
        if len(problems) > MOST_LINES:
            worst = max((p.verdict for p in problems[MOST_LINES:]), key=list(Verdict).index)
            more = f"and {len(problems) - MOST_LINES} more of this kind"
            found.append(Finding(check.name, worst, check.tried, more, check.advice))
    return found


# --- reading -------------------------------------------------------------------------------------

_PARTS_TRIED = "makes the same checks in the folder of each attack"
_SCHEMA = "record-schema"
_SCHEMA_TRIED = "reads record.json by the format that it names"
_SCHEMA_ADVICE = "leave the file as `mibench run` has written it, or run again"


def _read(folder: Path) -> tuple[list[Finding], Record | None]:
    """All that is wrong with the form of the record, and the record if it can be read at all."""
    lines: list[str] = []
    record: Record | None = None
    try:
        values = _load(folder / RECORD, lines)
    except RecursionError:
        lines.append(f"{folder / RECORD} cannot be read: it is nested too deeply")
        values = None
    except (OSError, ValueError) as error:
        lines.append(f"{folder / RECORD} cannot be read: {error}")
        values = None
    if values is not None:
        record = _validated(values, lines)
    if record is not None and record.status != "success":
        lines.append(f"the status is {record.status!r}: a run that did not finish has no result")
        record = None
    old = record is not None and record.format_version < CONTROLLED
    if old and record is not None and record.protocol.ranked:
        # Or whoever lacks controls would only have to call the format an older one.
        lines.extend(f"it is ranked, and {why}" for why in _uncontrolled(record))
    found = [Finding(_SCHEMA, Verdict.FAILED, _SCHEMA_TRIED, one, _SCHEMA_ADVICE) for one in lines]
    if old and record is not None:
        said = (
            f"format {record.format_version} did not ask for controls; this mibench writes {FORMAT}"
        )
        found.append(Finding(_SCHEMA, Verdict.WARNED, _SCHEMA_TRIED, said, "run again"))
    if not found:
        found.append(Finding(_SCHEMA, Verdict.PASSED, _SCHEMA_TRIED, "it is whole"))
    return found, record


def _uncontrolled(record: Record) -> list[str]:
    """What the present format would say of a record of an older one."""
    try:
        Record.model_validate({**record.model_dump(), "format_version": FORMAT})
    except ValidationError as error:
        return [one["msg"] for one in error.errors()]
    return []


def _load(path: Path, lines: list[str]) -> dict[str, Json] | None:
    def once(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
        names = [name for name, _ in pairs]
        lines.extend(
            f"the field {name!r} is there twice" for name in {*names} if names.count(name) > 1
        )
        return dict(pairs)

    values = json.loads(_bytes(path).decode("utf-8"), object_pairs_hook=once)
    if not isinstance(values, dict):
        lines.append("record.json holds no fields")
        return None
    version = values.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool):
        lines.append("there is no format_version, so this is no record")
        return None
    if not 1 <= version <= FORMAT:
        lines.append(f"format version {version} is unknown; this mibench reads 1 to {FORMAT}")
        return None
    return values


def _validated(values: dict[str, Json], lines: list[str]) -> Record | None:
    """The record; fields that do not belong there are told and taken out, to see the rest."""
    try:
        return Record.model_validate(values)
    except ValidationError as error:
        problems = error.errors()
    for problem in problems:
        where = ".".join(map(str, problem["loc"]))
        lines.append(f"{where}: {problem['msg']}" if where else problem["msg"])
    extra = [problem["loc"] for problem in problems if problem["type"] == "extra_forbidden"]
    for place in extra:
        _drop(values, place)
    try:
        return Record.model_validate(values) if extra else None
    except ValidationError as error:
        if len(extra) == len(problems):
            # Only now did the rules that look at the whole record have their say.
            lines.extend(one["msg"] for one in error.errors())
        return None


def _drop(values: object, place: tuple[int | str, ...]) -> None:
    for key in place[:-1]:
        values = values[key]  # type: ignore[index]
    if isinstance(values, dict):
        values.pop(place[-1], None)


def _bytes(path: Path) -> bytes:
    """The content of a plain file of reasonable size."""
    if path.is_symlink() or not path.is_file():
        raise OSError("there is no plain file of this name")
    if path.stat().st_size > LARGEST:
        raise OSError(f"it is larger than {LARGEST} bytes")
    return path.read_bytes()


def _table(folder: Path) -> pd.DataFrame | None:
    try:
        data = io.BytesIO(_bytes(folder / PER_IMAGE))
        # A small file can unfold into any number of rows.
        if pq.ParquetFile(data).metadata.num_rows > MOST_ROWS:
            return None
        return pd.read_parquet(data)
    except Exception:
        return None


def _manifest(folder: Path) -> list[str] | None:
    try:
        return _bytes(folder / MANIFEST).decode("ascii").splitlines()
    except (OSError, ValueError):
        return None


# --- files and counts ----------------------------------------------------------------------------


def _files(run: Run) -> Iterator[Problem]:
    named = run.record.files
    needed = {MANIFEST, PER_IMAGE, GRID, RECONSTRUCTIONS}
    known = {*needed, *OF_CONTROLS}
    for name in sorted(needed - set(named)):
        yield Problem(f"the record does not give the hash of {name}")
    for name in sorted(set(named) - known):
        yield Problem(f"the record names a file {name!r} that no run writes")
    for name in sorted(known & set(named)):
        try:
            digest = _digest(run, name)
        except OSError as error:
            yield Problem(f"{name} cannot be read: {error}")
            continue
        if digest != named[name]:
            yield Problem(f"{name} is not the file that the record was written with")
    if run.table is None and (run.folder / PER_IMAGE).exists():
        yield Problem(f"{PER_IMAGE} is no readable table")
    if MANIFEST in named and named[MANIFEST] != run.record.manifest:
        yield Problem("the hash of manifest.txt differs from the record's field 'manifest'")


def _digest(run: Run, name: str) -> str:
    """The hash of a file, or over all pictures of a folder in order."""
    pictures = name in (RECONSTRUCTIONS, *OF_CONTROLS)
    if pictures and (run.folder / name).is_symlink():
        raise OSError("it is a link")
    found = hashlib.sha256()
    for path in run.pictures(name) if pictures else [run.folder / name]:
        found.update(_bytes(path))
    return found.hexdigest()


def _counts(run: Run) -> Iterator[Problem]:
    data, rule = run.record.data, run.rule("data")
    if data is None:
        first = run.record.format_version == 1
        verdict = Verdict.WARNED if first else Verdict.FAILED
        yield Problem("the record does not say which images were used", verdict)
        return
    attacked = run.attacked
    if not 0 < attacked <= MOST_ROWS:
        yield Problem(f"{attacked} images are attacked")
        return
    if rule.get("attacked") != attacked:
        yield Problem(f"{attacked} images are attacked, not the protocol's {rule.get('attacked')}")
    if rule.get("image_size") != data.image_size:
        yield Problem(
            f"images have {data.image_size} pixels, not the protocol's {rule.get('image_size')}"
        )
    if run.manifest is not None:
        yield from _manifest_counts(run, run.manifest, data.images.get("private", -1), attacked)
    if run.table is not None:
        if len(run.table) != attacked:
            yield Problem(f"{PER_IMAGE} has {len(run.table)} rows for {attacked} attacked images")
        if run.column("index") != list(range(len(run.table))):
            yield Problem(f"{PER_IMAGE} does not number its rows from 0 on")
    for place, score in run.placed_scores():
        if score.value is not None and score.n != attacked:
            yield Problem(f"{place} of {score.metric} rests on {score.n} images, not on {attacked}")
    yield from _pictures(run, attacked, data.image_size)


def _manifest_counts(run: Run, lines: list[str], private: int, attacked: int) -> Iterator[Problem]:
    if len(lines) != private:
        yield Problem(f"{MANIFEST} has {len(lines)} lines for {private} private images")
    if any(len(line) != 64 or set(line) - set("0123456789abcdef") for line in lines):
        yield Problem(f"{MANIFEST} holds lines that are no SHA-256")
    if run.table is not None and run.column("sha256") != list(dict.fromkeys(lines))[:attacked]:
        yield Problem(f"the images in {PER_IMAGE} are not the first different ones of {MANIFEST}")


def _pictures(run: Run, attacked: int, side: int) -> Iterator[Problem]:
    found = {path.name for path in (run.folder / RECONSTRUCTIONS).glob("*.png")}
    wanted = [f"{index:04}.png" for index in range(attacked)]
    missing = [name for name in wanted if name not in found]
    if missing:
        yield Problem(
            f"{len(missing)} of {attacked} reconstructions are missing, from {missing[0]} on"
        )
    if strange := sorted(found - set(wanted)):
        yield Problem(f"{len(strange)} files beside the reconstructions, such as {strange[0]}")
    for path in run.pictures():
        try:
            from_png(_bytes(path), side)
        except ValueError as error:
            yield Problem(f"{RECONSTRUCTIONS}/{path.name} {error}")
        except Exception as error:
            yield Problem(f"{RECONSTRUCTIONS}/{path.name} is no readable PNG ({error})")


# --- suites --------------------------------------------------------------------------------------


def _of_part(run: Run, name: str, parts: dict[str, Run]) -> list[Finding]:
    """Checks the folder of one attack of a suite, and that the suite tells the same of it.

    A part that can be read is added to ``parts``.
    """
    folder = run.folder / name
    if folder.parent != run.folder or name in ("", ".", ".."):
        return [Finding("record-files", Verdict.FAILED, "finds the parts of a suite",
                        f"{name!r} is no name of a folder", _SCHEMA_ADVICE)]  # fmt: skip
    inner, record = _read(folder)
    findings = inner
    if record is not None and record.suite:
        findings = [Finding(_SCHEMA, Verdict.FAILED, _SCHEMA_TRIED,
                            "a part of a suite is a suite again", _SCHEMA_ADVICE)]  # fmt: skip
    elif record is not None:
        findings = check_run(folder, run.data_root, run.cache)
        part = Run(folder, record, _table(folder), _manifest(folder), None, None)
        parts[name] = part
        findings += [
            Finding(_SUITE.name, problem.verdict, _SUITE.tried, problem.text, _SUITE.advice)
            for problem in record_numbers.of_part(run, part)
        ]
    return [
        Finding(f.check, f.verdict, f.tried, f"part {name}: {f.found}", f.advice) for f in findings
    ]


_EDITED = "numbers were changed after the run; run again and leave the files as they are"
_SUITE = _Check("record-suite", "holds a suite against its attacks", _EDITED, record_numbers.suite)
_CHECKS = (
    _Check("record-files", "compares every file with the hash in the record",
           "keep the folder together as `mibench run` has written it", _files),
    _Check("record-counts", "counts private and attacked images, rows and reconstructions, and "
           "measures these", "a result is of all images of the protocol; run again", _counts),
    _Check("record-means", "computes means, quantiles and intervals again from per-image values",
           _EDITED, record_numbers.means),
    _Check("record-leakage", "computes the normalised leakage again from the per-image values",
           _EDITED, record_numbers.leakage),
    _Check("record-identities", "holds per-image values against what their definitions imply",
           _EDITED, record_numbers.identities),
    _SUITE,
    _Check("record-rescored", "scores the stored reconstructions against the protocol's images",
           "the reconstructions are not those that were scored; run again",
           record_numbers.rescored),
    _Check("record-ranked", "holds the run against the released protocol, and its rank against it",
           "run the protocol as it is, or let the record say how it departs", record_rules.ranked),
    _Check("record-adversary", "holds the adversary against the protocol", _EDITED,
           record_rules.adversary),
    _Check("record-calibration", "holds strength and convergence of the attacks against the "
           "references", "train the attack until it reaches the reference, or mark it as weak",
           record_rules.calibration),
    _Check("record-facts", "holds judge, cost, information and data against their definitions and "
           "the protocol", _EDITED, record_facts.facts),
    _Check("record-plausible", "looks for values that no measurement gives",
           "say in the submission how this came about", record_numbers.plausible),
)  # fmt: skip
_WITH_FOLDER = ("record-files", "record-counts", "record-rescored")
"""Checks that need more of a run than its record and its values per image."""
