"""The WideResNet: the published sizes, and that the noise level reaches the logits."""

import pytest
import torch

from model.wide_resnet import WideResNet
from support.errors import UserError


@pytest.mark.parametrize(
    ("depth", "width", "published"),
    [(28, 10, 36_479_194), (16, 8, 10_961_370), (40, 2, 2_243_546)],
)
def test_without_the_time_embedding_it_has_the_published_parameters(depth, width, published):
    with torch.device("meta"):
        net = WideResNet(3, 10, depth, width)
    counts = {name: p.numel() for name, p in net.named_parameters()}
    assert sum(n for name, n in counts.items() if "time_emb" not in name) == published


def test_any_image_size_and_every_block_hears_of_the_noise_level():
    torch.manual_seed(0)
    net = WideResNet(1, 7, 10, 1).eval()
    x = torch.randn(3, 1, 28, 28)
    c_noise = torch.tensor([0.0, 0.5, 1.0])
    logits = net(x, c_noise)
    assert logits.shape == (3, 7)
    assert torch.allclose(net(x[1:2], c_noise[1:2])[0], logits[1], atol=1e-5)
    for block in net.blocks:
        linear = block.time_emb[1]
        kept = linear.weight.detach().clone()
        with torch.no_grad():
            linear.weight.zero_()
            assert not torch.allclose(net(x, c_noise), logits, atol=1e-5)
            linear.weight.copy_(kept)
    assert torch.equal(net(x, c_noise), logits)


def test_each_group_halves_the_image_but_the_first():
    net = WideResNet(3, 10, 16, 1).eval()
    sizes = []
    for block in net.blocks:
        block.register_forward_hook(lambda _, __, out: sizes.append(tuple(out.shape[1:])))
    net(torch.randn(1, 3, 16, 16), torch.zeros(1))
    assert sizes == [(16, 16, 16)] * 2 + [(32, 8, 8)] * 2 + [(64, 4, 4)] * 2


@pytest.mark.parametrize(("depth", "width"), [(11, 1), (4, 1), (10, 0)])
def test_a_depth_or_width_that_there_is_not(depth, width):
    with pytest.raises(UserError, match=r"6 n \+ 4"):
        WideResNet(3, 10, depth, width)
