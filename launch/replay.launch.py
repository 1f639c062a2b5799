"""Plays a bag into the node: `ros2 launch structvpr replay.launch.py bag:=DIR image_topic:=/camera/image_raw`."""

import os

from ament_index_python.packages import get_package_share_directory
from launch import LaunchDescription
from launch.actions import (
    DeclareLaunchArgument,
    ExecuteProcess,
    IncludeLaunchDescription,
    RegisterEventHandler,
    Shutdown,
    TimerAction,
)
from launch.conditions import IfCondition
from launch.event_handlers import OnProcessExit
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

SHARE = get_package_share_directory("structvpr")


def generate_launch_description():
    arguments = [
        DeclareLaunchArgument("bag", description="Folder or file of the bag."),
        DeclareLaunchArgument("rate", default_value="1.0", description="How fast it is played, 1.0 as recorded."),
        DeclareLaunchArgument("image_topic", default_value="/camera/image_raw", description="The bag's images, without /compressed."),
        DeclareLaunchArgument("odom_topic", default_value="/odom", description="The bag's odometry."),
        DeclareLaunchArgument("compressed", default_value="false", description="true: the images are image_topic/compressed."),
        DeclareLaunchArgument("map_file", default_value="", description="Map that is continued; empty: none is kept."),
        DeclareLaunchArgument("params_file", default_value="bag_replay.yaml", description="Parameters; the default drops nothing."),
        DeclareLaunchArgument("rviz", default_value="false", description="true: show it in RViz."),
    ]
    same = ["image_topic", "odom_topic", "compressed", "map_file", "params_file"]
    node = IncludeLaunchDescription(
        PythonLaunchDescriptionSource(os.path.join(SHARE, "launch", "structvpr.launch.py")),
        launch_arguments={"use_sim_time": "true", **{name: LaunchConfiguration(name) for name in same}}.items(),
    )
    bag = ExecuteProcess(
        cmd=["ros2", "bag", "play", LaunchConfiguration("bag"), "--clock", "--rate", LaunchConfiguration("rate")],
        output="screen",
    )
    rviz = Node(
        package="rviz2",
        executable="rviz2",
        arguments=["-d", os.path.join(SHARE, "config", "structvpr.rviz")],
        parameters=[{"use_sim_time": True}],
        condition=IfCondition(LaunchConfiguration("rviz")),
    )
    # Images may still wait when the last one has been played.
    end = RegisterEventHandler(
        OnProcessExit(target_action=bag, on_exit=[TimerAction(period=5.0, actions=[Shutdown(reason="the bag has ended")])])
    )
    # The node first: what is played before it listens is lost.
    return LaunchDescription([*arguments, node, rviz, end, TimerAction(period=2.0, actions=[bag])])
