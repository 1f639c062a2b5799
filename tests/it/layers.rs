//! What each layer must not know (ARCHITECTURE.md), as a test.

use crate::support::root;
use std::path::{Path, PathBuf};

fn sources(dir: &Path) -> Vec<(PathBuf, String)> {
    let mut out = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            out.extend(sources(&path));
        } else if path.extension().is_some_and(|e| e == "rs") {
            let text = std::fs::read_to_string(&path).unwrap();
            out.push((path, text));
        }
    }
    out
}

/// Lower layers first; each may use itself and those before it.
const LAYERS: [&str; 21] = [
    "error",
    "simd",
    "team",
    "sqlite",
    "pickle",
    "odometry",
    "image",
    "config",
    "model",
    "features",
    "geometry",
    "map",
    "rerank",
    "pipeline",
    "confidence",
    "eval",
    "dataset",
    "bag",
    "replay",
    "live",
    "ros",
];

#[test]
fn no_layer_uses_one_above_it() {
    for (path, text) in sources(&root().join("src")) {
        let relative = path.strip_prefix(root().join("src")).unwrap().to_string_lossy().replace('\\', "/");
        let name = relative.split('/').next().unwrap().trim_end_matches(".rs");
        let Some(own) = LAYERS.iter().position(|l| *l == name) else { continue };
        // Tests may look anywhere.
        let code = text.split("#[cfg(test)]").next().unwrap();
        if relative.ends_with("tests.rs") {
            continue;
        }
        for above in &LAYERS[own + 1..] {
            let used = code.contains(&format!("crate::{above}::")) || code.contains(&format!("crate::{above};"));
            assert!(!used, "{relative} uses {above}, which lies above {name}");
        }
    }
}

#[test]
fn only_src_ros_knows_r2r_and_nothing_imports_training() {
    for (path, text) in sources(&root().join("src")) {
        let ros = path.starts_with(root().join("src/ros")) || path.ends_with("bin/structvpr_node.rs");
        assert!(ros || !text.contains("r2r::"), "{} uses r2r", path.display());
        assert!(!text.contains("structvpr_training"), "{} imports training", path.display());
    }
}

#[test]
fn unsafe_lives_in_kernels_only() {
    for (path, text) in sources(&root().join("src")) {
        let kernels = [
            "simd.rs",
            // Where the system runs a thread.
            "team.rs",
            "map/codes.rs",
            "map/dot.rs",
            "kernels/bf16.rs",
            "kernels/conv3x3.rs",
            // Instructions that the processor refuses, in tests.
            "kernels/emulated.rs",
            "kernels/halves.rs",
            "kernels/int8.rs",
            "kernels/nearest.rs",
            "kernels/winograd.rs",
            "kernels/vector.rs",
            "kernels/pointwise.rs",
            "kernels/rows.rs",
            "kernels/plan.rs",
            // CUDA by address; its tests run the same kernels as a C++ library.
            "kernels/gpu/cuda.rs",
            "kernels/gpu/host.rs",
            "kernels/gpu/tests.rs",
        ];
        let kernel = kernels.iter().any(|k| path.ends_with(k));
        let code: String = text.lines().filter(|l| !l.trim_start().starts_with("//")).collect();
        assert!(kernel || !code.contains("unsafe "), "{} has unsafe code", path.display());
    }
}
