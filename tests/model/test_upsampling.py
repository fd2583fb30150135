"""The convolution of an upsampled map against upsampling and convolving."""

import pytest
import torch
import torch.nn.functional as F

from model.layers import upsampling
from model.layers.upsampling import conv_of_upsampled


@pytest.fixture(params=["taps first", "convolution"])
def way(request, monkeypatch):
    monkeypatch.setattr(upsampling, "_taps_first", lambda *_: request.param == "taps first")


@pytest.mark.parametrize("scale", [1.0, 2.0, 3.0, 4.0])
@pytest.mark.parametrize("height, width", [(1, 1), (2, 5), (7, 4)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_same_values_and_gradients(way, scale, height, width, with_bias):
    torch.manual_seed(0)
    x = torch.randn(2, 6, height, width, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 6, 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True) if with_bias else None
    inputs = [x, weight] + ([bias] if with_bias else [])

    found = conv_of_upsampled(x, weight, bias, scale)
    expected = F.conv2d(F.interpolate(x, scale_factor=scale, mode="bilinear"), weight, bias, padding=1)
    torch.testing.assert_close(found, expected)

    direction = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(found, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_a_matrix_made_in_inference_serves_training():
    x, weight = torch.randn(1, 64, 9, 9), torch.randn(2, 64, 3, 3, requires_grad=True)
    with torch.inference_mode():
        conv_of_upsampled(x, weight, None, 4.0)
    conv_of_upsampled(x, weight, None, 4.0).sum().backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_low_precisions_stay_close(dtype, tolerance):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 32, 14, 14), torch.randn(4, 32, 3, 3) / 17, torch.randn(4)
    expected = conv_of_upsampled(x, weight, bias, 4.0)
    found = conv_of_upsampled(x.to(dtype), weight.to(dtype), bias.to(dtype), 4.0)
    assert found.dtype == dtype
    assert (found.float() - expected).norm() <= tolerance * expected.norm()


def test_autocast_keeps_its_precision():
    x, weight, bias = torch.randn(1, 64, 9, 9), torch.randn(2, 64, 3, 3), torch.randn(2)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv_of_upsampled(x, weight, bias, 4.0).dtype == torch.bfloat16
