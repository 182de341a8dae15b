"""The ResNets for CIFAR-10 of He et al. 2016, section 4.2, with parameter-free shortcuts (option A).

Module names are those of the well-known public checkpoints (Y. Idelbayev, pytorch_resnet_cifar10), so that they load
key for key.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..registry import MODELS
from .classifier import IMAGENET_MEAN, IMAGENET_STD, Classifier, per_channel


class PaddedShortcut(nn.Module):
    """Option A: every ``stride``-th pixel, with zero channels added on both sides."""

    def __init__(self, extra: int, stride: int) -> None:
        super().__init__()
        self.extra, self.stride = extra, stride

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, C + extra, H / stride, W / stride]``."""
        before = self.extra // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.extra - before))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm around an option-A shortcut."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        same = stride == 1 and width_in == width
        self.shortcut: nn.Module = nn.Identity() if same else PaddedShortcut(width - width_in, stride)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """``relu(F(x) + shortcut(x))``."""
        residual = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        out: Tensor = self.relu2(residual + self.shortcut(x))
        return out


def _stage(width_in: int, width: int, stride: int, blocks: int) -> nn.Sequential:
    first = BasicBlock(width_in, width, stride)
    return nn.Sequential(first, *(BasicBlock(width, width, 1) for _ in range(blocks - 1)))


class CifarResNet(nn.Module):
    """``6 * blocks + 2`` layers: stages of widths 16, 32, 64 on grids of 1, 1/2, 1/4, then a pooled linear head."""

    def __init__(self, blocks: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = _stage(16, 16, 1, blocks)
        self.layer2 = _stage(16, 32, 2, blocks)
        self.layer3 = _stage(32, 64, 2, blocks)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, K]`` of normalised images."""
        features = self.layer3(self.layer2(self.layer1(self.relu(self.bn1(self.conv1(x))))))
        logits: Tensor = self.linear(features.mean((2, 3)))
        return logits


def _cifar_resnet(blocks: int, num_classes: int, in_channels: int) -> Classifier:
    mean, std = per_channel(IMAGENET_MEAN, in_channels), per_channel(IMAGENET_STD, in_channels)
    # ImageNet's numbers, not CIFAR's: the public checkpoints were trained with them.
    net = CifarResNet(blocks, num_classes, in_channels)
    return Classifier(net, mean, std, num_classes=num_classes, input_size=32)


@MODELS.register("cifar-resnet20", paper="He et al. 2016, section 4.2")
def cifar_resnet20(num_classes: int = 10, in_channels: int = 3) -> Classifier:
    """ResNet-20 for 32-pixel images, 270k parameters; last feature map 8x8."""
    return _cifar_resnet(3, num_classes, in_channels)


@MODELS.register("cifar-resnet56", paper="He et al. 2016, section 4.2")
def cifar_resnet56(num_classes: int = 10, in_channels: int = 3) -> Classifier:
    """ResNet-56 for 32-pixel images, 853k parameters; last feature map 8x8."""
    return _cifar_resnet(9, num_classes, in_channels)
