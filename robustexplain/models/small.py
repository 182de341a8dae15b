"""Small networks for images of about 32 pixels: quick on a CPU, with a linear head on pooled features (CAM applies)."""

from __future__ import annotations

from torch import Tensor, nn

from ..registry import MODELS
from .classifier import Classifier, per_channel


def _convolution(width_in: int, width: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(width_in, width, 3, stride=stride, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(width), nn.ReLU()]


class SmallCNN(nn.Module):
    """Four 3x3 convolutions with batch norm and ReLU, two of them of stride 2, average pooling, a linear head."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        # Batch norm, since without it a net with a pooled head needs several times the epochs on little data.
        self.features = nn.Sequential(
            *_convolution(in_channels, 16, 2),
            *_convolution(16, 32, 1),
            *_convolution(32, 64, 2),
            *_convolution(64, 64, 1),
        )
        self.head = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, K]`` of normalised images."""
        logits: Tensor = self.head(self.features(x).mean((2, 3)))
        return logits


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut, projected (1x1 convolution) where the shape changes."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width_in != width:
            projection = nn.Conv2d(width_in, width, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(width))
        # A ReLU of its own for each place: methods that name layers can tell the two apart.
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """``relu(F(x) + shortcut(x))``."""
        residual = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        out: Tensor = self.relu2(residual + self.shortcut(x))
        return out


class SmallResNet(nn.Module):
    """A stride-2 stem and three residual blocks of widths 24, 48, 96 and strides 1, 2, 1: grids of 1/2, 1/4, 1/4."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_convolution(in_channels, 24, 2))
        self.stages = nn.Sequential(ResidualBlock(24, 24, 1), ResidualBlock(24, 48, 2), ResidualBlock(48, 96, 1))
        self.head = nn.Linear(96, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, K]`` of normalised images."""
        logits: Tensor = self.head(self.stages(self.stem(x)).mean((2, 3)))
        return logits


def _centred(net: nn.Module, num_classes: int, in_channels: int, input_size: int) -> Classifier:
    half = per_channel((0.5,), in_channels)
    return Classifier(net, half, half, num_classes=num_classes, input_size=input_size)


@MODELS.register("small-cnn")
def small_cnn(num_classes: int = 10, in_channels: int = 1) -> Classifier:
    """Four convolutions with batch norm, 61k parameters; last feature map 8x8 at 32 pixels."""
    return _centred(SmallCNN(num_classes, in_channels), num_classes, in_channels, 32)


@MODELS.register("small-resnet")
def small_resnet(num_classes: int = 10, in_channels: int = 1) -> Classifier:
    """Three residual blocks with batch norm, 174k parameters; last feature map 7x7 at 28 pixels."""
    return _centred(SmallResNet(num_classes, in_channels), num_classes, in_channels, 28)
