"""The fast convolution for CPUs is a convolution."""

import copy
import pickle

import lpips
import pytest
import torch
from torch import nn

from rae.autoencoder.winograd import FEWEST_CHANNELS, WinogradConv, use_winograd
from tests.conftest import relative_error


def frozen_pair(channels: int = FEWEST_CHANNELS, out: int = 64) -> tuple[nn.Conv2d, WinogradConv]:
    torch.manual_seed(0)
    direct = nn.Conv2d(channels, out, 3, padding=1).requires_grad_(False)
    return direct, WinogradConv(direct)


@pytest.mark.parametrize("size", [(8, 8), (16, 12), (9, 14), (11, 8)])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_values_and_gradients_are_the_direct_convolutions(size, layout):
    direct, fast = frozen_pair()
    exactly = copy.deepcopy(direct).double()
    x, weight = torch.randn(3, FEWEST_CHANNELS, *size), torch.randn(3, 64, *size)
    found = []
    for conv, dtype in ((exactly, torch.float64), (fast, torch.float32)):
        image = x.to(dtype, memory_format=layout).requires_grad_()
        out = conv(image)
        found.append((out, *torch.autograd.grad((out * weight.to(dtype)).sum(), image)))
    for exact, ours in zip(*found, strict=True):
        assert relative_error(ours, exact) < 2e-5


def test_an_image_has_the_same_values_in_any_batch():
    _, fast = frozen_pair()
    x = torch.randn(9, FEWEST_CHANNELS, 24, 24)  # more than are worked on at a time
    assert relative_error(torch.cat([fast(image[None]) for image in x]), fast(x)) < 1e-6


def test_a_relu_may_work_in_place_on_its_output():
    direct, fast = frozen_pair()
    for size in (8, 9):
        x = torch.randn(1, FEWEST_CHANNELS, size, size, requires_grad=True)
        gradients = [torch.autograd.grad(torch.relu_(conv(x)).sum(), x)[0] for conv in (direct, fast)]
        assert relative_error(gradients[1], gradients[0]) < 1e-4


def test_new_weights_are_used():
    direct, fast = frozen_pair()
    x = torch.randn(1, FEWEST_CHANNELS, 8, 8)
    fast(x)
    direct.load_state_dict({name: -2 * tensor for name, tensor in direct.state_dict().items()})
    assert relative_error(fast(x), direct(x)) < 2e-5


def test_everything_else_takes_the_direct_way():
    direct, fast = frozen_pair()
    x = torch.randn(2, FEWEST_CHANNELS, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(x), direct(x))
    for other in (x[0], x[:0], x[:, :, :4], x[:, :, :, :7]):  # one image, none, small maps
        assert torch.equal(fast(other), direct(other))
    fast.weight.requires_grad_()
    assert fast(x).grad_fn is not None
    fast.weight.requires_grad_(False)
    assert torch.equal(fast.double()(x.double()), direct.double()(x.double()))


def test_a_first_call_without_gradients_serves_later_ones():
    direct, fast = frozen_pair()
    x = torch.randn(1, FEWEST_CHANNELS, 8, 8, requires_grad=True)
    with torch.inference_mode():
        assert relative_error(fast(x), direct(x)) < 2e-5
        made_here = WinogradConv(nn.Conv2d(FEWEST_CHANNELS, 8, 3, padding=1).requires_grad_(False))
        assert made_here(x).shape == (1, 8, 8, 8)
    gradients = [torch.autograd.grad(conv(x).sum(), x)[0] for conv in (direct, fast)]
    assert relative_error(gradients[1], gradients[0]) < 2e-5


def test_its_gradient_does_not_follow_autocast_and_has_none_itself():
    direct, fast = frozen_pair()
    x = torch.randn(1, FEWEST_CHANNELS, 8, 8, requires_grad=True)
    loss = (fast(x) ** 2).sum()
    with torch.autocast("cpu", torch.bfloat16):
        (gradient,) = torch.autograd.grad(loss, x)
    assert relative_error(gradient, torch.autograd.grad((direct(x) ** 2).sum(), x)[0]) < 1e-4
    (gradient,) = torch.autograd.grad((fast(x) ** 2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_copies_do_not_carry_the_transformed_weights():
    _, fast = frozen_pair()
    fast(torch.randn(1, FEWEST_CHANNELS, 8, 8))
    assert len(pickle.dumps(fast)) < 2 * fast.weight.nbytes


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_it_replaces_the_deep_layers_of_vgg_alone():
    network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).net.requires_grad_(False)
    names = network.state_dict().keys()
    use_winograd(network)
    replaced = {name for name, module in network.named_modules() if isinstance(module, WinogradConv)}
    assert replaced == {f"slice{name}" for name in ("3.12", "3.14", "4.17", "4.19", "4.21", "5.24", "5.26", "5.28")}
    assert network.state_dict().keys() == names


@pytest.mark.parametrize("other", [{"stride": 2}, {"padding": 0}, {"dilation": 2}, {"groups": 2}, {"bias": False}])
def test_other_convolutions_stay(other):
    assert not WinogradConv.pays(nn.Conv2d(FEWEST_CHANNELS, 8, 3, **{"padding": 1, **other}))
    assert WinogradConv.pays(nn.Conv2d(FEWEST_CHANNELS, 8, 3, padding=1))
