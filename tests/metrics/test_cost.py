"""Costs against values worked out by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from mibench.metrics.cost import bytes_on_wire, client_cost, count_parameters


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
