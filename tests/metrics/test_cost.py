"""Costs against values worked out by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from mibench.metrics.cost import (
    PAIRS,
    WARM_UP,
    bytes_on_wire,
    client_cost,
    count_parameters,
    paired_latencies,
    peak_activation_bytes,
)


def test_a_convolution_costs_two_operations_per_multiply_add():
    convolution = nn.Conv2d(3, 8, 3, stride=2, padding=1)
    # 8 channels on 16x16 positions, each a sum over 3 channels of a 3x3 window.
    assert client_cost(convolution, torch.zeros(1, 3, 32, 32)) == 2 * 8 * 16 * 16 * 3 * 3 * 3


def test_a_client_costs_the_sum_of_its_layers():
    client = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 8 * 8, 10))
    expected = 2 * 4 * 8 * 8 * 3 + 2 * 10 * 4 * 8 * 8
    assert client_cost(client, torch.zeros(1, 3, 8, 8)) == expected


def test_any_callable_counts_and_builds_no_graph():
    convolution = nn.Conv2d(3, 8, 1, bias=False)
    outputs = []

    def two_branches(image):
        outputs.extend([convolution(image), convolution(image)])
        return outputs

    assert client_cost(two_branches, torch.zeros(1, 3, 4, 4)) == 2 * (2 * 8 * 4 * 4 * 3)
    assert not any(output.requires_grad for output in outputs)


def test_a_client_without_products_costs_nothing():
    assert client_cost(nn.ReLU(), torch.zeros(1, 3, 8, 8)) == 0


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (3,), ()])
def test_cost_refuses_anything_but_one_image(shape):
    with pytest.raises(ValueError, match="batch of one"):
        client_cost(nn.ReLU(), torch.zeros(shape))


def test_parameters_count_once_however_they_are_shared():
    layer = nn.Linear(4, 5)
    assert count_parameters([layer]) == 25
    assert count_parameters([layer, nn.Sequential(layer, nn.Linear(5, 2))]) == 25 + 12
    tied = nn.Linear(4, 5)
    tied.weight = layer.weight
    assert count_parameters([layer, tied]) == 25 + 5
    assert count_parameters([nn.BatchNorm2d(7)]) == 14
    assert count_parameters(iter([])) == 0


def test_bytes_are_per_image_in_the_dtype_sent():
    features = torch.zeros(8, 16, 4, 4)
    assert bytes_on_wire([features]) == 16 * 4 * 4 * 4
    assert bytes_on_wire([features.half(), torch.zeros(8, 10, dtype=torch.uint8)]) == 512 + 10
    assert bytes_on_wire([torch.zeros(8)]) == 4


@pytest.mark.parametrize(
    "tensors",
    [
        [],
        [torch.zeros(())],
        [torch.zeros(0, 3)],
        [torch.zeros(2, 3), torch.zeros(3, 3)],
    ],
)
def test_bytes_refuse_batches_that_disagree(tensors):
    with pytest.raises(ValueError, match="tensor"):
        bytes_on_wire(tensors)


def test_attention_counts_whatever_kernel_computes_it():
    heads, tokens, width = 3, 65, 8
    values = torch.rand(1, heads, tokens, width)
    counted = client_cost(lambda x: functional.scaled_dot_product_attention(x, x, x), values)
    assert counted == 2 * (2 * heads * tokens * tokens * width)


# --- memory --------------------------------------------------------------------------------------

IMAGE = 3 * 8 * 8 * 4


def peak(client, modules=None):
    return peak_activation_bytes(client, torch.zeros(1, 3, 8, 8), modules or [client])


def test_the_peak_is_the_largest_sum_of_what_lives_at_once():
    wide, narrow = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 2, 1)
    # The image lives to the end: whoever calls holds it. Between the layers nothing else does.
    assert peak(wide) == IMAGE + 16 * 64 * 4
    assert peak(nn.Sequential(wide, narrow)) == IMAGE + (16 + 2) * 64 * 4
    deep = nn.Sequential(wide, narrow, nn.Conv2d(2, 4, 1), nn.Conv2d(4, 2, 1))
    assert peak(deep) == IMAGE + (16 + 2) * 64 * 4


def test_a_skip_keeps_its_input_alive():
    first, second, third = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    class Skip(nn.Module):
        def forward(self, x):
            x = first(x)
            return x + third(second(x))

    # x, the third layer's result and the sum; the second layer's is gone by then.
    assert peak(Skip(), [first, second, third]) == IMAGE + 3 * 4 * 64 * 4


def test_views_and_work_in_place_take_no_memory_of_their_own():
    first = nn.Conv2d(3, 4, 1)
    flat = nn.Sequential(first, nn.ReLU(inplace=True), nn.Flatten())
    assert peak(flat) == IMAGE + 4 * 64 * 4
    assert peak(nn.Sequential(first, nn.ReLU())) == IMAGE + 2 * 4 * 64 * 4


def test_parameters_and_their_views_do_not_count_but_their_copies_do():
    layer = nn.Linear(5, 7)
    assert peak(lambda _: layer.weight.view(-1), [layer]) == IMAGE
    assert peak(lambda _: 2 * layer.weight, [layer]) == IMAGE + 5 * 7 * 4


def test_the_peak_is_the_same_at_every_call_and_refuses_batches():
    client = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    assert len({peak(client) for _ in range(3)}) == 1
    with pytest.raises(ValueError, match="batch of one"):
        peak_activation_bytes(client, torch.zeros(2, 3, 8, 8), [client])


# --- time ----------------------------------------------------------------------------------------


def test_calls_are_timed_by_turns_in_changing_order():
    order = []
    taken = paired_latencies(
        lambda: order.append("a"), lambda: order.append("b"), torch.device("cpu")
    )
    assert taken.shape == (PAIRS, 2)
    assert PAIRS >= 30
    assert len(order) == 2 * (PAIRS + WARM_UP)
    assert order[:4] in (["a", "b", "b", "a"], ["b", "a", "a", "b"])
    assert order.count("a") == order.count("b")


def test_the_time_is_that_of_each_call(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("mibench.metrics.cost.time.perf_counter", lambda: clock[0])

    def takes(seconds):
        clock[0] += seconds

    taken = paired_latencies(lambda: takes(3.0), lambda: takes(2.0), torch.device("cpu"))
    assert set(taken[:, 0].tolist()) == {3.0}
    assert set(taken[:, 1].tolist()) == {2.0}
