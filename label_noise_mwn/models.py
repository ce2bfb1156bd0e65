"""ResNet-32 and WRN-28-10 for 32x32 images, a small ResNet for 8x8 and 28x28 ones, an MLP, and the weight net."""

from __future__ import annotations

from math import prod

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut of option A: every second pixel, and zeros for the channels that are new."""

    def __init__(self, n_in: int, n_out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.stride, self.new_channels = stride, n_out - n_in

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.new_channels:
            before = self.new_channels // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.new_channels - before))
        return F.relu(out + x)


def resnet(depth: int, n_classes: int, n_channels: int = 3, width: int = 16) -> nn.Module:
    """The CIFAR ResNet of He et al. (2016), depth 6n + 2: three groups of n blocks, with 1, 2 and 4 times `width` channels."""
    n = (depth - 2) // 6
    layers = [nn.Conv2d(n_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    n_in = width
    for group in range(3):
        for block in range(n):
            n_out = width * 2**group
            layers.append(BasicBlock(n_in, n_out, stride=2 if group and block == 0 else 1))
            n_in = n_out
    return _initialized(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n_in, n_classes)))


class WideBlock(nn.Module):
    """BatchNorm and ReLU before each convolution; a 1x1 convolution as shortcut where the shape changes."""

    def __init__(self, n_in: int, n_out: int, stride: int):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(n_in), nn.BatchNorm2d(n_out)
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(n_in, n_out, 1, stride, bias=False) if n_in != n_out else None

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return out + (x if self.shortcut is None else self.shortcut(activated))


def wide_resnet(depth: int, widen: int, n_classes: int, n_channels: int = 3) -> nn.Module:
    """Zagoruyko and Komodakis (2016), depth 6n + 4, without dropout."""
    n = (depth - 4) // 6
    layers: list[nn.Module] = [nn.Conv2d(n_channels, 16, 3, padding=1, bias=False)]
    n_in = 16
    for group in range(3):
        for block in range(n):
            n_out = 16 * widen * 2**group
            layers.append(WideBlock(n_in, n_out, stride=2 if group and block == 0 else 1))
            n_in = n_out
    layers += [nn.BatchNorm2d(n_in), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n_in, n_classes)]
    return _initialized(nn.Sequential(*layers))


def mlp(image_shape: tuple[int, int, int], n_classes: int, width: int) -> nn.Module:
    """Two hidden layers of `width` units on images (channels, height, width): soon knows some thousand images by heart."""
    layers = [nn.Flatten(), nn.Linear(prod(image_shape), width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return _initialized(nn.Sequential(*layers, nn.Linear(width, n_classes)))


def weight_net() -> nn.Module:
    """(n, 1) losses of samples -> (n, 1) weights in (0, 1)."""
    return nn.Sequential(nn.Linear(1, 100), nn.ReLU(), nn.Linear(100, 1), nn.Sigmoid())


MODELS = {  # functions of (number of classes, (channels, height, width) of an image, times as many channels or units inside)
    "resnet32": lambda n_classes, shape, times=1: resnet(32, n_classes, shape[0], width=16 * times),
    "wrn28_10": lambda n_classes, shape, times=1: wide_resnet(28, 10 * times, n_classes, shape[0]),
    "small": lambda n_classes, shape, times=1: resnet(8, n_classes, shape[0], width=8 * times),
    "mlp": lambda n_classes, shape, times=1: mlp(shape, n_classes, width=256 * times),
}


def _initialized(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model
