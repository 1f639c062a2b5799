"""Runs structvpr_node and talks to it as a robot would: over DDS, with rclpy."""

import os
import signal
import subprocess
import time
from pathlib import Path

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
from rcl_interfaces.srv import DescribeParameters, GetParameters, ListParameters, SetParameters, SetParametersAtomically
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from structvpr.msg import LoopClosureCandidate, LoopClosureCandidates

ROOT = Path(__file__).resolve().parents[2]
PREFIX = Path(os.environ["STRUCTVPR_PREFIX"])
NODE = PREFIX / "lib/structvpr/structvpr_node"
TOOLS = Path(os.environ["STRUCTVPR_TOOLS"])
SHARED = ROOT.parent / "shared"


def qos(depth=100, reliable=True, latched=False):
    return QoSProfile(
        history=HistoryPolicy.KEEP_LAST,
        depth=depth,
        reliability=ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT,
        durability=DurabilityPolicy.TRANSIENT_LOCAL if latched else DurabilityPolicy.VOLATILE,
    )


def value(v):
    """A Python value as a parameter."""
    if isinstance(v, bool):
        return ParameterValue(type=ParameterType.PARAMETER_BOOL, bool_value=v)
    if isinstance(v, int):
        return ParameterValue(type=ParameterType.PARAMETER_INTEGER, integer_value=v)
    if isinstance(v, float):
        return ParameterValue(type=ParameterType.PARAMETER_DOUBLE, double_value=v)
    if isinstance(v, str):
        return ParameterValue(type=ParameterType.PARAMETER_STRING, string_value=v)
    return ParameterValue(type=ParameterType.PARAMETER_STRING_ARRAY, string_array_value=v)


def yaml(v):
    if isinstance(v, bool):
        return str(v).lower()
    return f'"{v}"' if isinstance(v, str) else str(v)


class Process:
    """A structvpr_node with its output."""

    def __init__(self, log, params=None, args=(), namespace="", files=(), env=None):
        command = [str(NODE), "--ros-args", "-r", f"__ns:={namespace or '/'}"]
        for f in files:
            command += ["--params-file", str(f)]
        for k, v in (params or {}).items():
            command += ["-p", f"{k}:={yaml(v)}"]
        command += list(args)
        self.log = Path(log)
        self.out = open(self.log, "w")
        self.process = subprocess.Popen(command, stdout=self.out, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})})
        self.namespace = namespace

    def text(self):
        return self.log.read_text()

    def wait_for(self, words, seconds=20):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if words in self.text():
                return
            assert self.process.poll() is None, f"the node ended:\n{self.text()}"
            time.sleep(0.02)
        raise AssertionError(f"the node did not say {words!r}:\n{self.text()}")

    def end(self, how=signal.SIGINT):
        """Ends the node; returns its exit code and how long that took."""
        if self.process.poll() is None:
            start = time.monotonic()
            self.process.send_signal(how)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                raise AssertionError(f"the node did not end:\n{self.text()}") from None
            self.took = time.monotonic() - start
        self.out.close()
        return self.process.returncode

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.out.close()


class Robot:
    """Publishers, subscribers and clients of one test."""

    def __init__(self, namespace):
        self.ns = namespace
        self.context = rclpy.Context()
        rclpy.init(context=self.context)
        self.node = rclpy.create_node("robot", namespace=namespace, context=self.context)
        self.executor = SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)
        self.heard = {}

    def close(self):
        self.executor.shutdown()
        self.node.destroy_node()
        rclpy.shutdown(context=self.context)

    def publisher(self, type_, topic, profile=None):
        return self.node.create_publisher(type_, topic, profile or qos())

    def listen(self, type_, topic, profile=None):
        heard = self.heard.setdefault(topic, [])
        self.node.create_subscription(type_, topic, heard.append, profile or qos(1000))
        return heard

    def candidates(self):
        return self.listen(LoopClosureCandidates, "structvpr/candidates")

    def diagnostics(self):
        return self.listen(DiagnosticArray, "/diagnostics")

    def spin(self, seconds):
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.executor.spin_once(timeout_sec=min(left, 0.05))

    def until(self, condition, seconds=20, what=""):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"waited {seconds} s in vain for {what or condition}"
            self.executor.spin_once(timeout_sec=0.02)

    def matched(self, publisher, n=1):
        """Waits until the node hears `publisher`, and we hear the node."""
        self.until(lambda: publisher.get_subscription_count() >= n, what=f"a subscriber of {publisher.topic_name}")
        for topic in self.heard:
            self.until(lambda: self.node.count_publishers(topic) > 0, what=f"a publisher of {topic}")
        # Both ends of a pair learn of each other one after the other.
        self.spin(0.5)

    def call(self, type_, name, request, seconds=20):
        client = self.node.create_client(type_, f"structvpr/{name}" if not name.startswith("/") else name)
        assert client.wait_for_service(timeout_sec=seconds), f"no service {name}"
        # The node may not know yet where to answer to (see `matched`): on a busy machine an answer was lost.
        self.spin(0.3)
        future = client.call_async(request)
        self.until(future.done, seconds, f"an answer of {name}")
        self.node.destroy_client(client)
        return future.result()

    def set(self, **params):
        """Sets each parameter (`__` stands for a dot); returns the results."""
        request = SetParameters.Request(parameters=[Parameter(name=k.replace("__", "."), value=value(v)) for k, v in params.items()])
        return self.call(SetParameters, "set_parameters", request).results

    def set_all(self, **params):
        request = SetParametersAtomically.Request(
            parameters=[Parameter(name=k.replace("__", "."), value=value(v)) for k, v in params.items()]
        )
        return self.call(SetParametersAtomically, "set_parameters_atomically", request).result

    def get(self, *names):
        return self.call(GetParameters, "get_parameters", GetParameters.Request(names=list(names))).values

    def describe(self, *names):
        return self.call(DescribeParameters, "describe_parameters", DescribeParameters.Request(names=list(names))).descriptors

    def list(self, *prefixes, depth=0):
        return self.call(ListParameters, "list_parameters", ListParameters.Request(prefixes=list(prefixes), depth=depth)).result

    def status(self, part, seconds=10, newer=True):
        """The values of the newest diagnostics status whose name ends with `part`."""
        heard = self.diagnostics() if "/diagnostics" not in self.heard else self.heard["/diagnostics"]
        seen = len(heard)
        name = f"{part}"
        found = []

        def look():
            found.clear()
            found.extend(s for a in heard[seen if newer else 0 :] for s in a.status if s.name.endswith(name))
            return bool(found)

        self.until(look, seconds, f"diagnostics of {part}")
        s = found[-1]
        level = s.level[0] if isinstance(s.level, bytes) else s.level
        return level, s.message, {v.key: v.value for v in s.values}


def seconds(stamp):
    return stamp.sec + stamp.nanosec * 1e-9


def nanoseconds(stamp):
    return stamp.sec * 1_000_000_000 + stamp.nanosec


def accepted(messages):
    """(stamp of the query, stamp of the match) of all accepted candidates, nanoseconds."""
    return [
        (nanoseconds(c.query.stamp), nanoseconds(c.match.stamp))
        for m in messages
        for c in m.candidates
        if c.decision == LoopClosureCandidate.ACCEPTED
    ]


def tool(*args):
    """Runs one of our programs; returns its output."""
    done = subprocess.run([str(TOOLS / args[0]), *map(str, args[1:])], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def read_bag(path):
    """(topic, type, CDR) of all messages, in order."""
    from rosbags.rosbag2 import Reader

    with Reader(path) as reader:
        return [(c.topic, c.msgtype, bytes(data)) for c, _, data in reader.messages()]
