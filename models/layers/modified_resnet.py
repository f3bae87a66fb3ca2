"""ModifiedResNet, the convolutional image encoder of CLIP (port of openai/CLIP model.py, d05afc4).

It differs from torchvision's ResNet in its three-convolution stem, in strides that are average pools before a
stride-1 convolution, and in attention pooling at the end.
"""

from __future__ import annotations

from torch import Tensor, nn

from vlm_export.models.layers.blocks import AttentionPooling


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions with a residual; the stride is an average pool."""

    def __init__(self, inputs: int, planes: int, stride: int, downsample: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(planes, planes * 4, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * 4)
        self.relu = nn.ReLU()
        self.downsample: nn.Module = nn.Identity()
        if downsample:
            # The convolution and its norm keep the published positions 0 and 1, hence the pool in front.
            self.downsample = nn.Sequential(
                nn.AvgPool2d(stride) if stride > 1 else nn.Identity(),
                nn.Conv2d(inputs, planes * 4, 1, bias=False),
                nn.BatchNorm2d(planes * 4),
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.pool(self.relu(self.bn2(self.conv2(y))))
        y = self.bn3(self.conv3(y))
        joined: Tensor = self.relu(y + self.downsample(x))
        return joined


class ModifiedResNet(nn.Module):
    """pixel_values float32 (B, 3, S, S), normalised → image_embeds float32 (B, D), not normalised."""

    def __init__(self, layers: tuple[int, ...], width: int, image_size: int, heads: int, embed_dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.pool = nn.AvgPool2d(2)
        self.stages = nn.ModuleList()
        inputs = width
        for stage, blocks in enumerate(layers):
            planes = width * 2**stage
            self.stages.append(_build_stage(inputs, planes, blocks, stride=1 if stage == 0 else 2))
            inputs = planes * 4
        self.attnpool = AttentionPooling((image_size // 32) ** 2, width * 32, heads, embed_dim)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(pixel_values)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.pool(self.relu(self.bn3(self.conv3(x))))
        for stage in self.stages:
            x = stage(x)
        pooled: Tensor = self.attnpool(x)
        return pooled


def _build_stage(inputs: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
    first = Bottleneck(inputs, planes, stride, downsample=True)
    return nn.Sequential(first, *(Bottleneck(planes * 4, planes, 1, downsample=False) for _ in range(blocks - 1)))
