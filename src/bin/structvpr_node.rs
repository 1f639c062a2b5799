//! The ROS 2 node.

fn main() -> std::process::ExitCode {
    structvpr::ros::main()
}
