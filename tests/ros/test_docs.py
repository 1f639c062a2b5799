"""The tables of the README are what a running node offers, and the launch files are what they say."""

import ast
import json
import os
import re
import signal
import subprocess

import pytest
from harness import NODE, PREFIX, ROOT

README = (ROOT / "README.md").read_text()


def table(head):
    """First and second column of the table whose head begins so; the first without backticks."""
    lines = README[README.index(head) :].splitlines()[2:]
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        cells = [c.strip() for c in line.strip("|").split("|")]
        rows.append((cells[0].strip("`"), cells[1], cells[2]))
    return rows


def graph(robot, start, of):
    names = dict(of("structvpr", start.namespace))
    short = lambda n: n.replace(f"{start.namespace}/structvpr/", "~/").replace(f"{start.namespace}/", "")  # noqa: E731
    return {short(n): re.sub("/(msg|srv)/", "/", t[0]) for n, t in names.items()}


def test_the_readme_lists_every_topic_and_service(start, robot):
    start()
    robot.spin(1.0)
    rows = table("| topic | type | when |")
    inputs = {n: t for n, t, when in rows if when.startswith("in")}
    outputs = {n: t for n, t, when in rows if when.startswith("out")}
    assert graph(robot, start, robot.node.get_publisher_names_and_types_by_node).items() - {("/rosout", "rcl_interfaces/Log")} == outputs.items()
    heard = graph(robot, start, robot.node.get_subscriber_names_and_types_by_node)
    optional = {("image/compressed", "sensor_msgs/CompressedImage"), ("depth", "sensor_msgs/Image")}
    assert heard.items() | optional == inputs.items()
    services = graph(robot, start, robot.node.get_service_names_and_types_by_node)
    own = {n: t for n, t in services.items() if "parameter" not in n and "type_description" not in n}
    assert own == {n: t for n, t, _ in table("| service | type | what |")}
    standard = {"describe_parameters", "get_parameter_types", "get_parameters", "list_parameters", "set_parameters", "set_parameters_atomically"}
    assert standard <= {n.removeprefix("~/") for n in services}


def test_every_file_that_the_readme_names_is_installed():
    files = re.findall(r"`((?:launch|config)/[\w.]+)`", README)
    assert len(set(files)) >= 10
    for name in files:
        assert (PREFIX / "share/structvpr" / name).is_file(), name
    shipped = {p.relative_to(ROOT).as_posix() for d in ["launch", "config"] for p in (ROOT / d).iterdir() if p.is_file()}
    assert shipped == set(files), "and nothing is shipped that it does not name"
    layout = json.loads((ROOT / "config/structvpr_foxglove.json").read_text())
    topics = {n for n, _, _ in table("| topic | type | when |")}
    for topic in re.findall(r"/structvpr/(\w+)", json.dumps(layout) + (ROOT / "config/structvpr.rviz").read_text()):
        assert f"~/{topic}" in topics, topic


def test_launch_arguments_have_descriptions():
    for path in (ROOT / "launch").iterdir():
        if path.suffix != ".py":
            continue
        tree = ast.parse(path.read_text())
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "DeclareLaunchArgument"]
        assert calls and all(any(k.arg == "description" for k in c.keywords) for c in calls), path


def test_the_command_line_that_launch_makes(start, robot, tmp_path):
    """launch_ros writes inline parameters to a file below `/**` and gives name and namespace as remappings."""
    inline = tmp_path / "launch_params"
    inline.write_text("/**:\n  ros__parameters:\n    use_sim_time: false\n    input.image_transport: compressed\n    map.file: '%s'\n" % (tmp_path / "m"))
    default = PREFIX / "share/structvpr/config/structvpr.yaml"
    command = [NODE, "--ros-args", "--log-level", "info", "--ros-args", "-r", "__node:=structvpr", "-r", f"__ns:={start.namespace}"]
    command += ["--params-file", default, "--params-file", inline, "-r", "image:=/cam/image_raw", "-r", "image/compressed:=/cam/image_raw/compressed"]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen([str(c) for c in command], stdout=log, stderr=subprocess.STDOUT)
    try:
        values = robot.get("input.image_transport", "map.file")
        assert [v.string_value for v in values] == ["compressed", str(tmp_path / "m")]
        assert "listening to /cam/image_raw/compressed" in (tmp_path / "log").read_text()
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(5) == 0


@pytest.mark.parametrize("name", ["structvpr", "replay", "lio_sam"])
def test_a_real_launch_accepts_the_launch_files(name):
    pytest.importorskip("launch_ros", reason="no launch_ros here: the launch files were not launched")
    done = subprocess.run(["ros2", "launch", "structvpr", f"{name}.launch.py", "--show-args"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "image_topic" in done.stdout, done.stderr


def test_a_real_launch_starts_and_ends_the_node(robot, start):
    pytest.importorskip("launch_ros", reason="no launch_ros here: the node was not launched")
    command = ["ros2", "launch", "structvpr", "structvpr.launch.py", f"namespace:={start.namespace}", "image_topic:=picture"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ)
    robot.get("search.top_k")
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=20)
    assert f"listening to {start.namespace}/picture" in out and "process has finished cleanly" in out, out
