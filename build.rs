//! Says which optional message packages are sourced, so that the node's bridges to them are compiled in.

use std::path::Path;

fn main() {
    println!("cargo:rustc-check-cfg=cfg(has_pose_graph_tools_msgs)");
    println!("cargo:rerun-if-changed=build.rs");
    if std::env::var_os("CARGO_FEATURE_ROS").is_none() {
        return;
    }
    println!("cargo:rerun-if-env-changed=AMENT_PREFIX_PATH");
    let prefixes = std::env::var("AMENT_PREFIX_PATH").unwrap_or_default();
    let index = "share/ament_index/resource_index/rosidl_interfaces";
    if prefixes.split(':').any(|p| Path::new(p).join(index).join("pose_graph_tools_msgs").is_file()) {
        println!("cargo:rustc-cfg=has_pose_graph_tools_msgs");
    }
}
