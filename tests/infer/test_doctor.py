from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from catgan.command import UserError, run_command
from infer import diagnosis, session
from infer import doctor as module
from infer.cli import NAME, main

DRIVER = diagnosis.cuda_driver()
HAS_GPU = DRIVER is not None and DRIVER.gpus > 0
without_gpu = pytest.mark.skipif(HAS_GPU, reason="there is a GPU")


def installed(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(
        module, "distributions", lambda: [SimpleNamespace(metadata={"Name": n}, version="1.2.3") for n in names]
    )


def test_the_tiny_model_is_what_onnx_writes() -> None:
    z, image = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("z", "image"))
    graph = helper.make_graph([helper.make_node("Identity", ["z"], ["image"])], "t", [z], [image])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(module.TINY)
    assert onnx.load_from_string(module.TINY) == model


def test_a_working_cpu_is_exit_status_0(capsys: pytest.CaptureFixture[str]) -> None:
    run_command(NAME, main, ["doctor"])
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["cpu"] is True
    assert result["onnxruntime"] == onnxruntime.__version__
    assert result["providers"] == onnxruntime.get_available_providers()
    assert f"onnxruntime {onnxruntime.__version__} offers " in err
    assert "CPU: works" in err


@without_gpu
def test_cuda_that_does_not_work_is_exit_status_2_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run_command(NAME, main, ["doctor", "--device", "cuda"])
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    last = err.splitlines()[-1]
    assert last.startswith(
        ("catinfer: CUDA does not work: no NVIDIA GPU", "catinfer: CUDA does not work: the installed")
    )


def test_two_runtimes_at_once_are_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed(
        monkeypatch, "numpy", "onnxruntime", "onnxruntime_gpu", "onnxruntime-extensions", "onnxruntime-genai-cuda"
    )
    result = module.doctor("auto")
    assert result["installed"] == {"onnxruntime": "1.2.3", "onnxruntime-gpu": "1.2.3"}
    (problem,) = [p for p in result["problems"] if "overwrite" in p]
    assert "pip uninstall -y onnxruntime onnxruntime-gpu, then install one" in problem
    assert f"problem: {problem}" in capsys.readouterr().err


def test_one_runtime_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "onnxruntime-gpu")
    assert not [p for p in module.doctor("auto")["problems"] if "overwrite" in p]


def provider(folder: Path, content: bytes) -> SimpleNamespace:
    """An onnxruntime with a CUDA provider of these bytes."""
    (folder / "capi").mkdir()
    (folder / "capi" / "libonnxruntime_providers_cuda.so").write_bytes(content)
    return SimpleNamespace(__file__=str(folder / "__init__.py"))


def test_libraries_that_do_not_load_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ort = provider(tmp_path, b"\x7fELF\0libcudart.so.12\0libcudart.so.13\0libcublas.so.13\0libcuda.so.1\0libm.so.6\0")
    monkeypatch.setattr(module, "_loads", lambda name: name == "libcublas.so.13")
    assert module._missing_libraries(ort) == ["libcudnn.so.9", "libcudart.so.13"]


def test_a_missing_library_does_not_load() -> None:
    assert module._loads("libc.so.6")
    assert not module._loads("libno-such-thing.so.1")


def test_missing_libraries_are_reported_with_a_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_missing_libraries", lambda ort: ["libcudnn.so.9"])
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [diagnosis.CUDA, diagnosis.CPU])
    if not HAS_GPU:
        with pytest.raises(
            UserError, match=r"libraries that do not load: libcudnn.so.9: pip install 'onnxruntime-gpu\["
        ):
            module.doctor("cuda")
    assert any("libcudnn.so.9" in problem for problem in module.doctor("auto")["problems"])


@without_gpu
@pytest.mark.filterwarnings("ignore:Specified provider")
def test_cuda_works_only_if_a_session_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a driver and a GPU, but an onnxruntime that falls back to the CPU."""
    for user in (module, session):
        monkeypatch.setattr(user, "why_no_cuda", lambda ort: None)
    result = module.doctor("auto")
    assert result["cuda"] is False
    assert "did not load" in result["why_no_cuda"]
