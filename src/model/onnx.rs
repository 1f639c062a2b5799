//! ONNX files, of which we read the tensors: the graph is ours, in Candle.
//!
//! The few fields of onnx.proto3 (opset 1 and later) that hold tensors; all others are skipped.

use super::container::{floats, Raw, RawFile};
use crate::error::{Error, Result};
use std::collections::HashMap;

#[derive(Clone, PartialEq, prost::Message)]
struct ModelProto {
    #[prost(message, optional, tag = "7")]
    graph: Option<GraphProto>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct GraphProto {
    #[prost(message, repeated, tag = "1")]
    node: Vec<NodeProto>,
    #[prost(message, repeated, tag = "5")]
    initializer: Vec<TensorProto>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct NodeProto {
    #[prost(string, repeated, tag = "1")]
    input: Vec<String>,
    #[prost(string, tag = "4")]
    op_type: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct TensorProto {
    #[prost(int64, repeated, tag = "1")]
    dims: Vec<i64>,
    #[prost(int32, tag = "2")]
    data_type: i32,
    #[prost(float, repeated, tag = "4")]
    float_data: Vec<f32>,
    #[prost(string, tag = "8")]
    name: String,
    #[prost(bytes = "vec", tag = "9")]
    raw_data: Vec<u8>,
    #[prost(int32, tag = "14")]
    data_location: i32,
}

/// `TensorProto.DataType`.
const FLOAT: i32 = 1;
const FLOAT16: i32 = 10;

/// The initializers of a model's graph, and its nodes in order. Memory is linear in `bytes`.
pub(super) fn read(bytes: &[u8]) -> Result<RawFile> {
    let model = <ModelProto as prost::Message>::decode(bytes).map_err(|e| Error::weights(format!("ONNX: {e}")))?;
    let graph = model.graph.ok_or_else(|| Error::weights("ONNX: the file holds no graph"))?;
    let mut tensors = HashMap::new();
    for t in graph.initializer {
        let fail = |why: String| Error::weights(format!("ONNX tensor `{}`: {why}", t.name));
        if t.data_location != 0 {
            return Err(fail("its values lie in another file; export the model as one file".into()));
        }
        let shape: Option<Vec<usize>> = t.dims.iter().map(|d| usize::try_from(*d).ok()).collect();
        let shape = shape.ok_or_else(|| fail(format!("shape {:?}", t.dims)))?;
        let values = match t.data_type {
            FLOAT if t.raw_data.is_empty() => t.float_data,
            FLOAT => floats(&t.raw_data),
            FLOAT16 => t.raw_data.chunks_exact(2).map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
            // Shapes and indices: named, but never read.
            _ => Vec::new(),
        };
        tensors.insert(t.name, Raw { shape, values });
    }
    let nodes = graph.node.into_iter().map(|n| (n.op_type, n.input)).collect();
    Ok(RawFile { nodes, ..RawFile::of(tensors) })
}
