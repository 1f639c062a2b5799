"""What the node says live is what `structvpr replay` says of the same bag."""

import csv
from pathlib import Path

import pytest
from geometry_msgs.msg import PoseWithCovarianceStamped
from harness import SHARED, accepted, nanoseconds, qos, read_bag, tool
from nav_msgs.msg import Odometry
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Float64MultiArray
from structvpr.msg import KeyframeDescriptor, LoopClosureCandidate as C
from visualization_msgs.msg import MarkerArray

REPLAY = Path(__file__).parents[2] / "config/bag_replay.yaml"
DECISIONS = {C.ACCEPTED: "ACCEPTED", C.PENDING: "PENDING", C.REJECTED: "REJECTED"}


def rows(path):
    with open(path) as f:
        return list(csv.DictReader(f))


def offline(out, *args):
    tool("structvpr", "replay", *args, "--out", out)
    return rows(out / "candidates.csv"), rows(out / "loop_closures.csv")


def nanos(text):
    whole, fraction = text.split(".")
    return int(whole) * 1_000_000_000 + int(fraction.ljust(9, "0"))


def play(robot, bag, heard, names, types=(CompressedImage, Image, Odometry)):
    """Publishes a bag's messages, in order and as fast as the node takes them. Returns the number of images."""
    publishers, images = {}, 0
    messages = read_bag(bag)
    for topic, type_ in {(t, ty) for t, ty, _ in messages}:
        for t in types:
            if type_.endswith("/" + t.__name__):
                publishers[topic] = robot.publisher(t, names[t], qos(1000))
    for p in publishers.values():
        robot.matched(p)
    for topic, type_, data in messages:
        if topic in publishers:
            publishers[topic].publish(data)
            images += type_.endswith("Image")
            robot.executor.spin_once(timeout_sec=0.0)
            # No more in flight than the middleware keeps.
            if images % 20 == 0 and type_.endswith("Image"):
                robot.until(lambda: received(robot) >= images - 30, 60, "the node to keep up")
    return images


def received(robot):
    heard = robot.heard["/diagnostics"]
    for a in reversed(heard):
        for s in a.status:
            if ": images of" in s.name:
                return int({v.key: v.value for v in s.values}["received"])
    return 0


def test_a_bag_played_live_gives_what_replay_gives(start, robot, street, tmp_path):
    node = start(files=[REPLAY], params={"input.image_transport": "compressed", "publish.diagnostics_period_s": 0.1, "publish.max_candidates": 20})
    robot.diagnostics()
    heard = robot.candidates()
    stamps = robot.listen(Float64MultiArray, "structvpr/match_stamps")
    poses = robot.listen(PoseWithCovarianceStamped, "structvpr/match_pose")
    markers = robot.listen(MarkerArray, "structvpr/markers", qos(1, latched=True))
    descriptors = robot.listen(KeyframeDescriptor, "structvpr/keyframe_descriptor")
    names = {CompressedImage: "image/compressed", Odometry: "odom"}
    images = play(robot, street, heard, names, (CompressedImage, Odometry))
    candidates, closures = offline(tmp_path / "out", street)
    robot.until(lambda: len(heard) >= len(candidates), 60, f"{len(candidates)} keyframes")
    robot.spin(1.0)
    assert images == 300 and len(closures) > 100

    # The same set of closures, and the same account of every keyframe.
    want = {(nanos(r["query_stamp"]), nanos(r["match_stamp"])) for r in closures}
    assert set(accepted(heard)) == want
    assert len(accepted(heard)) == len(want)
    assert len(heard) == len(candidates)
    for message, row in zip(heard, candidates):
        assert nanoseconds(message.header.stamp) == nanos(row["query_stamp"])
        assert message.query.keyframe_id == int(row["query_id"])
        if row["match_id"] == "":
            assert not message.candidates
            continue
        best = message.candidates[0]
        assert best.match.keyframe_id == int(row["match_id"])
        assert best.similarity == pytest.approx(float(row["similarity"]), abs=1e-6)
        assert best.rank == 0 and best.consistent_count == int(row["consistent_count"])
        assert best.reject_reason == getattr(C, row["reject_reason"])
        assert (best.decision == C.ACCEPTED) == (row["decision"] == "ACCEPTED")
        assert [c.rank for c in message.candidates] == list(range(len(message.candidates)))
        similarities = [c.similarity for c in message.candidates]
        assert similarities == sorted(similarities, reverse=True) and len(similarities) <= 20

    # What SLAM stacks listen for.
    assert [tuple(round(t, 5) for t in m.data) for m in stamps] == [(q / 1e9, m / 1e9) for q, m in accepted(heard)]
    assert len(poses) == len(want)
    assert poses[0].header.frame_id == "odom" and poses[0].pose.covariance[0] == 25.0
    assert len(descriptors) == len(heard)
    d = descriptors[0]
    assert d.dim == 448 and len(d.data) == 4 * 448 and d.encoding == KeyframeDescriptor.F32 and d.l2_normalized
    last = markers[-1]
    assert {m.ns for m in last.markers} == {"loop_nodes", "loop_edges"}
    assert len([m for m in last.markers if m.ns == "loop_edges"][0].points) == 2 * len(want)
    level, _, values = robot.status("pipeline")
    assert level == 0 and values["keyframes"] == str(len(heard)) and values["closures"] == str(len(want))
    print(f"\nlive equals offline: {len(heard)} keyframes, {len(want)} closures")
    assert node.end() == 0


def test_photographs_live_give_what_replay_gives(start, robot, tmp_path):
    data = SHARED / "data/gardens_point_day"
    if not data.is_dir():
        pytest.skip("gardens_point_day is not in ../shared")
    folders = [data / "day_left", data / "day_right"]
    candidates, closures = offline(tmp_path / "out", *folders)
    start(files=[REPLAY], params={"input.image_transport": "compressed"})
    robot.diagnostics()
    heard = robot.candidates()
    camera = robot.publisher(CompressedImage, "image/compressed", qos(1000))
    robot.matched(camera)
    images = [f for folder in folders for f in sorted(folder.rglob("*.jpg"))]
    for i, f in enumerate(images):
        message = CompressedImage(format="jpeg", data=f.read_bytes())
        message.header.stamp.sec = i
        camera.publish(message)
        robot.executor.spin_once(timeout_sec=0.0)
        if i % 20 == 0:
            robot.until(lambda: received(robot) >= i - 30, 60, "the node to keep up")
    robot.until(lambda: len(heard) >= len(candidates), 120, f"{len(candidates)} keyframes")
    want = {(nanos(r["query_stamp"]), nanos(r["match_stamp"])) for r in closures}
    assert len(images) == 400 and want and set(accepted(heard)) == want and len(heard) == len(candidates)
    print(f"\nlive equals offline: {len(heard)} keyframes, {len(want)} closures")


def test_a_bag_that_begins_again_is_a_second_session(start, robot, short_street, tmp_path):
    first = len(offline(tmp_path / "out", short_street)[0])
    start(files=[REPLAY], params={"decision.min_consistent": 5})
    robot.diagnostics()
    heard = robot.candidates()
    names = {Image: "image", Odometry: "odom"}
    play(robot, short_street, heard, names, (Image, Odometry))
    robot.until(lambda: len(heard) >= first, 60, "the first round")
    assert first > 100 and {m.query.session_id for m in heard} == {0}
    play(robot, short_street, heard, names, (Image, Odometry))
    # Five images whose stamp has gone back begin a session; the fifth is its first.
    robot.until(lambda: len(heard) >= 2 * first - 10, 60, "the second round")
    robot.spin(1.0)
    again = heard[first:]
    assert {m.query.session_id for m in again} == {1} and len(again) >= first - 6
    inter = [c for m in again for c in m.candidates if c.decision == C.ACCEPTED and c.kind == C.INTER_SESSION]
    exact = [c for c in inter if c.query.stamp == c.match.stamp]
    assert len(inter) > first // 2 and len(exact) > first // 2, (len(inter), len(exact))
    _, _, values = robot.status("pipeline")
    assert values["sessions_begun"] == "1" and values["reason_TIME_JUMP"] == "4"
