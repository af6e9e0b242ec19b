import contextlib
import errno
import json
import logging
import math
import multiprocessing
import os
import random
import signal
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mibench.artifacts import ArtifactStore, Checkpoint
from mibench.errors import StorageError

# Children come from one clean server that has torch loaded: forking this process, which may have
# threads, could hang, and importing torch in each child would take seconds.
CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(["mibench.artifacts", "pytest", "hypothesis"])

KIND = "inverter"
SPEC = {"seed": 3, "layers": [1, 2], "defense": {"name": "noise", "sigma": 0.5}}
STEPS = 2
SCALARS = st.none() | st.booleans() | st.integers() | st.text("xyz", max_size=3)


def simple(_checkpoint):
    return {"w": torch.arange(6.0).reshape(2, 3)}, {"loss": 0.25, "epochs": 2}


def never(_checkpoint):
    raise AssertionError("made again")


def place_of(store, spec=SPEC):
    return store.root / KIND / store.key(KIND, spec)


def visible(store):
    return sorted(p.name for p in (store.root / KIND).iterdir() if not p.name.endswith(".lock"))


def trained(steps=STEPS, size=20_000, seen=None):
    """A maker whose state at step n is filled with n, so that a mixed-up state is noticed."""

    def make(checkpoint):
        saved = checkpoint.load()
        step, state = 0, torch.zeros(size)
        if saved is not None:
            state, step = saved[0]["state"], saved[1]["step"]
            assert isinstance(step, int)
            assert bool((state == step).all())
        if seen is not None:
            seen.append(step)
        while step < steps:
            step += 1
            state = state + 1
            checkpoint.save({"state": state}, {"step": step})
        return {"state": state}, {"step": step}

    return make


def run_all(*processes, timeout=20):
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout)
        assert process.exitcode is not None, "a child hangs"


# --- round trip and reuse ---------------------------------------------------------------------


def test_what_was_made_is_reused_and_equal(tmp_path):
    store = ArtifactStore(tmp_path)
    assert not store.contains(KIND, SPEC)
    made = store.fetch(KIND, SPEC, simple)
    assert store.contains(KIND, SPEC)
    found = ArtifactStore(tmp_path).fetch(KIND, SPEC, never)
    assert (made.reused, found.reused) == (False, True)
    assert made.kind == found.kind == KIND
    assert made.key == found.key == store.key(KIND, SPEC)
    assert made.facts == found.facts == {"loss": 0.25, "epochs": 2}
    assert torch.equal(found.tensors["w"], torch.arange(6.0).reshape(2, 3))
    assert torch.equal(made.tensors["w"], found.tensors["w"])
    found.tensors["w"].zero_()  # loaded tensors are ordinary ones
    assert visible(store) == [made.key]


def test_all_sorts_of_tensors(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "view": base[1:],
        "same": base[1:],
        "transposed": base.t(),
        "expanded": torch.ones(1).expand(5),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "channels_last": torch.rand(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "flag": torch.tensor([True, False]),
    }
    store = ArtifactStore(tmp_path)
    for artifact in (
        store.fetch(KIND, SPEC, lambda _: (tensors, {})),
        store.fetch(KIND, SPEC, never),
    ):
        assert artifact.tensors.keys() == tensors.keys()
        for name, tensor in tensors.items():
            got = artifact.tensors[name]
            assert got.dtype == tensor.dtype
            assert torch.equal(got, tensor)
            assert got.is_contiguous()
            assert not got.requires_grad
        storages = {t.untyped_storage().data_ptr() for t in artifact.tensors.values() if t.numel()}
        assert len(storages) == len(tensors) - 1
    assert torch.equal(base, torch.arange(12.0).reshape(3, 4))


def test_no_tensors_at_all_and_facts_of_any_shape(tmp_path):
    store = ArtifactStore(tmp_path)
    facts = {"curve": (1, 2.5), "name": "\u00e9", "nested": {"none": None}}
    made = store.fetch(KIND, {}, lambda _: ({}, facts))
    found = store.fetch(KIND, {}, never)
    assert made.tensors == found.tensors == {}
    assert (
        made.facts == found.facts == {"curve": [1, 2.5], "name": "\u00e9", "nested": {"none": None}}
    )


def test_the_record_says_what_the_artifact_is(tmp_path):
    store = ArtifactStore(tmp_path)
    artifact = store.fetch(KIND, SPEC, simple)
    record = json.loads((place_of(store) / "artifact.json").read_bytes())
    assert record["format"] == 1
    assert record["kind"] == KIND
    assert record["key"] == artifact.key
    assert record["spec"] == SPEC
    assert record["size"] == (place_of(store) / "tensors.safetensors").stat().st_size


def test_a_maker_may_fetch_other_artifacts_and_change_the_spec(tmp_path):
    store = ArtifactStore(tmp_path)
    spec = {"seed": 1}

    def outer(_checkpoint):
        spec["seed"] = 99
        return store.fetch("backbone", {"b": 1}, simple).tensors, {}

    store.fetch(KIND, spec, outer)
    assert store.contains(KIND, {"seed": 1})
    assert not store.contains(KIND, {"seed": 99})
    assert store.contains("backbone", {"b": 1})


def test_the_default_root(tmp_path, monkeypatch):
    monkeypatch.setenv("MIBENCH_CACHE", str(tmp_path / "here"))
    assert ArtifactStore().root == tmp_path / "here"
    monkeypatch.setenv("MIBENCH_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert ArtifactStore().root.name == "mibench"


# --- keys -------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(st.text("abcd", min_size=1, max_size=3), SCALARS, min_size=1, max_size=5),
    st.data(),
)
def test_a_key_depends_on_every_field_and_not_on_order(spec, data):
    store = ArtifactStore()
    key = store.key(KIND, spec)
    assert store.key(KIND, dict(data.draw(st.permutations(list(spec.items()))))) == key
    assert store.key("other", spec) != key
    name = data.draw(st.sampled_from(sorted(spec)))
    assert store.key(KIND, {k: v for k, v in spec.items() if k != name}) != key
    assert store.key(KIND, {**spec, "extra": None}) != key
    # repr tells True from 1, as JSON does and == does not
    other = data.draw(SCALARS.filter(lambda v: repr(v) != repr(spec[name])))
    assert store.key(KIND, {**spec, name: other}) != key
    assert store.key(KIND, {**spec, name: [spec[name]]}) != key


def test_a_key_sees_nested_fields_and_is_the_same_everywhere(tmp_path):
    store = ArtifactStore(tmp_path)
    changed = {**SPEC, "defense": {"name": "noise", "sigma": 0.25}}
    assert store.key(KIND, changed) != store.key(KIND, SPEC)
    assert store.key(KIND, SPEC) == "9734b6b17aa86a00"  # a change orphans every cache


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_spec_that_is_not_finite_is_refused(tmp_path, number):
    store = ArtifactStore(tmp_path)
    for call in (store.key, store.contains, lambda k, s: store.fetch(k, s, never)):
        with pytest.raises(ValueError, match="JSON compliant"):
            call(KIND, {"sigma": number})


@pytest.mark.parametrize("kind", ["", ".", "..", "a/b", "../a", ".hidden", "A", "a\n", "a b"])
def test_a_kind_is_a_plain_name(tmp_path, kind):
    with pytest.raises(ValueError, match="a kind is"):
        ArtifactStore(tmp_path).key(kind, {})


# --- damage -----------------------------------------------------------------------------------


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def edit(place, **fields):
    record = json.loads((place / "artifact.json").read_bytes())
    (place / "artifact.json").write_text(json.dumps({**record, **fields}))


def truncate(path, size):
    path.write_bytes(path.read_bytes()[:size])


DAMAGE = {
    "last byte of the tensors": lambda p: flip(p / "tensors.safetensors", -1),
    "first byte of the tensors": lambda p: flip(p / "tensors.safetensors", 0),
    "truncated tensors": lambda p: truncate(p / "tensors.safetensors", 40),
    "empty tensors": lambda p: truncate(p / "tensors.safetensors", 0),
    "no tensors": lambda p: (p / "tensors.safetensors").unlink(),
    "truncated json": lambda p: truncate(p / "artifact.json", 100),
    "empty json": lambda p: truncate(p / "artifact.json", 0),
    "no json": lambda p: (p / "artifact.json").unlink(),
    "json that is a list": lambda p: (p / "artifact.json").write_text("[]"),
    "json without fields": lambda p: (p / "artifact.json").write_text('{"format": 1}'),
    "not UTF-8": lambda p: (p / "artifact.json").write_bytes(b'"\xff"'),
    "another spec": lambda p: edit(p, spec={"seed": 4}),
    "another format": lambda p: edit(p, format=2),
    "altered facts": lambda p: edit(p, facts={"loss": 0.5, "epochs": 2}),
    "facts that are not finite": lambda p: edit(p, facts={"loss": math.nan}),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_artifact_is_made_again_with_a_warning(tmp_path, caplog, name):
    store = ArtifactStore(tmp_path)
    store.fetch(KIND, SPEC, simple)
    DAMAGE[name](place_of(store))
    artifact = store.fetch(KIND, SPEC, simple)
    assert not artifact.reused
    (warning,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert str(place_of(store)) in warning.getMessage()
    found = store.fetch(KIND, SPEC, never)
    assert found.facts == {"loss": 0.25, "epochs": 2}
    assert torch.equal(found.tensors["w"], torch.arange(6.0).reshape(2, 3))
    assert visible(store) == [artifact.key]


def test_contains_sees_damage_that_needs_no_hashing(tmp_path):
    cheap = set(DAMAGE) - {"last byte of the tensors", "first byte of the tensors"}
    for number, name in enumerate(sorted(cheap)):
        store = ArtifactStore(tmp_path / str(number))
        store.fetch(KIND, SPEC, simple)
        DAMAGE[name](place_of(store))
        assert not store.contains(KIND, SPEC), name


def test_a_file_in_the_place_of_an_artifact_is_removed(tmp_path):
    store = ArtifactStore(tmp_path)
    place_of(store).parent.mkdir(parents=True)
    place_of(store).write_bytes(b"")
    assert not store.contains(KIND, SPEC)
    store.fetch(KIND, SPEC, simple)
    assert store.fetch(KIND, SPEC, never).reused


# --- makers that fail, and checkpoints --------------------------------------------------------


class TrainingError(Exception):
    pass


def test_a_maker_that_raises_leaves_nothing(tmp_path):
    store = ArtifactStore(tmp_path)

    def fail(_checkpoint):
        raise TrainingError

    for error, make in [
        (TrainingError, fail),
        (ValueError, lambda _: ({}, {"loss": math.nan})),
        (TypeError, lambda _: ({}, {"loss": torch.ones(1)})),
    ]:
        with pytest.raises(error):
            store.fetch(KIND, SPEC, make)
        assert visible(store) == []
    assert not store.fetch(KIND, SPEC, simple).reused


def test_an_os_error_of_the_maker_is_not_taken_for_ours(tmp_path):
    def fail(_checkpoint):
        raise FileNotFoundError("images")

    with pytest.raises(FileNotFoundError, match="images"):
        ArtifactStore(tmp_path).fetch(KIND, SPEC, fail)


def test_training_goes_on_from_the_checkpoint_of_a_maker_that_raised(tmp_path):
    store = ArtifactStore(tmp_path)

    def fail(checkpoint):
        assert checkpoint.load() is None
        checkpoint.save({"state": torch.ones(4)}, {"step": 1})
        checkpoint.save({"state": torch.full((4,), 2.0)}, {"step": 2})
        raise TrainingError

    with pytest.raises(TrainingError):
        store.fetch(KIND, SPEC, fail)
    assert visible(store) == [f"{store.key(KIND, SPEC)}.partial"]
    assert not store.contains(KIND, SPEC)
    seen = []
    artifact = store.fetch(KIND, SPEC, trained(steps=5, seen=seen))
    assert seen == [2]
    assert torch.equal(artifact.tensors["state"], torch.full((4,), 5.0))
    assert visible(store) == [artifact.key]


def test_a_checkpoint_with_no_tensors_or_shared_ones(tmp_path):
    checkpoint = Checkpoint(tmp_path / "a.partial")
    checkpoint.save({}, {"step": 1, "rng": [1, 2]})
    assert checkpoint.load() == ({}, {"step": 1, "rng": [1, 2]})
    base = torch.ones(3, requires_grad=True)
    checkpoint.save({"a": base, "b": base}, {})
    tensors, facts = checkpoint.load()
    assert facts == {}
    assert torch.equal(tensors["a"], torch.ones(3))
    assert torch.equal(tensors["b"], torch.ones(3))
    with pytest.raises(ValueError, match="JSON compliant"):
        checkpoint.save({}, {"loss": math.nan})
    assert checkpoint.load()[1] == {}


def test_a_broken_checkpoint_is_ignored_with_a_warning(tmp_path, caplog):
    folder = tmp_path / "a.partial"
    Checkpoint(folder).save({"w": torch.ones(3)}, {"step": 100})
    file = folder / "checkpoint"
    whole = file.read_bytes()
    broken = [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in range(0, len(whole), 7)]
    broken += [whole[:i] for i in range(0, len(whole), 11)]
    broken += [b"", b"\n", whole + b"\0", b"\0" * 500]
    for data in broken:
        file.write_bytes(data)
        caplog.clear()
        assert Checkpoint(folder).load() is None
        assert "is broken" in caplog.text
    file.write_bytes(whole)
    assert Checkpoint(folder).load() is not None


def test_a_checkpoint_is_due_after_its_interval(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    checkpoint = Checkpoint(tmp_path / "a.partial", interval=30)
    assert not checkpoint.due()
    now[0] += 29.9
    assert not checkpoint.due()
    now[0] += 0.1
    assert checkpoint.due()
    checkpoint.save({}, {})
    assert not checkpoint.due()
    now[0] += 30
    assert checkpoint.due()


def test_a_checkpoint_that_outlived_its_training_is_dropped(tmp_path):
    store = ArtifactStore(tmp_path)
    artifact = store.fetch(KIND, SPEC, simple)
    Checkpoint(store.root / KIND / f"{artifact.key}.partial").save({}, {})
    assert store.fetch(KIND, SPEC, never).reused
    assert visible(store) == [artifact.key]


def test_leftovers_of_dead_processes_are_swept_and_those_of_other_keys_kept(tmp_path):
    store = ArtifactStore(tmp_path)
    key = store.key(KIND, SPEC)
    folder = tmp_path / KIND
    (folder / f".{key}.mibench-0.tmp").mkdir(parents=True)
    (folder / f".{key}.mibench-0.tmp" / "tensors.safetensors").write_bytes(b"half")
    (folder / ".0123.mibench-0.tmp").mkdir()
    (folder / f"{key}.partial").mkdir()
    half = folder / f"{key}.partial" / ".mibench-0.tmp"
    half.write_bytes(b"half")

    def make(_checkpoint):
        assert not half.exists()
        return {}, {}

    store.fetch(KIND, SPEC, make)
    assert visible(store) == [".0123.mibench-0.tmp", key]


# --- storage that fails -----------------------------------------------------------------------


def test_a_root_that_cannot_be_a_folder(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for root in (tmp_path / "file", tmp_path / "file" / "inner"):
        store = ArtifactStore(root)
        assert not store.contains(KIND, SPEC)
        with pytest.raises(StorageError, match="a part of this path is a file"):
            store.fetch(KIND, SPEC, never)


@pytest.mark.parametrize("call", ["fsync", "replace", "rename", "mkdir"])
def test_a_disk_that_fills_up_keeps_the_checkpoint(tmp_path, monkeypatch, call):
    store = ArtifactStore(tmp_path)

    def fail(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:

        def make(checkpoint):
            result = trained()(checkpoint)
            patch.setattr(os, call, fail)
            return result

        with pytest.raises(StorageError, match="disk is full") as caught:
            store.fetch(KIND, SPEC, make)
    assert "\n" not in str(caught.value)
    assert visible(store) == [f"{store.key(KIND, SPEC)}.partial"]
    seen = []
    assert not store.fetch(KIND, SPEC, trained(seen=seen)).reused
    assert seen == [STEPS]


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(tmp_path, monkeypatch):
    checkpoint = Checkpoint(tmp_path / "a.partial")
    checkpoint.save({}, {"step": 1})

    def fail(*_args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(StorageError, match="disk is full"):
            checkpoint.save({}, {"step": 2})
    assert checkpoint.load() == ({}, {"step": 1})
    assert [p.name for p in (tmp_path / "a.partial").iterdir()] == ["checkpoint"]


# --- several processes ------------------------------------------------------------------------


def die_at(root, fatal):
    """Trains, and is killed just before the given system call that changes the disk."""
    calls = [0]

    def deadly(real, half_written):
        def call(*args, **kwargs):
            if calls[0] == fatal:
                if half_written:
                    with contextlib.suppress(OSError):  # it may be a folder
                        os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            calls[0] += 1
            return real(*args, **kwargs)

        return call

    for name in ("mkdir", "rename", "replace", "unlink", "rmdir"):
        setattr(os, name, deadly(getattr(os, name), half_written=False))
    os.fsync = deadly(os.fsync, half_written=True)
    ArtifactStore(root).fetch(KIND, SPEC, trained())


def test_a_kill_before_any_system_call_leaves_nothing_that_loads_wrongly(tmp_path):
    starts = []
    exits = []
    while 0 not in exits:
        batch = []
        for fatal in range(len(exits), len(exits) + 4):  # together, since they mostly wait
            store = ArtifactStore(tmp_path / str(fatal))
            batch.append((store, CHILDREN.Process(target=die_at, args=(store.root, fatal))))
        run_all(*[child for _, child in batch])
        for store, child in batch:
            complete = store.contains(KIND, SPEC)
            seen = []
            artifact = store.fetch(KIND, SPEC, trained(seen=seen))
            assert artifact.reused == complete
            assert artifact.facts == {"step": STEPS}
            assert torch.equal(artifact.tensors["state"], torch.full((20_000,), float(STEPS)))
            assert visible(store) == [artifact.key]
            starts += seen
            exits.append(child.exitcode)
    assert set(exits) == {0, -signal.SIGKILL}
    assert exits.count(-signal.SIGKILL) > 15
    assert starts == sorted(starts)
    assert set(starts) == set(range(STEPS + 1))  # the later the kill, the more is kept


def train_for_ever(root, started):
    def make(checkpoint):
        started.set()
        return trained(steps=10**9, size=200_000)(checkpoint)

    ArtifactStore(root).fetch(KIND, SPEC, make)


def test_a_kill_at_random_instants_loses_no_more_than_a_step(tmp_path):
    store = ArtifactStore(tmp_path)
    instants = random.Random(0)
    reached = 0
    for _ in range(6):
        started = CHILDREN.Event()
        child = CHILDREN.Process(target=train_for_ever, args=(tmp_path, started))
        child.start()
        assert started.wait(20)
        time.sleep(instants.uniform(0.01, 0.2))
        child.kill()
        child.join(20)
        assert not store.contains(KIND, SPEC)
        saved = Checkpoint(tmp_path / KIND / f"{store.key(KIND, SPEC)}.partial").load()
        if saved is not None:
            assert saved[1]["step"] >= reached
            reached = saved[1]["step"]
            assert bool((saved[0]["state"] == reached).all())
    assert reached > 0
    seen = []
    artifact = store.fetch(KIND, SPEC, trained(steps=reached + 2, seen=seen))
    assert seen == [reached]
    assert artifact.facts == {"step": reached + 2}
    assert visible(store) == [artifact.key]


def fetch_and_count(root, counter, arrived, everyone, results):
    records = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("mibench").addHandler(handler)
    logging.getLogger("mibench").setLevel(logging.INFO)

    def make(_checkpoint):
        with counter.open("a") as file:
            file.write("made\n")
        everyone.wait(10)
        time.sleep(0.5)  # so that the others come to the lock
        return {"w": torch.ones(2)}, {}

    arrived.release()
    artifact = ArtifactStore(root).fetch(KIND, SPEC, make)
    results.put((artifact.reused, artifact.tensors["w"].tolist(), "\n".join(records)))


def test_processes_that_want_the_same_thing_make_it_once(tmp_path):
    counter = tmp_path / "counter"
    arrived, everyone = CHILDREN.Semaphore(0), CHILDREN.Event()
    results = CHILDREN.SimpleQueue()
    shared = (tmp_path, counter, arrived, everyone, results)
    children = [CHILDREN.Process(target=fetch_and_count, args=shared) for _ in range(3)]
    for child in children:
        child.start()
    for _ in children:
        assert arrived.acquire(timeout=20)
    everyone.set()
    for child in children:
        child.join(20)
        assert child.exitcode == 0
    assert counter.read_text() == "made\n"
    got = sorted(results.get() for _ in range(3))
    assert [reused for reused, _, _ in got] == [False, True, True]
    assert [values for _, values, _ in got] == [[1.0, 1.0]] * 3
    waited = [text for reused, _, text in got if reused and "waiting" in text]
    assert waited
    assert all("reusing" in text for text in waited)


def meet(root, mine, other):
    """Finishes making only if the other key is being made at the same time."""

    def make(_checkpoint):
        (root / f"{mine}.flag").touch()
        deadline = time.monotonic() + 15
        while not (root / f"{other}.flag").exists():
            assert time.monotonic() < deadline, "the keys block one another"
            time.sleep(0.01)
        return {}, {}

    ArtifactStore(root).fetch(KIND, {"seed": mine}, make)


def test_different_keys_are_made_at_the_same_time(tmp_path):
    children = [CHILDREN.Process(target=meet, args=(tmp_path, mine, 1 - mine)) for mine in (0, 1)]
    run_all(*children)
    assert [child.exitcode for child in children] == [0, 0]


def test_threads_that_want_the_same_thing_make_it_once(tmp_path):
    made = []
    results = []

    def make(_checkpoint):
        made.append(1)
        time.sleep(0.2)
        return {}, {}

    def work():
        results.append(ArtifactStore(tmp_path).fetch(KIND, SPEC, make).reused)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]
    assert sorted(results) == [False, True, True, True]


def test_when_the_first_maker_fails_the_one_that_waits_makes(tmp_path):
    inside = threading.Event()
    outcome = []

    def fail(_checkpoint):
        inside.set()
        time.sleep(0.2)
        raise TrainingError

    def first():
        try:
            ArtifactStore(tmp_path).fetch(KIND, SPEC, fail)
        except TrainingError:
            outcome.append("failed")

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait(10)
    artifact = ArtifactStore(tmp_path).fetch(KIND, SPEC, simple)
    thread.join()
    assert outcome == ["failed"]
    assert not artifact.reused


def test_a_full_cache_can_be_used_where_no_lock_can_be_made(tmp_path, monkeypatch):
    store = ArtifactStore(tmp_path)
    artifact = store.fetch(KIND, SPEC, simple)
    Checkpoint(tmp_path / KIND / f"{artifact.key}.partial").save({}, {})

    def refuse(*_args, **_kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    assert store.fetch(KIND, SPEC, never).reused
    with pytest.raises(StorageError, match="read-only"):
        store.fetch(KIND, {"other": 1}, never)
