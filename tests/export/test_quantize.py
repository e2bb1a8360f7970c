"""Quantisation is llama.cpp's own, of the tensors that are asked, weighed by what the model is given."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill.config import MixerConfig
from distill.data.families import FAMILIES
from distill.data.pack import collate
from distill.data.tokenizer import build_tokenizer
from distill.data.traces import EmbeddedTraces
from distill.errors import UserError
from distill.export import gguf, imatrix
from distill.export.quantize import COMPONENTS, NEED_MATRIX, TYPES, Options, kind_of, quantize, read_tensors
from distill.hybrid.surgery import hybridize
from stages.cli import docstring, main

needs_llama_cpp = pytest.mark.gguf
MIXERS = ["mamba2", "attention", "mamba2", "attention"]
WIDE = {
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "intermediate_size": 512,
}
"""Rows that fill llama.cpp's blocks of 256 weights."""


def saved(teacher: Any, folder: Path) -> Any:
    """A hybrid of a teacher, with the embedded tokenizer, in ``folder``."""
    torch.manual_seed(0)
    mixers = MIXERS[: teacher.config.num_hidden_layers]
    hybrid = hybridize(teacher, mixers, MixerConfig(name="mamba2")).eval()
    hybrid.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return hybrid


@pytest.fixture(scope="session")
def wide(make_llama: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``hybrid``, its ``plain.gguf`` in F32 and its importance ``matrix.gguf``."""
    folder = tmp_path_factory.mktemp("wide")
    hybrid = saved(make_llama(**WIDE), folder / "hybrid")
    gguf.export(folder / "hybrid", folder / "plain.gguf", "f32")
    imatrix.write_matrix(importance(hybrid), folder / "matrix.gguf")
    return folder


def rows(count: int = 16) -> Any:
    return EmbeddedTraces(build_tokenizer(), count, 128, dict.fromkeys(FAMILIES, 1.0), seed=0)


def importance(hybrid: Any) -> imatrix.Matrix:
    return imatrix.measure(hybrid, rows(), "embedded", batch_size=8, pad=0)


def values(path: Path) -> dict[str, np.ndarray]:
    """Tensors of a GGUF in float32."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    return {each.name: dequantize(each.data, each.tensor_type) for each in GGUFReader(path).tensors}


def test_importance_is_the_mean_square_of_what_each_layer_is_given(make_llama: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    hybrid = hybridize(make_llama(hidden_size=192), MIXERS, MixerConfig(name="mamba2")).eval()  # 4 heads of 6
    matrix = importance(hybrid)
    batch = collate([rows()[i] for i in range(16)])
    ids = batch["input_ids"]
    given = hybrid.model.layers[0].input_layernorm(hybrid.model.embed_tokens(ids))
    last = 128 - (ids.flip(1) != 0).int().argmax(1)  # up to there a row is text
    text = torch.cat([row[:length] for row, length in zip(given, last, strict=True)])
    assert matrix.tokens == len(text) < ids.numel() and matrix.length == 128
    expected = text.square().mean(0).detach().numpy()
    np.testing.assert_allclose(matrix.columns["blk.0.ssm_in.weight"], expected, rtol=1e-4)
    out, attention = matrix.columns["blk.0.ssm_out.weight"], matrix.columns["blk.1.attn_output.weight"]
    assert out.shape == (2 * 192,) and attention.shape == (192,)  # twice in the GGUF; two heads of zeros
    heads = out.reshape(6, 2, 32)
    np.testing.assert_array_equal(heads[:, 0], heads[:, 1])
    padded = attention.reshape(2, 3, 32)[:, 2]  # behind the two heads of a key/value head
    real = attention.reshape(2, 3, 32)[:, :2]
    np.testing.assert_allclose(padded, real.mean(), rtol=1e-4)
    assert set(matrix.columns) == {
        *(f"blk.{b}.{name}.weight" for b in (0, 2) for name in ("ssm_in", "ssm_out")),
        *(f"blk.{b}.attn_{name}.weight" for b in (1, 3) for name in ("q", "k", "v", "output")),
        *(f"blk.{b}.ffn_{name}.weight" for b in range(4) for name in ("gate", "up", "down")),
    }


def test_types_are_named() -> None:
    told = docstring("stages.quantize").split("the\nmost bits to the fewest: ")[1].split(" (*")[0].split()
    assert told == [kind + "*" * (kind in NEED_MATRIX) for kind in TYPES]
    assert kind_of(" q4_k_m") == "Q4_K_M" and set(NEED_MATRIX) < set(TYPES)
    with pytest.raises(UserError, match="did you mean 'Q4_K_M'"):
        kind_of("Q4_KM")
    with pytest.raises(UserError, match="'distill export --to gguf --dtype f16' writes it"):
        kind_of("F16")


def test_without_llama_cpp_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    assert main(["quantize", "embedded", "--to", "Q8_0", "--output", str(tmp_path / "new.gguf")]) == 2
    assert "pip install 'distill-hybrid[gguf]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "IQ3_M"])
def test_the_file_is_the_one_that_llama_cpp_makes(wide: Path, tmp_path: Path, kind: str) -> None:
    import llama_cpp

    done = quantize(wide / "plain.gguf", tmp_path / "ours.gguf", kind, threads=1)
    asked = llama_cpp.llama_model_quantize_default_params()
    asked.ftype, asked.nthread = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}"), 1
    theirs = tmp_path / "theirs.gguf"
    assert not llama_cpp.llama_model_quantize(str(wide / "plain.gguf").encode(), str(theirs).encode(), asked)
    assert done.path.read_bytes() == theirs.read_bytes()
    types = {tensor.name: tensor.type for tensor in done.tensors}
    for name, kept in types.items():
        if any(part in name for part in ("ssm_a", "ssm_d", "ssm_conv1d", "ssm_dt", "norm")):
            assert kept == "F32", name
    coarse = {"Q5_K_M": "Q5_K", "Q4_K_M": "Q4_K", "IQ3_M": "IQ3_S"}.get(kind, kind)
    assert types["blk.0.ssm_in.weight"] == types["blk.1.ffn_gate.weight"] == coarse
    assert not done.narrow and done.path.stat().st_size < (wide / "plain.gguf").stat().st_size / 3


@needs_llama_cpp
@pytest.mark.parametrize("only", COMPONENTS)
def test_one_component_alone(wide: Path, tmp_path: Path, only: str) -> None:
    before = {tensor.name: tensor.type for tensor in read_tensors(wide / "plain.gguf")}
    done = quantize(wide / "plain.gguf", tmp_path / "part.gguf", "Q4_K_M", only=only, threads=1)
    changed = {tensor.name for tensor in done.tensors if tensor.type != before[tensor.name]}
    assert changed == {name for name in before if COMPONENTS[only].fullmatch(name)} and changed
    old, new = values(wide / "plain.gguf"), values(done.path)
    assert all(np.array_equal(old[name], new[name]) == (name not in changed) for name in old)


@needs_llama_cpp
def test_a_matrix_moves_the_error_to_the_columns_that_matter_less(wide: Path, tmp_path: Path) -> None:
    matrix = imatrix.read_matrix(wide / "matrix.gguf")
    old = values(wide / "plain.gguf")
    errors = []
    for columns in (None, matrix.columns):
        done = quantize(wide / "plain.gguf", tmp_path / f"{columns is None}.gguf", "IQ4_XS", matrix=columns, threads=1)
        new = values(done.path)
        errors.append({name: ((new[name] - old[name]) ** 2 @ weight).sum() for name, weight in matrix.columns.items()})
    without, weighed = errors
    assert all(weighed[name] < without[name] for name in matrix.columns)
    assert quantize(wide / "plain.gguf", tmp_path / "small.gguf", "IQ2_XS", matrix=matrix.columns, threads=1).bits < 3


@needs_llama_cpp
def test_a_matrix_comes_back_from_its_file(wide: Path, make_llama: Callable[..., Any]) -> None:
    found, expected = imatrix.read_matrix(wide / "matrix.gguf"), importance(saved_again(wide))
    assert (found.tokens, found.source, found.length) == (expected.tokens, "embedded", 128)
    assert found.columns.keys() == expected.columns.keys()
    for name, columns in expected.columns.items():
        np.testing.assert_allclose(found.columns[name], columns, rtol=1e-5)


def saved_again(wide: Path) -> Any:
    from distill.teacher import load_model

    return load_model(str(wide / "hybrid"))


@needs_llama_cpp
def test_finer_types_are_nearer(wide: Path, tmp_path: Path) -> None:
    """The file runs, and its logits come nearer to those of the plain one with every bit."""
    import llama_cpp

    ids = rows()[0]["input_ids"][:64].tolist()

    def logits(path: Path) -> np.ndarray:
        model = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, verbose=False, n_threads=1)
        model.eval(ids)
        return np.array(model.scores[: len(ids)])

    plain = logits(wide / "plain.gguf")
    far = [
        float(
            np.abs(
                logits(quantize(wide / "plain.gguf", tmp_path / f"{kind}.gguf", kind, threads=1).path) - plain
            ).mean()
        )
        for kind in ("Q8_0", "Q6_K", "Q4_K_M", "IQ3_M")
    ]
    assert 0 < far[0] < far[1] < far[2] < far[3]


@needs_llama_cpp
def test_rows_that_do_not_fit_fall_back_and_it_is_said(
    make_llama: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(make_llama(hidden_size=128, num_attention_heads=4, head_dim=32), tmp_path / "hybrid")
    command = ["quantize", str(tmp_path / "hybrid"), "--to", "Q4_K_M", "--output", str(tmp_path / "new.gguf")]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "rows of 64, 128 are no multiple of 256" in out and "fell back to Q5_0, Q8_0" in out
    assert "importance: every column alike" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hybrid", "new.gguf"]


@needs_llama_cpp
def test_a_checkpoint_with_data_is_weighed_and_gives_a_file_a_type(
    wide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["quantize", str(wide / "hybrid"), "--to", "q8_0,IQ3_XXS", "--output", str(tmp_path / "out/new.gguf")]
    assert main([*command, "--data", "demo_mamba2", "--tokens", "512"]) == 0
    assert "importance: " in capsys.readouterr().out
    made = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert made == ["new-IQ3_XXS.gguf", "new-Q8_0.gguf", "new.imatrix.gguf"]
    again = [*command[:-1], str(tmp_path / "out/new.gguf"), "--data", "demo_mamba2"]
    assert main(again) == 2 and "new-Q8_0.gguf exists already" in capsys.readouterr().err
    (tmp_path / "out/new-Q8_0.gguf").unlink()
    (tmp_path / "out/new-IQ3_XXS.gguf").unlink()
    assert main(again) == 2 and "take it with --imatrix" in capsys.readouterr().err
    assert main([*command, "--imatrix", str(tmp_path / "out/new.imatrix.gguf")]) == 0


@needs_llama_cpp
def test_every_type_that_is_named_is_one_of_llama_cpp(wide: Path, tmp_path: Path) -> None:
    import llama_cpp
    from gguf import LlamaFileType

    for kind in TYPES:
        options = Options(llama_cpp, kind, 1)
        options.weigh_by(imatrix.read_matrix(wide / "matrix.gguf").columns)
        room = options.run(wide / "plain.gguf", tmp_path / "new.gguf", dry=True)
        assert 0 < room < (wide / "plain.gguf").stat().st_size / 3 and f"MOSTLY_{kind}" in LlamaFileType.__members__
    for kind in NEED_MATRIX:
        with pytest.raises(UserError, match=f"{kind} needs an importance matrix"):
            quantize(wide / "plain.gguf", tmp_path / "new.gguf", kind)
    assert not list(tmp_path.iterdir())


BAD = [
    (["{wide}/hybrid", "--to", "Q8_0", "--data", "demo", "--imatrix", "none"], "give one of them"),
    (["{plain}", "--to", "Q4_KM"], "did you mean 'Q4_K_M'"),
    (["{plain}", "--to", "Q8_0,Q8_0"], "names Q8_0 twice"),
    (["{plain}", "--to", "Q8_0", "--output", "{tmp}/new.bin"], "must end in .gguf"),
    (["{plain}", "--to", "Q8_0", "--only", "mambas"], "did you mean 'mamba'"),
    (["{plain}", "--to", "IQ2_XS"], "IQ2_XS needs an importance matrix"),
    (["{plain}", "--to", "Q8_0", "--data", "demo"], "--data goes with a CHECKPOINT or RUN"),
    (["{plain}", "--to", "Q8_0", "--imatrix", "{tmp}/nowhere"], "cannot read --imatrix"),
    (["{plain}", "--to", "Q8_0", "--imatrix", "{plain}"], "holds no importance matrix"),
    (["{plain}", "--to", "Q8_0", "--imatrix", "{text}"], "is no GGUF"),
    (["{plain}", "--to", "Q8_0", "--imatrix", "{other}"], "it is of another model"),
    (["{plain}", "--to", "Q8_0", "--threads", "-1"], "--threads=-1"),
    (["{text}", "--to", "Q8_0"], "is no GGUF, or is cut short"),
    (["{cut}", "--to", "Q8_0"], "cut"),
    (["{quantised}", "--to", "Q4_0"], "is quantised already (Q8_0)"),
    (["{tmp}/nowhere", "--to", "Q8_0"], "no file or folder"),
    (["{attention}", "--to", "Q8_0", "--only", "mamba"], "has no mamba tensors"),
]


@needs_llama_cpp
@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input(
    arguments: list[str], message: str, wide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {
        "wide": wide,
        "plain": wide / "plain.gguf",
        "tmp": tmp_path,
        "text": tmp_path / "text.gguf",
        "cut": tmp_path / "cut.gguf",
    }
    places |= {name: tmp_path / f"{name}.gguf" for name in ("quantised", "other", "attention")}
    places["text"].write_text("no model")
    places["cut"].write_bytes(places["plain"].read_bytes()[:200_000])
    named = " ".join(arguments)
    if "{quantised}" in named:
        quantize(places["plain"], places["quantised"], "Q8_0", threads=1)
    if "{other}" in named:
        columns = {tensor.name: np.ones(128, np.float32) for tensor in read_tensors(places["plain"])}
        imatrix.write_matrix(imatrix.Matrix(columns, 8, "other", 8), places["other"])
    if "{attention}" in named:
        from distill.teacher import load_model

        hybrid = hybridize(load_model("embedded"), ["attention"] * 10, MixerConfig(name="mamba2"))
        hybrid.save_pretrained(tmp_path / "hybrid")
        build_tokenizer().save_pretrained(tmp_path / "hybrid")
        gguf.export(tmp_path / "hybrid", places["attention"])
    before = sorted(tmp_path.rglob("*"))
    given = [text.format(**places) for text in arguments]
    if "--output" not in given:
        given += ["--output", str(tmp_path / "new.gguf")]
    assert main(["quantize", *given]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert sorted(tmp_path.rglob("*")) == before


@needs_llama_cpp
def test_a_full_disk_leaves_nothing(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**20, 2**20, 2**10))
    command = ["quantize", str(wide / "plain.gguf"), "--to", "Q8_0", "--output", str(tmp_path / "new.gguf")]
    assert main(command) == 2
    assert "it takes" in capsys.readouterr().err and not list(tmp_path.iterdir())
