"""``catinfer`` on damaged models in separate processes, so that crashes are detected: 300, in ``make soak`` thousands.

``CATGAN_FUZZ=20000 pytest -m soak tests/infer/test_fuzz.py`` tests more; the mutants are the same in every run. After a
failure the files that cause it are kept, and their paths are printed.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import selectors
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

MUTANTS = int(os.environ.get("CATGAN_FUZZ", "5000"))  # of make soak
WORKERS = 2
SECONDS = 60  # for one mutant, on a busy machine
MEMORY = 8 * 2**30  # address space of a worker, so that a terabyte is an error

Random = np.random.Generator


@pytest.mark.parametrize("count", [300, pytest.param(MUTANTS, marks=[pytest.mark.soak, pytest.mark.timeout(1500)])])
def test_mutants_give_a_clean_error_or_an_image(generators: list[bytes], tmp_path: Path, count: int) -> None:
    """Exit status 2 and one line, or 0 and an image of finite values: never a traceback, a hang or a crash."""
    with ThreadPoolExecutor(WORKERS) as pool:
        results = list(pool.map(lambda n: _run_share(range(n, count, WORKERS), generators, tmp_path), range(WORKERS)))
    outcomes = sum((counts for counts, _ in results), Counter())
    failures = [failure for _, found in results for failure in found]
    print(outcomes)
    assert not failures, "\n".join(failures)
    assert outcomes["image"] > count / 100, "if all mutants are refused, onnxruntime is not tested"
    assert outcomes["refused"] > count / 4


@pytest.fixture(scope="module")
def generators(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """One tiny exported generator of each architecture, and two with the inputs label and psi."""
    import torch

    from export.generator import export_onnx
    from tests.infer.conditional import conditional
    from trainer.config import ModelConfig
    from trainer.models import ARCHITECTURES, build_generator

    folder = tmp_path_factory.mktemp("generators")
    files = []
    for arch in ARCHITECTURES:
        torch.manual_seed(0)
        config = ModelConfig(arch=arch, size=8, z_dim=4, g_width=4, max_width=8, blocks=1, group_width=4)
        export_onnx(build_generator(config), folder / arch, {"recipe": arch})
        files.append((folder / arch).read_bytes())
    return [*files, *(conditional(["cat"], psi=psi).SerializeToString() for psi in (False, True))]


def _run_share(seeds: range, generators: list[bytes], folder: Path) -> tuple[Counter[str], list[str]]:
    """Give the mutants of ``seeds`` to one worker, which is restarted when it dies."""
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    worker = _Worker()
    try:
        for seed in seeds:
            name, data = mutant(seed, generators)
            path = folder / f"mutant{seeds.start}.onnx"
            path.write_bytes(data)
            outcome, detail = worker.generate(path)
            outcomes[outcome] += 1
            if outcome not in ("image", "refused"):
                path.rename(folder / f"failed{seed}.onnx")
                failures.append(f"{folder}/failed{seed}.onnx ({name}): {outcome}: {detail}")
                worker.close()
                worker = _Worker()
    finally:
        worker.close()
    return outcomes, failures


class _Worker:
    """A child process that generates an image from one file after another."""

    def __init__(self) -> None:
        root = Path(__file__).parents[2]
        self._process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(root)},
            text=True,
        )

    def generate(self, path: Path) -> tuple[str, str]:
        """(outcome, detail); the outcomes other than "image" and "refused" are failures."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{path}\n")
        self._process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(SECONDS):
                return "hang", f"nothing after {SECONDS} seconds"
        answer = self._process.stdout.readline()
        if not answer:
            return "crash", f"exit status {self._process.wait()}"
        outcome, detail = json.loads(answer)
        return outcome, detail

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def serve() -> None:
    """The main loop of a worker."""
    import resource

    from infer.cli import main

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = sys.stdout
    for line in sys.stdin:
        with contextlib.redirect_stdout(io.StringIO()):
            answer = _generate(main, Path(line.rstrip("\n")))
        print(json.dumps(answer), file=answers, flush=True)


def _generate(main: Callable[[list[str]], object], path: Path) -> tuple[str, str]:
    import traceback

    from PIL import Image

    from catgan.command import run_command

    out = path.with_suffix(".png")
    out.unlink(missing_ok=True)
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            run_command("catinfer", main, ["--onnx", str(path), "--n", "1", "--out", str(out), "--device", "cpu"])  # type: ignore[arg-type]
        with Image.open(out) as image:
            image.load()
            if image.width != image.height or image.mode != "RGB":
                return "image of another shape", f"{image.size} {image.mode}"
        return "image", ""
    except SystemExit as end:
        text = messages.getvalue()
        if end.code != 2 or text.count("\n") != 1 or not text.startswith("catinfer: ") or len(text) > 1000:
            return "unclean error", f"{end.code} {text[:500]}"
        return ("left an image", "") if out.exists() else ("refused", text)
    except BaseException:  # noqa: BLE001  tracebacks are what this test looks for
        return "traceback", traceback.format_exc()[-800:]


# Mutations


def mutant(seed: int, generators: list[bytes]) -> tuple[str, bytes]:
    """(name of the mutations, file) number ``seed``: one to three mutations of one generator."""
    rng = np.random.default_rng([20, seed])
    data = generators[int(rng.integers(len(generators)))]
    if rng.random() < 0.3:
        mutate = [_flip_bytes, _cut, _splice, _numbers_in_structure][rng.integers(4)]
        return mutate.__name__, mutate(rng, data, generators)
    model = onnx.load_from_string(data)
    names = []
    for _ in range(rng.integers(1, 4)):
        mutation = MUTATIONS[rng.integers(len(MUTATIONS))]
        mutation(rng, model)
        names.append(mutation.__name__)
    return " ".join(names), model.SerializeToString()


def _flip_bytes(rng: Random, data: bytes, _: list[bytes]) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.integers(1, 9)):
        changed[rng.integers(len(changed))] ^= 1 << rng.integers(8)
    return bytes(changed)


def _numbers_in_structure(rng: Random, data: bytes, _: list[bytes]) -> bytes:
    """Changed bytes at the ends of the file and around names, where lengths and types are rather than weights."""
    names = [data.find(word) for word in (b"kernel_shape", b"Conv", b"image", b"strides", b"group", b"perm", b"axis")]
    places = [place for place in (*names, 0, len(data) - 40) if place >= 0]
    changed = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        place = int(rng.choice(places)) + int(rng.integers(-20, 40))
        changed[place % len(data)] = rng.integers(256)
    return bytes(changed)


def _cut(rng: Random, data: bytes, _: list[bytes]) -> bytes:
    begin, end = sorted(rng.integers(0, len(data), 2))
    return data[:begin] if rng.random() < 0.3 else data[:begin] + data[end:]


def _splice(rng: Random, data: bytes, others: list[bytes]) -> bytes:
    """A piece of one file inside another, or all of it at the end: protobuf merges the two."""
    other = others[rng.integers(len(others))]
    if rng.random() < 0.2:
        return data + other
    begin, end = sorted(rng.integers(0, len(other), 2))
    place = int(rng.integers(len(data)))
    return data[:place] + other[begin:end] + data[place:]


NUMBERS = [-(2**63), -(2**31), -3, -1, 0, 1, 2, 3, 7, 64, 1000, 2**16, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1]
OPERATORS = sorted({schema.name for schema in onnx.defs.get_all_schemas() if not schema.domain})


def _number(rng: Random) -> int:
    return NUMBERS[rng.integers(len(NUMBERS))]


def _any(rng: Random, items: object) -> object:
    assert len(items)  # type: ignore[arg-type]
    return items[int(rng.integers(len(items)))]  # type: ignore[arg-type,index]


def operator(rng: Random, model: onnx.ModelProto) -> None:
    if model.graph.node:
        from infer.limits import OPERATORS as ALLOWED

        _any(rng, model.graph.node).op_type = _any(rng, sorted(ALLOWED) if rng.random() < 0.8 else OPERATORS)


def attribute(rng: Random, model: onnx.ModelProto) -> None:
    attributes = [a for node in model.graph.node for a in node.attribute]
    if not attributes:
        return
    chosen = _any(rng, attributes)
    match rng.integers(4):
        case 0 if chosen.ints:
            chosen.ints[rng.integers(len(chosen.ints))] = _number(rng)
        case 1 if chosen.ints:
            chosen.ints.extend([_number(rng)] * int(rng.choice([1, 3, 100])))
        case 2:
            chosen.type = int(rng.integers(0, 15))
        case _:
            chosen.i = _number(rng)
            chosen.f = float(rng.choice([np.nan, np.inf, -1e38, 0.0]))


def new_attribute(rng: Random, model: onnx.ModelProto) -> None:
    if not model.graph.node:
        return
    node = _any(rng, model.graph.node)
    names = sorted({a for s in onnx.defs.get_all_schemas() if s.name == node.op_type for a in s.attributes})
    name = _any(rng, [*names, "group", "axis", "perm", "kernel_shape", "strides", "dilations", "output_shape"])
    kept = [a for a in node.attribute if a.name != name]
    value = _number(rng) if rng.random() < 0.5 else [_number(rng) for _ in range(rng.integers(1, 5))]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


def no_attribute(rng: Random, model: onnx.ModelProto) -> None:
    if model.graph.node:
        node = _any(rng, model.graph.node)
        if node.attribute:
            del node.attribute[int(rng.integers(len(node.attribute)))]


def dimension(rng: Random, model: onnx.ModelProto) -> None:
    if model.graph.initializer:
        tensor = _any(rng, model.graph.initializer)
        if tensor.dims and rng.random() < 0.8:
            tensor.dims[rng.integers(len(tensor.dims))] = _number(rng)
        else:
            tensor.dims.append(_number(rng))


def reshaped(rng: Random, model: onnx.ModelProto) -> None:
    """Other dimensions for the same number of values, which a check of the file alone does not detect."""
    if model.graph.initializer:
        tensor = _any(rng, model.graph.initializer)
        dims = list(rng.permutation(tensor.dims)) if rng.random() < 0.5 else [int(np.prod(tensor.dims)), 1]
        del tensor.dims[:]
        tensor.dims.extend(map(int, dims))


def data_type(rng: Random, model: onnx.ModelProto) -> None:
    if model.graph.initializer:
        _any(rng, model.graph.initializer).data_type = int(rng.integers(0, 28))


def values(rng: Random, model: onnx.ModelProto) -> None:
    """Other values: not finite ones, or other numbers in a shape, a scale or an index."""
    if not model.graph.initializer:
        return
    tensor = _any(rng, model.graph.initializer)
    with contextlib.suppress(Exception):  # another mutation has damaged the tensor
        old = numpy_helper.to_array(tensor)
        integer = np.issubdtype(old.dtype, np.integer)
        value = _number(rng) if integer else rng.choice([np.nan, np.inf, -np.inf, 1e38, 1e-45, 0, -1, 1e6])
        new = old.copy()
        new.reshape(-1)[rng.integers(old.size) if rng.random() < 0.5 else slice(None)] = value
        tensor.CopyFrom(numpy_helper.from_array(new, tensor.name))


def wiring(rng: Random, model: onnx.ModelProto) -> None:
    """Another input: a cycle, an operator's own output, weights instead of features, nothing."""
    nodes = [node for node in model.graph.node if node.input]
    if nodes:
        node = _any(rng, nodes)
        names = [o for n in model.graph.node for o in n.output] + [i.name for i in model.graph.initializer]
        node.input[rng.integers(len(node.input))] = _any(rng, [*names, "z", "label", "", "nowhere"])


def inputs(rng: Random, model: onnx.ModelProto) -> None:
    if model.graph.node:
        node = _any(rng, model.graph.node)
        if node.input and rng.random() < 0.5:
            node.input.pop()
        else:
            node.input.extend(["z"] * int(rng.choice([1, 2, 300])))


def declaration(rng: Random, model: onnx.ModelProto) -> None:
    """Other declarations of the graph's inputs, outputs and intermediate tensors."""
    infos = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    if not infos:
        return
    tensor = _any(rng, infos).type.tensor_type
    match rng.integers(4):
        case 0:
            tensor.elem_type = int(rng.integers(0, 24))
        case 1:
            tensor.shape.dim.add(dim_value=_number(rng))
        case _ if tensor.shape.dim:
            tensor.shape.dim[rng.integers(len(tensor.shape.dim))].dim_value = _number(rng)


def node(rng: Random, model: onnx.ModelProto) -> None:
    """One more operator, between an output and all its readers."""
    from infer.limits import OPERATORS as ALLOWED

    if not model.graph.node:
        return
    at = int(rng.integers(len(model.graph.node)))
    before = model.graph.node[at]
    if not before.output:
        return
    name = before.output[0]
    before.output[0] = f"{name}_before"
    weights = [i.name for i in model.graph.initializer]
    others = [_any(rng, weights) for _ in range(rng.integers(0, 3))] if weights else []
    added = helper.make_node(_any(rng, sorted(ALLOWED)), [before.output[0], *others], [name])
    model.graph.node.insert(at + 1, added)


def shape_bomb(rng: Random, model: onnx.ModelProto) -> None:
    """An operator that makes a huge tensor from few bytes, as an input of the graph or beside it."""
    dims = [abs(_number(rng)) or 1 for _ in range(rng.integers(1, 5))]
    model.graph.initializer.append(numpy_helper.from_array(np.array(dims), "dims"))
    if rng.random() < 0.5:
        model.graph.node.insert(0, helper.make_node("ConstantOfShape", ["dims"], ["bomb"]))
    else:
        op = _any(rng, ["Expand", "Tile"])
        model.graph.initializer.append(numpy_helper.from_array(np.ones([1] * len(dims), np.float32), "one"))
        model.graph.node.insert(0, helper.make_node(op, ["one", "dims"], ["bomb"]))
    readers = [n for n in model.graph.node[1:] if n.input]
    if readers and rng.random() < 0.7:
        reader = _any(rng, readers)
        reader.input[rng.integers(len(reader.input))] = "bomb"


def loop(rng: Random, model: onnx.ModelProto) -> None:
    """A loop without an end, or branches in branches in branches."""
    flag = helper.make_tensor_value_info("on", TensorProto.BOOL, [])
    count = helper.make_tensor_value_info("i", TensorProto.INT64, [])
    body = helper.make_graph(
        [helper.make_node("Identity", ["on"], ["still"])],
        "body",
        [count, flag],
        [helper.make_tensor_value_info("still", TensorProto.BOOL, [])],
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array(2**62), "trips"))
    node = helper.make_node("Loop", ["trips", ""], [], body=body)
    for _ in range(rng.integers(0, 20)):
        inner = helper.make_graph([node], "inner", [], [])
        node = helper.make_node("If", ["on"], [], then_branch=inner, else_branch=body)
    model.graph.node.append(node)


def repeated(rng: Random, model: onnx.ModelProto) -> None:
    """Names twice, or everything twice."""
    part = _any(rng, [model.graph.node, model.graph.initializer, model.graph.output, model.graph.input])
    if part:
        part.add().CopyFrom(_any(rng, part))


def removed(rng: Random, model: onnx.ModelProto) -> None:
    part = _any(rng, [model.graph.node, model.graph.initializer, model.graph.output, model.graph.input])
    if part:
        del part[int(rng.integers(len(part)))]


def versions(rng: Random, model: onnx.ModelProto) -> None:
    if rng.random() < 0.5 or not model.opset_import:
        model.ir_version = _number(rng)
    else:
        model.opset_import[0].version = int(rng.integers(1, 30)) if rng.random() < 0.8 else _number(rng)


def texts(rng: Random, model: onnx.ModelProto) -> None:
    entry = model.metadata_props.add(key=str(_any(rng, ["z_dim", "size", "recipe", "classes", "x"])))
    entry.value = str(_any(rng, ["", "-1", "9" * 5000, "\n\n", "\x00", "nan", "[" * 9999, '[""]']))


MUTATIONS = [
    operator, operator, attribute, attribute, new_attribute, new_attribute, no_attribute, dimension, reshaped,
    data_type, values, values, wiring, wiring, inputs, declaration, declaration, node, node, shape_bomb, loop, repeated,
    removed, versions, texts,
]  # fmt: skip


if __name__ == "__main__":
    serve()
