"""The descriptor network as an ONNX graph, built from named tensors: the independent reference.

Shares no code with the Rust implementation: the graph is written from the MobileNetV2 paper's table and
run by ONNX Runtime. Used by the golden values (tests/golden) and by `structvpr bench --peers`.
"""
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mobilenet_layers import TAPS, layers, pads


def build(tensors, height, width, same, gem_p=3.0, tap_norm=True):
    """tensors: our names (`blocks.3.expand.weight`) to float32 arrays, batch norm folded."""
    nodes, initializers = [], []

    def const(name, value):
        initializers.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    const("zero", np.float32(0.0)), const("six", np.float32(6.0))
    x, size, block_input, taps = "x", (height, width), "x", {}
    for name, kind, _, out, stride, block, residual in layers():
        if kind in ("point", "depth") and name.split(".")[-1] == ("expand" if block > 1 else "depthwise"):
            block_input = x
        k = 1 if kind in ("point", "linear") else 3
        border = [0, 0, 0, 0]
        if k == 3:
            border, size = pads(size, stride, same)
        w = const(f"{name}.weight", tensors[f"{name}.weight"].astype(np.float32))
        b = const(f"{name}.bias", tensors[f"{name}.bias"].astype(np.float32))
        nodes.append(helper.make_node("Conv", [x, w, b], [f"{name}.y"], kernel_shape=[k, k], strides=[stride, stride],
                                      pads=border, group=out if kind == "depth" else 1))
        x = f"{name}.y"
        if kind != "linear":
            nodes.append(helper.make_node("Clip", [x, "zero", "six"], [f"{name}.a"]))
            x = f"{name}.a"
        else:
            if residual:
                nodes.append(helper.make_node("Add", [x, block_input], [f"{name}.r"]))
                x = f"{name}.r"
            if block in TAPS:
                taps[block] = x
    const("eps", np.float32(1e-6)), const("p", np.float32(gem_p)), const("1/p", np.float32(1 / gem_p))
    const("axes", np.array([2, 3], np.int64)), const("axis1", np.array([1], np.int64)), const("tiny", np.float32(1e-12))

    def l2(v):
        nodes.append(helper.make_node("Mul", [v, v], [f"{v}.sq"]))
        nodes.append(helper.make_node("ReduceSum", [f"{v}.sq", "axis1"], [f"{v}.ss"], keepdims=1))
        nodes.append(helper.make_node("Add", [f"{v}.ss", "tiny"], [f"{v}.se"]))
        nodes.append(helper.make_node("Sqrt", [f"{v}.se"], [f"{v}.n"]))
        nodes.append(helper.make_node("Div", [v, f"{v}.n"], [f"{v}.l2"]))
        return f"{v}.l2"

    pooled = []
    for block in TAPS:
        t = taps[block]
        nodes.append(helper.make_node("Max", [t, "eps"], [f"t{block}.m"]))
        nodes.append(helper.make_node("Pow", [f"t{block}.m", "p"], [f"t{block}.p"]))
        nodes.append(helper.make_node("ReduceMean", [f"t{block}.p", "axes"], [f"t{block}.e"], keepdims=0))
        nodes.append(helper.make_node("Pow", [f"t{block}.e", "1/p"], [f"t{block}.g"]))
        pooled.append(l2(f"t{block}.g") if tap_norm else f"t{block}.g")
    nodes.append(helper.make_node("Concat", pooled, ["joined"], axis=1))
    out = l2("joined")
    if "whitening.mean" in tensors:
        const("wm", tensors["whitening.mean"].astype(np.float32)), const("ww", tensors["whitening.matrix"].astype(np.float32))
        nodes.append(helper.make_node("Sub", [out, "wm"], ["centred"]))
        nodes.append(helper.make_node("MatMul", ["centred", "ww"], ["white"]))
        out = l2("white")
    nodes.append(helper.make_node("Identity", [out], ["descriptor"]))
    graph = helper.make_graph(
        nodes, "structvpr", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, height, width])],
        [helper.make_tensor_value_info("descriptor", TensorProto.FLOAT, [1, 448])], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    return model
