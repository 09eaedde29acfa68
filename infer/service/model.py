"""The generator that is served, and what identifies it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import features

from catgan.dataset import canonical_json, tool
from infer.diagnosis import import_onnxruntime
from infer.latents import latents
from infer.session import Generator


@dataclass(frozen=True)
class Model:
    """A loaded generator.

    Attributes:
        generator: computes images.
        versions: of everything that images and files depend on.
    """

    generator: Generator
    versions: dict[str, str]

    @property
    def size(self) -> int:
        """Side of an image in pixels."""
        return self.generator.size

    @property
    def z_dim(self) -> int:
        """Size of a latent."""
        return self.generator.z_dim

    @property
    def fingerprint(self) -> str:
        """Changes with the model and with everything else that could change the bytes of an image."""
        return canonical_json([self.generator.sha256, self.generator.provider, self.versions]).decode()

    def info(self) -> dict[str, Any]:
        """For ``/info``."""
        return {
            "sha256": self.generator.sha256,
            "size": self.size,
            "z_dim": self.z_dim,
            "classes": list(self.generator.classes),
            "provider": self.generator.provider,
            "metadata": self.generator.metadata,
            "versions": self.versions,
        }


def load(path: Path, device: str) -> Model:
    """Load the generator in the file ``path`` and compute an image with it.

    Raises:
        UserError: the file is not a generator, or does not work.
    """
    generator = Generator(path, device)
    generator(latents([0], generator.z_dim))
    name, _, version = tool().partition(" ")
    versions = {
        name: version or "not installed",
        "onnxruntime": import_onnxruntime().__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "libwebp": str(features.version("webp")),
        "libjpeg": str(features.version("libjpeg_turbo") or features.version("jpg")),
        "zlib": str(features.version("zlib")),
    }
    return Model(generator, versions)
