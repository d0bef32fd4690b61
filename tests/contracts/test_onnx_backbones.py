"""ONNX files as encoders: read, exported, or refused."""

from __future__ import annotations

import functools
import json
import pickle
from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from torch import Tensor

from core.encoding.encoders import build_encoder, load_encoder, weights_fingerprint
from core.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")


def write_onnx(
    path: Path,
    *,
    batch: int | str = "batch",
    size: int | str = "size",
    channels: int = 3,
    pooled: bool = False,
    kind: int = TensorProto.FLOAT,
) -> Tensor:
    """A convolution of 5 filters on a picture of any element type, and a global mean if `pooled`;
    returns the filters."""
    filters = torch.rand(5, channels, 3, 3, generator=torch.Generator().manual_seed(3))
    nodes = [
        helper.make_node("Cast", ["picture"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Conv", ["float", "filters"], ["map"]),
    ]
    output = helper.make_tensor_value_info("map", TensorProto.FLOAT, [batch, 5, None, None])
    if pooled:
        nodes.append(helper.make_node("ReduceMean", ["map"], ["vector"], axes=[2, 3], keepdims=0))
        output = helper.make_tensor_value_info("vector", TensorProto.FLOAT, [batch, 5])
    entry = helper.make_tensor_value_info("picture", kind, [batch, channels, size, size])
    values = filters.flatten().tolist()
    weights = helper.make_tensor("filters", TensorProto.FLOAT, filters.shape, values)
    graph = helper.make_graph(nodes, "tiny", [entry], [output], [weights])
    opset = [helper.make_opsetid("", 13)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    return filters


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("batch", ["batch", 4])
def test_an_onnx_file_is_an_encoder(tmp_path: Path, pooled: bool, batch: int | str) -> None:
    filters = write_onnx(tmp_path / "tiny.onnx", pooled=pooled, batch=batch)
    encoder = build_encoder("onnx/tiny.onnx", weights_dir=tmp_path, input_size=8)
    images = torch.rand(6, 3, 8, 8)
    expected = F.conv2d((images - encoder.mean) / encoder.std, filters)
    if pooled:
        expected = expected.mean((2, 3), keepdim=True)
    torch.testing.assert_close(encoder(images), expected)
    assert encoder.backbone.spatial is not pooled
    assert not encoder.backbone.trainable
    assert (encoder.num_features, encoder.stages()) == (5, [])


def test_half_precision_pictures_are_fed_where_the_file_wants_them(tmp_path: Path) -> None:
    filters = write_onnx(tmp_path / "half.onnx", kind=TensorProto.FLOAT16)
    encoder = build_encoder(f"onnx/{tmp_path}/half.onnx", input_size=8)
    images = torch.rand(1, 3, 8, 8)
    expected = F.conv2d(((images - encoder.mean) / encoder.std).half().float(), filters)
    torch.testing.assert_close(encoder(images), expected)


def test_an_onnx_encoder_is_exported_and_pickled_whole(tmp_path: Path) -> None:
    source, target = tmp_path / "tiny.onnx", tmp_path / "model"
    target.mkdir()
    write_onnx(source, size=16)
    encoder = build_encoder(f"onnx/{source}")
    assert encoder.backbone.input_size == 16
    spec = json.loads(json.dumps(encoder.export(target)))
    pickled = pickle.dumps(encoder)
    source.unlink()
    images = torch.rand(2, 3, 16, 16)
    for copy in (load_encoder(target, spec), pickle.loads(pickled)):
        assert torch.equal(copy(images), encoder(images))
        assert weights_fingerprint(copy) == weights_fingerprint(encoder)


def test_onnx_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    build = functools.partial(build_encoder, weights_dir=tmp_path)
    with pytest.raises(InputError, match=r"onnx/no\.onnx: no such ONNX file: tried .*no\.onnx"):
        build("onnx/no.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"not onnx")
    with pytest.raises(InputError, match="onnxruntime cannot open it"):
        build("onnx/broken.onnx")
    write_onnx(tmp_path / "grey.onnx", channels=1)
    with pytest.raises(InputError, match=r"its input 'picture' is .*, not \[N, 3, S, S\]"):
        build("onnx/grey.onnx")
    write_onnx(tmp_path / "bytes.onnx", kind=TensorProto.UINT8)
    with pytest.raises(InputError, match=r"is tensor\(uint8\)(.|\n)*valid: tensor\(float\)"):
        build("onnx/bytes.onnx")
    write_onnx(tmp_path / "fixed.onnx", size=16)
    with pytest.raises(InputError, match="reads pictures of 16 px only, but got 32"):
        build("onnx/fixed.onnx", input_size=32)
    with pytest.raises(InputError, match=r"weights: .*holds its weights itself"):
        build("onnx/fixed.onnx", weights="none")
