"""Loop closures for LIO-SAM or LVI-SAM: their external loop socket takes [t_query, t_match], which is our ~/match_stamps.

Start LIO-SAM as always (its parameter loopClosureEnableFlag stays true), then
    ros2 launch structvpr lio_sam.launch.py image_topic:=/camera/image_raw odom_topic:=/odometry/imu
"""

import os

from ament_index_python.packages import get_package_share_directory
from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration

SHARE = get_package_share_directory("structvpr")


def generate_launch_description():
    arguments = [
        DeclareLaunchArgument("image_topic", default_value="/camera/image_raw", description="Your camera's topic, without /compressed."),
        DeclareLaunchArgument("odom_topic", default_value="/odometry/imu", description="LIO-SAM's odometry at the rate of the IMU."),
        DeclareLaunchArgument("compressed", default_value="false", description="true: listen to image_topic/compressed."),
        DeclareLaunchArgument("map_file", default_value="", description="Map that is continued; empty: none is kept."),
        DeclareLaunchArgument("use_sim_time", default_value="false", description="Take the time from /clock."),
    ]
    same = ["image_topic", "odom_topic", "compressed", "map_file", "use_sim_time"]
    node = IncludeLaunchDescription(
        PythonLaunchDescriptionSource(os.path.join(SHARE, "launch", "structvpr.launch.py")),
        launch_arguments={
            "match_stamps_topic": "/lio_loop/loop_closure_detection",
            **{name: LaunchConfiguration(name) for name in same},
        }.items(),
    )
    return LaunchDescription([*arguments, node])
