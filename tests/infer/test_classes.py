"""Class-conditional graphs: the input ``label``, the names in the metadata, and choosing classes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from catgan.command import UserError
from infer.classes import MAX_CLASSES, MAX_NAME, Class, choose, class_of, labels_of, listed, parse_names
from infer.cli import main
from infer.diagnosis import CPU
from infer.latents import latents
from infer.session import BATCH, Generator
from tests.infer.conditional import NAMES, OFFSETS, conditional, expected, write
from tests.infer.conftest import Z_DIM


@pytest.fixture
def cats(tmp_path: Path) -> Path:
    """A generator with the classes black, tabby and white."""
    return write(tmp_path)


def run(onnx: Path, *args: str | Path | int) -> dict[str, Any]:
    return main(["--onnx", str(onnx), "--device", "cpu", *map(str, args)])


# The session


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("psi", [False, True])
def test_each_image_may_have_a_class_of_its_own(
    tmp_path: Path, onnx_file: Path, monkeypatch: pytest.MonkeyPatch, batch: int, psi: bool
) -> None:
    """With batches as on CUDA too, whose last one is padded."""
    monkeypatch.setitem(BATCH, CPU, batch)
    generator = Generator(write(tmp_path, psi=psi), "cpu")
    assert generator.classes == NAMES
    assert generator.has_psi == psi
    z, labels = latents(range(7), Z_DIM), np.array([2, 0, 0, 1, 2, 1, 1])
    np.testing.assert_array_equal(generator(z, label=labels), expected(onnx_file, range(7), labels))
    np.testing.assert_array_equal(generator(z, label=2), expected(onnx_file, range(7), 2))
    np.testing.assert_array_equal(generator(z), expected(onnx_file, range(7), 0))
    assert (generator(z, label=2) != generator(z, label=1)).any()
    np.testing.assert_array_equal(
        Generator(onnx_file, "cpu").output(z + OFFSETS[labels]), generator.output(z, label=labels)
    )


def test_the_label_is_added_before_psi_and_after_a_move(tmp_path: Path, onnx_file: Path) -> None:
    plain, z = Generator(onnx_file, "cpu"), latents(range(5), Z_DIM)
    psis, labels = np.float32([1, 0.5, 0.5, 0, 1]), np.array([0, 1, 2, 2, 0])
    ours = Generator(write(tmp_path, psi=True), "cpu")(z, psis, np.float32(0.5), labels)
    np.testing.assert_array_equal(ours, plain((z + np.float32(0.5) + OFFSETS[labels]) * psis[:, None]))


@pytest.mark.parametrize("label", [3, -1, np.array([0, 0, 3]), np.array([0, -1, 0]), np.float32([0, 1, 2])])
def test_labels_out_of_range_do_not_reach_the_graph(cats: Path, label: Any) -> None:
    with pytest.raises(AssertionError):
        Generator(cats, "cpu")(latents(range(3), Z_DIM), label=label)


def test_a_generator_without_classes_takes_the_label_0_alone(onnx_file: Path) -> None:
    generator = Generator(onnx_file, "cpu")
    assert generator.classes == ()
    z = latents(range(2), Z_DIM)
    np.testing.assert_array_equal(generator(z, label=np.zeros(2, np.int64)), generator(z))
    with pytest.raises(AssertionError):
        generator(z, label=1)


def test_names_without_an_input_do_not_make_it_conditional(make_onnx: Callable[..., Path]) -> None:
    assert Generator(make_onnx(metadata={"classes": '["a", "b"]'}), "cpu").classes == ()


@pytest.mark.parametrize(
    "wrong",
    [
        {"label": "class"},
        {"kind": TensorProto.INT32},
        {"kind": TensorProto.FLOAT},
        {"dims": ()},
        {"dims": (1,)},
        {"dims": ("batch", 1)},
        {"dims": ("batch", 2**40)},
        {"dims": None},
        {"place": 0},
        {"psi": True, "place": 2},
    ],
)
def test_other_inputs_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"cats\.onnx: "):
        Generator(write(tmp_path, **wrong), "cpu")


def test_a_shape_that_depends_on_the_label_is_refused(tmp_path: Path) -> None:
    model = conditional()
    model.graph.node.append(helper.make_node("ConstantOfShape", ["label"], ["filled"]))
    (tmp_path / "cats.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match="only known when it runs"):
        Generator(tmp_path / "cats.onnx", "cpu")


BAD_NAMES = {
    "": "not JSON",
    "[": "not JSON",
    "[" * 100_000: "not JSON",
    '{"a": 1}': "not a list of names",
    '"abc"': "not a list of names",
    '["a", 1]': "not a list of names",
    "[]": "0 names",
    '["a", "a"]': "a name twice",
    '["a", ""]': "the name ''",
    '["a", " b"]': "the name ' b'",
    '["a\\n"]': "printable",
    '["\\u001b[31m"]': "printable",
    '["\\u202e"]': "printable",
    '["\\ud800"]': "printable",
    json.dumps(["x" * (MAX_NAME + 1)]): "1 to 100",
    json.dumps(list(map(str, range(MAX_CLASSES + 1)))): "1,001 names",
    " " * 10_000_000: "characters",
}


@pytest.mark.parametrize(("entry", "reason"), BAD_NAMES.items(), ids=range(len(BAD_NAMES)))
def test_untrusted_names(tmp_path: Path, entry: str, reason: str) -> None:
    with pytest.raises(UserError, match=rf"cats\.onnx: its metadata .*{reason}.*; export it again") as raised:
        Generator(write(tmp_path, entry=entry), "cpu")
    assert len(str(raised.value)) < 400
    assert "\n" not in str(raised.value)


def test_a_label_without_names_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"takes a label, but its metadata has no entry 'classes'; export it again"):
        Generator(write(tmp_path, entry=None), "cpu")


def test_the_largest_allowed_list(tmp_path: Path) -> None:
    names = tuple("\N{SMILING CAT FACE WITH OPEN MOUTH}" * 96 + f"{i:04d}" for i in range(MAX_CLASSES))
    assert parse_names(json.dumps(names)) == names
    assert Generator(write(tmp_path, names), "cpu").classes == names


# Choosing classes


@pytest.mark.parametrize(
    ("texts", "labels"),
    [
        ([], [0, 1, 2, 3, 4]),
        (["all"], [0, 1, 2, 3, 4]),
        (["tabby"], [1]),
        (["tabby,black"], [1, 0]),
        (["tabby", "black"], [1, 0]),
        (["tabby , 0"], [1, 0]),
        (["2"], [2]),
        (["1"], [4]),  # a name before a number
        (["red, spotted"], [3]),  # a name with a comma
        (["red, spotted", "tabby"], [3, 1]),
        (["Ka\u0308tzchen"], [2]),  # typed with a decomposed letter
    ],
)
def test_choosing(texts: list[str], labels: list[int]) -> None:
    names = ("black", "tabby", "K\u00e4tzchen", "red, spotted", "1")
    assert choose(names, texts, "--class") == tuple(Class(label, names[label]) for label in labels)


def test_a_class_named_all() -> None:
    assert choose(("none", "all"), ["all"], "--class") == (Class(1, "all"),)
    assert choose(("none", "all"), [], "--class") == (Class(0, "none"), Class(1, "all"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "taby",
            "--class: 'taby' is given, did you mean 'tabby'? allowed are black, tabby, white, and the",
        ),
        ("WHITE", "did you mean 'white'"),
        ("3", "'3' is given, allowed are black"),
        ("-1", "'-1' is given, allowed are black"),
        ("", "'' is given, allowed are black"),
        ("black,", "'' is given, allowed are black"),
        ("\u0661", "is given, allowed are black"),
        ("a\x1b[31m", r"'a\x1b[31m' is given"),
        ("black,0", "--class: 'black,0' names a class twice"),
        ("9" * 5000, "is given, allowed are black"),
    ],
)
def test_classes_that_there_are_not(cats: Path, tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        run(cats, f"--class={text}", "--out", tmp_path / "a.png")
    assert message in str(raised.value)
    assert len(str(raised.value)) < 400
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (",".join(["all"] * 2000), "class: 'all,all,.*' has 2,000 parts, but the generator has 1000 classes"),
        (",".join(["all"] * 900), "class: 'all,all,.*' names a class twice; give each once"),
        ("cat number 5x", "class: 'cat number 5x' is given, allowed are cat number 0,"),
    ],
)
def test_wrong_choices_among_many_classes_cost_little(monkeypatch: pytest.MonkeyPatch, text: str, message: str) -> None:
    made = []

    class Counted(Class):
        def __new__(cls, label: int, name: str) -> Class:
            made.append(label)
            return Class(label, name)

    monkeypatch.setattr("infer.classes.Class", Counted)
    monkeypatch.setattr("difflib.get_close_matches", lambda word, names, n: [*names][:n])
    with pytest.raises(UserError, match=message) as raised:
        choose([f"cat number {i}" for i in range(1000)], [text], "class")
    assert len(str(raised.value)) < 500
    assert len(made) <= 2000, "all is expanded twice at most"


def test_a_generator_without_classes_has_none_to_choose(onnx_file: Path) -> None:
    with pytest.raises(UserError, match=r"^--class: 'tabby' is given, but the generator has no classes: omit it$"):
        run(onnx_file, "--class", "tabby")


def test_classes_take_turns_with_the_seeds() -> None:
    chosen = choose(NAMES, ["white,black"], "--class")
    assert [class_of(seed, chosen) for seed in (0, 1, 7)] == [chosen[0], chosen[1], chosen[1]]
    assert labels_of(range(5), chosen) == [2, 0, 2, 0, 2]
    assert labels_of(range(2), ()) == [0, 0]
    assert class_of(3, ()) is None


def test_messages_list_a_limited_number_of_names() -> None:
    text = listed([f"cat number {i}" for i in range(1000)])
    assert text.startswith("cat number 0, cat number 1, ")
    assert text.endswith(" more")
    assert len(text) < 330
