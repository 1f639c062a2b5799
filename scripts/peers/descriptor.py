"""Peers of `structvpr bench`'s descriptor: one image per line read, seconds per line written.

Usage: descriptor.py DIR RUNTIME THREADS, with DIR/model.safetensors (ours) and DIR/input.npy (3H x W); RUNTIME is onnxruntime, openvino
or openvino-bf16. Writes DIR/descriptor.npy.
"""
import json
import struct
import sys
import time

import numpy as np
from safetensors.numpy import load_file

import mobilenet_onnx

folder, runtime, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
path = f"{folder}/model.safetensors"
with open(path, "rb") as f:
    header = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))
spec = json.loads(header["__metadata__"]["structvpr.format"])["spec"]
assert spec["pooling"]["kind"] == "gem", "only GeM has a peer"
flat = np.load(f"{folder}/input.npy").astype(np.float32)
x = flat.reshape(1, 3, flat.shape[0] // 3, flat.shape[1])
model = mobilenet_onnx.build(load_file(path), x.shape[2], x.shape[3], spec["padding"] == "same", spec["pooling"]["p"], spec["tap_norm"])
if runtime == "onnxruntime":
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    run = lambda: session.run(None, {"x": x})[0]  # noqa: E731
else:
    import openvino as ov

    core = ov.Core()
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16" if runtime.endswith("bf16") else "f32",
    }
    request = core.compile_model(core.read_model(model.SerializeToString()), "CPU", settings).create_infer_request()
    run = lambda: next(iter(request.infer({"x": x}).values()))  # noqa: E731
np.save(f"{folder}/descriptor.npy", run())
print("ready", flush=True)
for _ in sys.stdin:
    began = time.perf_counter()
    run()
    print(time.perf_counter() - began, flush=True)
