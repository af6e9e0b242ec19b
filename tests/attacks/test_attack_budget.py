"""Groups of images, and what happens when memory runs out."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mibench.attacks import budget
from mibench.attacks.budget import free_memory, images_at_once, in_groups, out_of_memory, split


def draw_each(part):
    """Work whose random draws come image by image."""
    return torch.stack([torch.randn(7) + place for place in range(part.start, part.stop)])


@given(count=st.integers(1, 40), size=st.integers(1, 50), fits=st.integers(1, 40))
def test_the_result_does_not_depend_on_the_groups_or_on_failures(count, size, fits):
    torch.manual_seed(0)
    whole = draw_each(slice(0, count))
    tried = []

    def work(part):
        drawn = draw_each(part)  # a failure comes after some draws
        tried.append(part.stop - part.start)
        if tried[-1] > fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return drawn

    torch.manual_seed(0)
    assert torch.equal(split(work, count, size), whole)
    failed = [one for one in tried if one > fits]
    # Sizes only shrink, by halves, and no success is done again.
    assert tried[: len(failed)] == failed
    assert all(later == earlier // 2 for earlier, later in zip(failed, tried[1:], strict=False))
    assert sum(one for one in tried if one <= fits) == count


def test_one_image_that_does_not_fit_is_an_error():
    def work(part):
        raise torch.OutOfMemoryError(f"CUDA out of memory with {part.stop - part.start}")

    with pytest.raises(torch.OutOfMemoryError, match="with 1"):
        split(work, 5, 4)


def test_another_error_is_not_tried_again():
    calls = []

    def work(part):
        calls.append(part)
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        split(work, 5, 4)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True),
        (MemoryError(), True),
        (RuntimeError("expected scalar type Float but found Half"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_which_errors_mean_that_memory_ran_out(error, expected):
    assert out_of_memory(error) is expected


def test_what_the_cpu_allocator_raises_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert out_of_memory(caught.value)


def test_groups_hold_their_own_shares_and_weights():
    shares = (torch.arange(5.0).view(5, 1), torch.arange(5.0).view(5, 1, 1) * 2)
    seen = []

    def attack(received, weights):
        seen.append(weights.tolist())
        return received[0].view(-1, 1, 1, 1) + received[1].view(-1, 1, 1, 1) * weights.view(
            -1, 1, 1, 1
        )

    found = in_groups(attack, shares, torch.arange(5.0), 2)
    assert seen == [[0, 1], [2, 3], [4]]
    assert found.flatten().tolist() == [k + 2 * k * k for k in range(5)]


def test_groups_shrink_with_the_image_and_with_free_memory(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(budget, "free_memory", lambda: math.inf)
    assert images_at_once((3, 32, 32), cpu) == 1365
    assert images_at_once((3, 224, 224), cpu) == 27
    assert images_at_once((3, 4096, 4096), cpu) == 1
    monkeypatch.setattr(budget, "free_memory", lambda: 2.0**30)
    assert images_at_once((3, 32, 32), cpu) == 2**29 // 2**11 // 3072
    assert isinstance(images_at_once((3, 32, 32), cpu), int)
    monkeypatch.setattr(budget, "free_memory", lambda: 0.0)
    assert images_at_once((3, 32, 32), cpu) == 1


@pytest.mark.parametrize("free", [0.0, 2.0**30, math.inf])
def test_where_groups_change_the_result_free_memory_does_not_change_the_groups(monkeypatch, free):
    monkeypatch.setattr(budget, "free_memory", lambda: free)
    assert images_at_once((3, 32, 32)) == 1365
    assert images_at_once((3, 4096, 4096)) == 1


def test_free_memory_is_read_where_the_system_tells_it(tmp_path):
    table = tmp_path / "meminfo"
    table.write_text("MemTotal:       16000000 kB\nMemAvailable:    2048 kB\n")
    assert free_memory(table) == 2**21
    table.write_text("MemTotal:       16000000 kB\n")
    assert free_memory(table) == math.inf
    assert free_memory(tmp_path / "none") == math.inf
