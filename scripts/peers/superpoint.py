"""ONNX Runtime as a peer of `structvpr bench`: SuperPoint's VGG network, one image per line read, seconds per line written.

Usage: superpoint.py DIR THREADS, with DIR/model.safetensors (ours) and DIR/input.npy (H x W). Writes DIR/logits.npy.
"""
import sys
import time

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file

folder, threads = sys.argv[1], int(sys.argv[2])
tensors = load_file(f"{folder}/model.safetensors")
x = np.load(f"{folder}/input.npy").astype(np.float32)[None, None]
nodes, weights = [], []


def conv(source, name, relu=True, pool=False):
    for kind in ("weight", "bias"):
        weights.append(numpy_helper.from_array(tensors[f"{name}.{kind}"].astype(np.float32), f"{name}.{kind}"))
    k = tensors[f"{name}.weight"].shape[2]
    nodes.append(helper.make_node("Conv", [source, f"{name}.weight", f"{name}.bias"], [name], pads=[k // 2] * 4))
    out = name
    if relu:
        nodes.append(helper.make_node("Relu", [out], [out := f"{name}_relu"]))
    if pool:
        nodes.append(helper.make_node("MaxPool", [out], [out := f"{name}_pool"], kernel_shape=[2, 2], strides=[2, 2]))
    return out


y = "x"
for name in ("1a", "1b", "2a", "2b", "3a", "3b", "4a", "4b"):
    y = conv(y, f"conv{name}", pool=name in ("1b", "2b", "3b"))
logits = conv(conv(y, "convPa"), "convPb", relu=False)
descriptor = conv(conv(y, "convDa"), "convDb", relu=False)
nodes.append(helper.make_node("LpNormalization", [descriptor], ["descriptors"], axis=1, p=2))
value = lambda n: helper.make_tensor_value_info(n, TensorProto.FLOAT, None)  # noqa: E731
graph = helper.make_graph(nodes, "superpoint", [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)], [value(logits), value("descriptors")], weights)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
options = ort.SessionOptions()
options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
np.save(f"{folder}/logits.npy", session.run(None, {"x": x})[0].reshape(65, -1))
print("ready", flush=True)
for _ in sys.stdin:
    began = time.perf_counter()
    session.run(None, {"x": x})
    print(time.perf_counter() - began, flush=True)
