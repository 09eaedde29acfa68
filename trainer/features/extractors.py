"""Extractors compute the features that metrics compare: with onnxruntime on CPUs, with PyTorch on GPUs."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from catgan.command import UserError, say
from catgan.files import atomic_path, cache_dir
from trainer.distributed.collectives import broadcast, gather, rank, sum_over_ranks, world_size
from trainer.features import opennsfw
from trainer.features.networks import EFFLITE0, INCEPTION, OPENNSFW, Network
from trainer.features.weights import INCEPTION_SHA256, Unavailable, find_efflite0, find_inception, sha256

OFFLINE: dict[str, tuple[Network, Callable[[str], Path], str]] = {
    EFFLITE0.name: (EFFLITE0, find_efflite0, "EfficientNet-Lite0 with ImageNet weights"),
    OPENNSFW.name: (OPENNSFW, opennsfw.find_weights, "open_nsfw's ResNet-50"),
}
"""The networks whose weights are Python packages, how to find them, and what they are."""
CHOICES = ("auto", "inception", *OFFLINE)
DISCRIMINATOR_NETWORK = "discriminator_network"
"""Entry of a gen.onnx's metadata: the network whose features a discriminator of the training saw."""

MIN_FID = 2048
"""Fewest images for a FID: with fewer the covariance of Inception's 2,048 features is singular and the value mostly
bias."""

# Images per chunk, which limits the memory for images at the network's size.
_CHUNK = {"cpu": 64, "cuda": 128}

# Pixels per call of onnxruntime, which runs on one thread: 4 images for EfficientNet-Lite0, 1 for Inception. As many
# calls run in parallel as there are threads. One call on all threads takes 1.4 times as long for the first network and
# 1.1 times as long for the second (2 cores of an AMD EPYC, Zen 3).
_PIXELS_PER_CALL = 4 * 128**2


class Extractor(Protocol):
    """A metric network: a function from images to features."""

    name: str
    """"inception" only with pytorch-fid's weights; with other weights "inception-" and the start of their hash."""
    dim: int
    """Number of features."""
    weights_sha256: str
    resize: str
    """Name of the resizing, see ``Network.resize``."""
    device: torch.device

    def __call__(self, images: Tensor) -> Tensor:
        """Features float32 ``[n, dim]`` on ``device`` of images uint8 ``[n, 3, H, W]`` on any device.

        Images may also be float32 in 0 to 255, for metrics that depend on differences below one level.
        """
        ...

    def logits(self, features: Tensor) -> Tensor:
        """The output of the network's last layer for ``features``: float32 ``[n, classes]``."""
        ...


class NetworkExtractor:
    """An ``Extractor`` of a ``Network`` with the weights of a file.

    Args:
        threads: on a CPU, calls that run in parallel; by default as many as PyTorch has threads.

    Raises:
        UserError: the file does not hold the network's weights; on a CPU also: onnxruntime is missing, or the cache
            cannot be written.
    """

    def __init__(self, network: Network, weights: Path, device: torch.device, threads: int | None = None) -> None:
        self.dim, self.resize, self.device = network.dim, network.resize, device
        self.weights_sha256 = sha256(weights)
        self.name = network.name
        if network.name == INCEPTION.name and self.weights_sha256 != INCEPTION_SHA256:
            self.name = f"{network.name}-{self.weights_sha256[:8]}"
        self._load_head = partial(network.load_head, weights)
        if device.type == "cpu":
            self._run = _onnx_runner(network, _onnx_file(network, weights, self.weights_sha256), threads)
        else:
            self._run = _torch_runner(network, weights, device)

    def __call__(self, images: Tensor) -> Tensor:
        assert images.dtype in (torch.uint8, torch.float32), images.dtype
        assert images.ndim == 4, images.shape
        assert images.shape[1] == 3, images.shape
        with torch.no_grad():
            return torch.cat([self._run(chunk.to(self.device)) for chunk in images.split(_CHUNK[self.device.type])])

    @cached_property
    def _head(self) -> nn.Module:
        return self._load_head().to(self.device)

    def logits(self, features: Tensor) -> Tensor:
        with torch.no_grad(), _without_tf32():
            return self._head(features)


@contextmanager
def _without_tf32() -> Iterator[None]:
    """TF32 saves little here and makes distances depend on the kind of GPU."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        matmul.allow_tf32 = before


def _torch_runner(network: Network, weights: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    module = network.load(weights).to(device).to(memory_format=torch.channels_last)

    def run(images: Tensor) -> Tensor:
        pixels = network.prepare(images).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, enabled=False), _without_tf32():
            return module(pixels)

    return run


def _onnx_runner(network: Network, path: Path, threads: int | None) -> Callable[[Tensor], Tensor]:
    ort = _import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    pool = ThreadPoolExecutor(threads or torch.get_num_threads())  # the ranks of a machine share its cores
    images_per_call = max(1, _PIXELS_PER_CALL // network.size**2)

    def call(pixels: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["features"], {"pixels": pixels.numpy()})[0])

    def run(images: Tensor) -> Tensor:
        # This thread prepares a few images at a time, so that they stay in the CPU's caches, while the pool computes.
        return torch.cat(list(pool.map(call, map(network.prepare, images.split(images_per_call)))))

    return run


def _import_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise UserError("metrics on a CPU need onnxruntime: pip install 'catgan[infer]'") from None
    return onnxruntime


def _onnx_file(network: Network, weights: Path, digest: str) -> Path:
    """The network as an ONNX file in the cache, exported once for each set of weights in about 10 seconds.

    onnxruntime is 10 times as fast as eager PyTorch for EfficientNet-Lite0 and 3 times for Inception (2 cores of an AMD
    EPYC, Zen 5); the features agree to 1e-4.
    """
    version = re.sub(r"[^\w.]", "_", torch.__version__)
    path = cache_dir() / f"{network.name}-{digest[:16]}-torch{version}.onnx"
    if path.is_file():
        return path
    say(f"exporting {network.name} for onnxruntime (once): {path}")
    module = network.load(weights)
    example = torch.zeros(2, 3, network.size, network.size)
    with atomic_path(path) as temporary, warnings.catch_warnings(action="ignore"):
        torch.onnx.export(
            module,
            (example,),
            temporary,
            input_names=["pixels"],
            output_names=["features"],
            opset_version=18,
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("n")},),
            external_data=False,
            verbose=False,
        )
    return path


def offline_network(projected_weight: float) -> str:
    """The name of the network that evaluates without Inception: one that the discriminator does not contain, since a
    generator that was trained on its features would look better than it is.

    Args:
        projected_weight: of the second discriminator, whose network is EfficientNet-Lite0; 0: there is none.
    """
    return OPENNSFW.name if projected_weight else EFFLITE0.name


def choose_extractor(
    name: str = "auto",
    weights: str | Path | None = None,
    device: torch.device | None = None,
    num_fake: int = MIN_FID,
    offline: str = "efflite0",
) -> Extractor:
    """Open the metric network ``name``, the same one on every rank; rank 0 logs which one and why.

    Args:
        name: "inception", an entry of ``OFFLINE``, or "auto": Inception if its weights are found or can be downloaded,
            else ``offline``, whose weights are installed.
        weights: file with InceptionV3's weights; implies "inception".
        device: default: the current GPU if there is one, else the CPU.
        num_fake: number of generated images; "auto" takes ``offline`` if they are too few for FID.
        offline: see ``name``.

    Raises:
        UserError: unknown name; weights that are missing or not Inception's; "inception" without its weights.
    """
    if name not in CHOICES:
        raise UserError(f"unknown extractor {name!r}: choose one of {', '.join(CHOICES)}")
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name in OFFLINE:
        if weights:
            raise UserError(f"weights are given for extractor {name}, which has its own: leave one of them out")
        return _installed(name, device)
    if name == "auto" and not weights and num_fake < MIN_FID:
        return _installed(offline, device, f"FID needs {MIN_FID:,} generated images, not {num_fake:,}")
    path, problem = _inception_on_all_ranks(weights)
    if path is None:
        if name == "inception":
            raise UserError(
                f"no Inception weights ({problem}): give the file pt_inception-2015-12-05-6726825d.pth as weights, "
                "or choose the extractor efflite0"
            )
        return _installed(offline, device, f"no Inception weights: {problem}")
    extractor = NetworkExtractor(INCEPTION, path, device)
    if rank() == 0 and extractor.name == INCEPTION.name:
        say(f"metric network: inception ({path}), so distances are FID")
    elif rank() == 0:
        say(
            f"warning: {path} is not pytorch-fid's file (its sha256 starts with {extractor.weights_sha256[:8]}): "
            f"results are not FID and are named after {extractor.name}"
        )
    return extractor


def _installed(name: str, device: torch.device, reason: str | None = None) -> Extractor:
    network, find_weights, what = OFFLINE[name]
    weights = find_weights(f"extractor {name}")
    if rank() == 0:
        say(f"metric network: {name}, {what}{f' ({reason})' if reason else ''}")
    return NetworkExtractor(network, weights, device)


def _inception_on_all_ranks(weights: str | Path | None) -> tuple[Path | None, str]:
    """Path of Inception's weights on this rank and "", or on all ranks None and the reason.

    Rank 0 looks first, so that where it fails no other rank waits for a download.
    """

    def find() -> tuple[Path | None, str]:
        try:
            return find_inception(weights), ""
        except Unavailable as reason:
            return None, str(reason)

    path, problem = find() if rank() == 0 else (None, "")
    found, problem = broadcast((path is not None, problem))
    if not found:
        return None, problem
    if rank() != 0:
        path, _ = find()
    num_found = int(sum_over_ranks(torch.tensor([float(path is not None)])).item())
    if num_found < world_size():
        return None, f"found on {num_found} of {world_size()} workers only"
    if path and world_size() > 1 and len(set(gather(sha256(path)))) > 1:
        return None, "not the same file on all workers"
    return path, ""


def imagenet_classifier(threads: int | None = None) -> Callable[[Tensor], Tensor]:
    """EfficientNet-Lite0 with its last layer, on the CPU.

    Args:
        threads: see ``NetworkExtractor``.

    Returns:
        A function from images uint8 ``[n, 3, H, W]`` to the probabilities of ImageNet's classes, float32 ``[n, 1000]``.

    Raises:
        UserError: its package or onnxruntime is not installed, or the cache cannot be written.
    """
    network = NetworkExtractor(EFFLITE0, find_efflite0("the ImageNet classifier"), torch.device("cpu"), threads)
    return lambda images: network.logits(network(images)).softmax(1)
