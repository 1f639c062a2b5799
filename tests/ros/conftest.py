import itertools
import os

import pytest

# A domain of our own, and nothing beyond this machine.
os.environ.setdefault("ROS_DOMAIN_ID", str(20 + os.getpid() % 80))
os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
if os.environ.get("ROS_DISTRO") == "humble":
    os.environ.setdefault("ROS_LOCALHOST_ONLY", "1")

from harness import Process, Robot, tool  # noqa: E402

NUMBER = itertools.count()


@pytest.fixture
def start(tmp_path, request):
    """Starts nodes in the test's own namespace; whatever still runs at the end is killed."""
    namespace = f"/t{os.getpid()}_{next(NUMBER)}"
    nodes = []

    def start_(params=None, ready=True, **more):
        node = Process(tmp_path / f"node{len(nodes)}.log", params, namespace=more.pop("namespace", namespace), **more)
        nodes.append(node)
        if ready:
            node.wait_for("listening to")
        return node

    start_.namespace = namespace
    yield start_
    failed = getattr(request.node, "failed", False)
    for node in nodes:
        node.kill()
        if failed:
            print(node.log.read_text()[-4000:])


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    item.failed = getattr(item, "failed", False) or report.failed


@pytest.fixture
def robot(start):
    robot = Robot(start.namespace)
    yield robot
    robot.close()


@pytest.fixture(scope="session")
def street(tmp_path_factory):
    """A drive of two laps through the synthetic street, with odometry, as the demo's."""
    bag = tmp_path_factory.mktemp("street") / "bag"
    tool("training", "bag", "--out", bag, "--size", "320", "240")
    return bag


@pytest.fixture(scope="session")
def short_street(tmp_path_factory):
    """A shorter drive in raw images."""
    bag = tmp_path_factory.mktemp("short") / "bag"
    tool("training", "bag", "--out", bag, "--size", "160", "120", "--seconds", "50", "--raw", "--conditions", "sun,sun")
    return bag
