"""Starts the node. `ros2 launch structvpr structvpr.launch.py --show-args` lists the arguments."""

import os

from ament_index_python.packages import get_package_share_directory
from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

SHARE = get_package_share_directory("structvpr")

ARGUMENTS = [
    ("namespace", "", "Namespace of the node and its relative topics."),
    ("image_topic", "image", "Your camera's topic, without /compressed."),
    ("camera_info_topic", "", "Its calibration; empty: camera_info beside image_topic."),
    ("odom_topic", "odom", "nav_msgs/Odometry; nothing has to be published there."),
    ("compressed", "false", "true: listen to image_topic/compressed (JPEG or PNG)."),
    ("params_file", "structvpr.yaml", "Parameters: a path, or a preset by its name, as jetson.yaml."),
    ("map_file", "", "Map that is loaded, continued and saved; empty: as params_file says."),
    ("match_stamps_topic", "", "Where [t_query, t_match] of each closure goes; empty: ~/match_stamps."),
    ("use_sim_time", "false", "Take the time from /clock."),
    ("fastdds_profile", "false", "true: larger shared memory for Fast DDS, so that raw images at 30 Hz all arrive."),
    ("log_level", "info", "debug, info, warn, error or fatal."),
]


def start(context):
    given = {name: LaunchConfiguration(name).perform(context) for name, _, _ in ARGUMENTS}
    true = lambda name: given[name].lower() in ("true", "1")  # noqa: E731
    preset = os.path.join(SHARE, "config", given["params_file"])
    params = given["params_file"] if os.path.isfile(given["params_file"]) else preset
    if not os.path.isfile(params):
        raise FileNotFoundError(f"params_file: neither {given['params_file']} nor {preset} is there")
    image = given["image_topic"].removesuffix("/compressed")
    info = given["camera_info_topic"] or "/".join(image.split("/")[:-1] + ["camera_info"])
    remappings = [
        ("image", image),
        ("image/compressed", image + "/compressed"),
        ("camera_info", info),
        ("odom", given["odom_topic"]),
    ]
    if given["match_stamps_topic"]:
        remappings.append(("~/match_stamps", given["match_stamps_topic"]))
    # Only what was asked for: a later entry would otherwise undo the file's.
    overrides = {"use_sim_time": true("use_sim_time")}
    if true("compressed"):
        overrides["input.image_transport"] = "compressed"
    if given["map_file"]:
        overrides["map.file"] = os.path.expanduser(given["map_file"])
    profile = {"FASTRTPS_DEFAULT_PROFILES_FILE": os.path.join(SHARE, "config", "fastdds.xml")}
    return [
        Node(
            package="structvpr",
            executable="structvpr_node",
            name="structvpr",
            namespace=given["namespace"],
            parameters=[params, overrides],
            remappings=remappings,
            arguments=["--ros-args", "--log-level", given["log_level"]],
            additional_env=profile if true("fastdds_profile") else {},
            output="screen",
        )
    ]


def generate_launch_description():
    declared = [DeclareLaunchArgument(name, default_value=default, description=words) for name, default, words in ARGUMENTS]
    return LaunchDescription([*declared, OpaqueFunction(function=start)])
