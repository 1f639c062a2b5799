"""Peers of `structvpr bench`'s SuperPoint (VGG): one image per line read, seconds per line written.

Usage: superpoint.py DIR RUNTIME THREADS, with DIR/model.safetensors (ours) and DIR/input.npy (H x W); RUNTIME is onnxruntime or ncnn.
Writes DIR/logits.npy.
"""
import sys
import time

import numpy as np
from safetensors.numpy import load_file

folder, runtime, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
tensors = load_file(f"{folder}/model.safetensors")
x = np.load(f"{folder}/input.npy").astype(np.float32)
TRUNK = ("1a", "1b", "2a", "2b", "3a", "3b", "4a", "4b")
POOLED = ("1b", "2b", "3b")


def onnx_run():
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

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
    for name in TRUNK:
        y = conv(y, f"conv{name}", pool=name in POOLED)
    logits = conv(conv(y, "convPa"), "convPb", relu=False)
    descriptor = conv(conv(y, "convDa"), "convDb", relu=False)
    nodes.append(helper.make_node("LpNormalization", [descriptor], ["descriptors"], axis=1, p=2))
    value = lambda n, shape=None: helper.make_tensor_value_info(n, TensorProto.FLOAT, shape)  # noqa: E731
    graph = helper.make_graph(nodes, "superpoint", [value("x", (1, 1, *x.shape))], [value(logits), value("descriptors")], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"x": x[None, None]})[0]


def ncnn_run():
    import ncnn

    layers, blobs, weights = ["Input x 0 1 x"], ["x"], []

    def layer(kind, name, sources, outs, parameters=""):
        layers.append(f"{kind} {name} {len(sources)} {len(outs)} {' '.join(sources)} {' '.join(outs)} {parameters}".rstrip())
        blobs.extend(outs)
        return outs[0]

    def conv(source, name, relu=True, pool=False):
        w, b = tensors[f"{name}.weight"].astype(np.float32), tensors[f"{name}.bias"].astype(np.float32)
        # Outputs, kernel, pad, has a bias, weights, activation. A weight's flag of 0 says f32.
        settings = f"0={w.shape[0]} 1={w.shape[2]} 4={w.shape[2] // 2} 5=1 6={w.size} 9={int(relu)}"
        weights.extend([np.zeros(1, np.uint32).tobytes(), w.tobytes(), b.tobytes()])
        out = layer("Convolution", name, [source], [name], settings)
        return layer("Pooling", f"{name}_pool", [out], [f"{name}_pool"], "0=0 1=2 2=2") if pool else out

    y = "x"
    for name in TRUNK:
        y = conv(y, f"conv{name}", pool=name in POOLED)
    points, descriptors = layer("Split", "split", [y], ["to_points", "to_descriptors"]), "to_descriptors"
    logits = conv(conv(points, "convPa"), "convPb", relu=False)
    out = conv(conv(descriptors, "convDa"), "convDb", relu=False)
    # Across channels within a pixel; the scale is one 1.
    weights.append(np.ones(1, np.float32).tobytes())
    layer("Normalize", "normalize", [out], ["descriptors"], "0=0 1=1 2=1e-12 3=1 4=1 9=1")
    with open(f"{folder}/ncnn.param", "w") as f:
        f.write(f"7767517\n{len(layers)} {len(blobs)}\n" + "\n".join(layers) + "\n")
    with open(f"{folder}/ncnn.bin", "wb") as f:
        f.write(b"".join(weights))
    net = ncnn.Net()
    net.opt.num_threads = threads
    # f32 like the others; Winograd stays on, which is why it is the peer to beat.
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = net.opt.use_bf16_storage = False
    assert net.load_param(f"{folder}/ncnn.param") == 0 and net.load_model(f"{folder}/ncnn.bin") == 0

    def run():
        with net.create_extractor() as extractor:
            extractor.input("x", ncnn.Mat(x[None]).clone())
            _, found = extractor.extract(logits)
            extractor.extract("descriptors")
            return np.array(found)[None]

    return run


run = {"onnxruntime": onnx_run, "ncnn": ncnn_run}[runtime]()
np.save(f"{folder}/logits.npy", run().reshape(65, -1))
print("ready", flush=True)
for _ in sys.stdin:
    began = time.perf_counter()
    run()
    print(time.perf_counter() - began, flush=True)
