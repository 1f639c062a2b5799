"""Parameters: at start, and through the ordinary services."""

import subprocess

import pytest
from rcl_interfaces.msg import ParameterEvent, ParameterType
from harness import NODE, ROOT, qos, seconds
from rosgraph_msgs.msg import Clock


@pytest.mark.parametrize(
    "params, words",
    [
        ({"decision.min_margin": 1}, "parameter `decision.min_margin`: integer 1 is not allowed; allowed: a double, -1 to 2"),
        ({"decision.min_margin": -1.5}, "parameter `decision.min_margin`: double -1.5 is not allowed; allowed: a double, -1 to 2"),
        ({"search.top_k": 0}, "parameter `search.top_k`: integer 0 is not allowed; allowed: an integer, 1 to 1000"),
        ({"qos.image.reliability": "sometimes"}, '"reliable" or "best_effort"'),
        ({"decision.max_pace": 0.1}, "0.5 (decision.min_pace) to 100"),
        ({"input.cameras": ["a", "a"]}, "parameter `input.cameras`"),
        ({"model.file": "/no/such/weights.pth"}, "/no/such/weights.pth"),
        ({"map.file": "/no/such/folder/map"}, "the folder /no/such/folder does not exist"),
        ({"use_sim_time": "yes please"}, "parameter `use_sim_time`"),
    ],
)
def test_what_cannot_be_is_refused_at_start_in_one_line(start, params, words):
    node = start(params, ready=False)
    assert node.process.wait(20) == 1
    lines = [line for line in node.text().splitlines() if words in line]
    assert len(lines) == 1, node.text()


def test_bounds_that_depend_on_each_other_may_come_in_any_order(start, robot):
    start({"decision.max_pace": 0.2, "decision.min_pace": 0.1})
    assert [v.double_value for v in robot.get("decision.max_pace", "decision.min_pace")] == [0.2, 0.1]


def test_unknown_names_warn_with_the_nearest(start):
    node = start({"decision.min_margn": 0.5, "colour": "red"})
    text = node.text()
    assert "unknown parameter `decision.min_margn` has no effect; did you mean `decision.min_margin`?" in text
    assert "unknown parameter `colour` has no effect" in text
    assert node.end() == 0


def test_a_broken_file_is_named(start, tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text("/**:\n  ros__parameters:\n   a: [1,\n")
    node = start(files=[bad], ready=False)
    assert node.process.wait(20) == 1
    assert "bad.yaml" in node.text() and "panicked" not in node.text()


def test_arguments_of_its_own():
    def run(*args):
        return subprocess.run([NODE, *args], capture_output=True, text=True, timeout=20)

    for args in [["--fast"], ["--ros-args", "-p", "a:=1", "--", "--fast"]]:
        done = run(*args)
        assert done.returncode == 2 and "unknown argument `--fast`" in done.stderr and "usage:" in done.stderr
    assert run("--help").returncode == 0 and "usage:" in run("--help").stdout
    assert run("--version").stdout.startswith("structvpr_node 0.1.0")


@pytest.mark.parametrize("name", ["structvpr", "jetson", "cpu_laptop", "bag_replay"])
def test_the_shipped_files_start_the_node(start, robot, name):
    node = start(files=[ROOT / "config" / f"{name}.yaml"])
    assert "WARN" not in node.text(), node.text()
    assert robot.get("search.top_k")[0].integer_value == 20
    assert node.end() == 0


def test_parameters_are_listed_described_and_changed(start, robot):
    start()
    events = robot.listen(ParameterEvent, "/parameter_events", qos(1000))
    listed = robot.list()
    assert "decision.min_margin" in listed.names and "use_sim_time" in listed.names and "qos.image" in listed.prefixes
    assert robot.list("decision").names and all(n.startswith("decision.") for n in robot.list("decision").names)
    assert "qos.image.depth" not in robot.list("qos", depth=1).names
    for name, d in zip(listed.names, robot.describe(*listed.names)):
        assert d.name == name and d.description and d.type != ParameterType.PARAMETER_NOT_SET, name
    margin, top_k, cameras = robot.describe("decision.min_margin", "search.top_k", "input.cameras")
    assert (margin.floating_point_range[0].from_value, margin.floating_point_range[0].to_value) == (-1.0, 2.0)
    assert (top_k.integer_range[0].from_value, top_k.integer_range[0].to_value, top_k.read_only) == (1, 1000, False)
    assert cameras.read_only and "names" in cameras.additional_constraints

    results = robot.set(decision__min_margin=0.25, search__top_k=7)
    assert all(r.successful for r in results), results
    assert [robot.get("decision.min_margin")[0].double_value, robot.get("search.top_k")[0].integer_value] == [0.25, 7]
    robot.until(lambda: any(p.name == "search.top_k" for e in events for p in e.changed_parameters), what="an event")
    for params, words in [
        ({"decision__min_margin": 5.0}, "parameter `decision.min_margin`: double 5.0 is not allowed; allowed: a double, -1 to 2"),
        ({"decision__min_margin": 1}, "allowed: a double, -1 to 2"),
        ({"decision__min_margn": 0.1}, "did you mean `decision.min_margin`?"),
        ({"model__file": "x.pth"}, "parameter `model.file` needs a restart"),
        ({"qos__image__depth": 9}, "parameter `qos.image.depth` needs a restart"),
    ]:
        (result,) = robot.set(**params)
        assert not result.successful and words in result.reason, result
    # What is not changed may be set, as `ros2 param load` does with a whole file.
    assert robot.set(qos__image__depth=5)[0].successful

    # All or nothing.
    result = robot.set_all(search__top_k=9, decision__min_margin=9.0)
    assert not result.successful and robot.get("search.top_k")[0].integer_value == 7
    assert robot.set_all(decision__min_pace=3.0, decision__max_pace=2.5).successful is False
    assert robot.set_all(decision__max_pace=4.0, decision__min_pace=3.0).successful
    _, _, values = robot.status("pipeline")
    assert len(values["config_hash"]) == 16


def test_simulated_time_stamps_the_diagnostics(start, robot):
    start({"publish.diagnostics_period_s": 0.1})
    clock = robot.publisher(Clock, "/clock", qos(1))
    heard = robot.diagnostics()
    robot.until(lambda: heard, what="diagnostics")
    assert seconds(heard[-1].header.stamp) > 1e9, "the wall's time"
    assert robot.set(use_sim_time=True)[0].successful
    robot.matched(clock)

    def simulated():
        now = Clock()
        now.clock.sec = 1234
        clock.publish(now)
        return seconds(heard[-1].header.stamp) == 1234

    robot.until(simulated, what="simulated time")
