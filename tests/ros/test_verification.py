"""Verification by geometry, live: decisions as offline, poses as the street has them, pairs on request."""

import csv
import math

from harness import accepted, nanoseconds, qos, read_bag, tool
from rclpy.serialization import deserialize_message
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from std_srvs.srv import Trigger
from structvpr.msg import GeometricVerification as G, KeyframeId, LoopClosureCandidate as C
from structvpr.srv import QueryImage, VerifyPair
from test_services import QUICK, drive, images, png

VERIFY = {**QUICK, "verification.enabled": True, "verification.min_consistent": 2, "qos.depth.reliability": "reliable", "qos.depth.depth": 1000}


def key(row):
    return KeyframeId(keyframe_id=row)


def test_a_pair_on_request(start, robot, short_street):
    heard = robot.candidates()
    pictures = robot.listen(Image, "structvpr/match_image", qos(5, reliable=False))
    start(VERIFY)
    lap = images(short_street)[:40]
    first = drive(robot, heard, lap)
    robot.call(Trigger, "trigger_relocalization", Trigger.Request())
    second = drive(robot, heard, lap)
    assert len(first) == len(second) == 40 and len(accepted(second)) > 20
    best = [m.candidates[0] for m in second if m.candidates and m.candidates[0].decision == C.ACCEPTED]
    for c in best:
        (v,) = c.verification
        assert v.success and v.inliers >= 20 and v.method == G.FUNDAMENTAL and not v.scale_known and v.seed == 1, v
        assert 0 < v.inliers <= v.matches and abs(v.inlier_ratio - v.inliers / v.matches) < 1e-6 and 0 < v.coverage <= 1
    assert max(m.verify_ms for m in second) > 1.0
    assert pictures, "no picture came"

    answer = robot.call(VerifyPair, "verify_pair", VerifyPair.Request(a=key(50), b=key(10)))
    assert answer.success and answer.verification.success and answer.verification.inliers > 30, answer
    answer = robot.call(VerifyPair, "verify_pair", VerifyPair.Request(a=key(0), b=key(35)))
    assert answer.success and not answer.verification.success, answer
    answer = robot.call(VerifyPair, "verify_pair", VerifyPair.Request(a=key(0), b=key(4000)))
    assert not answer.success and "no keyframe 4000" in answer.message and "80" in answer.message, answer

    request = QueryImage.Request(image=CompressedImage(format="png", data=png(lap[30])), top_k=3, verify=True)
    answer = robot.call(QueryImage, "query_image", request)
    top = answer.candidates.candidates[0]
    assert answer.success and top.decision == C.ACCEPTED and top.match.keyframe_id % 40 == 30, answer
    assert top.verification[0].success and top.verification[0].inliers > 30


def test_without_verification_the_services_say_so(start, robot):
    start(QUICK)
    answer = robot.call(VerifyPair, "verify_pair", VerifyPair.Request(a=key(0), b=key(1)))
    assert not answer.success and "verification.enabled" in answer.message, answer


def test_weights_that_are_missing_or_wrong_end_the_node_by_name(start):
    node = start({"verification.enabled": True, "verification.features": "xfeat"}, ready=False)
    assert node.process.wait(20) == 1 and "`xfeat` is a network and needs its weights" in node.text(), node.text()
    node = start({"verification.enabled": True, "verification.features": "xfeat", "verification.weights": "/no/such.onnx"}, ready=False)
    assert node.process.wait(20) == 1 and "/no/such.onnx" in node.text(), node.text()


def test_live_is_offline_with_verification_too(start, robot, short_street, tmp_path):
    heard = robot.candidates()
    # The calibration's arrival is no part of this: the fundamental matrix does without.
    start({**VERIFY, "verification.method": "fundamental"})
    drive(robot, heard, images(short_street))
    config = tmp_path / "v.yaml"
    lines = ["decision: {min_consistent: 2}", "keyframe: {min_descriptor_change: 0.0}", "verification: {enabled: true, min_consistent: 2, method: fundamental}"]
    config.write_text("\n".join(lines) + "\n")
    tool("structvpr", "replay", short_street, "--config", config, "--no-odometry", "--out", tmp_path / "out")
    with open(tmp_path / "out/candidates.csv") as f:
        want = list(csv.DictReader(f))
    assert len(heard) == len(want)
    verified = 0
    for m, row in zip(heard, want):
        c = m.candidates[0] if m.candidates else None
        if row["match_id"] == "":
            assert c is None
            continue
        assert str(c.match.keyframe_id) == row["match_id"], row
        assert (c.decision == C.ACCEPTED) == (row["decision"] == "ACCEPTED"), row
        assert (str(c.verification[0].inliers) if c.verification and c.verification[0].matches else "") == row["inliers"], row
        verified += bool(row["inliers"])
    assert verified > 10


def test_depth_and_calibration_give_metres(start, robot, tmp_path_factory):
    bag = tmp_path_factory.mktemp("deep") / "bag"
    # Two laps on one lane: the second meets the places of the first from within a metre or two.
    tool("training", "bag", "--out", bag, "--size", "320", "240", "--seconds", "30", "--rate", "5", "--raw", "--depth", "--conditions", "sun,sun")
    heard = robot.candidates()
    start({**VERIFY, "input.depth": True, "decision.similarity_threshold": 0.8, "search.exclusion_s": 5.0})
    truth, messages = {}, read_bag(bag)
    for topic, _, data in messages:
        if topic == "/ground_truth/pose":
            from geometry_msgs.msg import PoseStamped

            m = deserialize_message(data, PoseStamped)
            yaw = 2 * math.atan2(m.pose.orientation.z, m.pose.orientation.w)
            truth[nanoseconds(m.header.stamp)] = (m.pose.position.x, m.pose.position.y, yaw)
    names = {"/camera/depth/image_raw": "depth", "/camera/camera_info": "camera_info", "/camera/image_raw": "image"}
    types = {"depth": Image, "camera_info": CameraInfo, "image": Image}
    out = {n: robot.publisher(types[n], n, qos(1000)) for n in names.values()}
    for p in out.values():
        robot.matched(p)
    # Of each stamp the image last: depth and calibration are there when it is worked on.
    order = {"camera_info": 0, "depth": 1, "image": 2}
    stamped = [(nanoseconds(deserialize_message(d, types[names[t]]).header.stamp), order[names[t]], names[t], d) for t, _, d in messages if t in names]
    for i, (_, _, name, data) in enumerate(sorted(stamped, key=lambda m: m[:2])):
        out[name].publish(data)
        if i % 15 == 0:
            robot.spin(0.3)
    robot.until(lambda: robot.status("images of camera")[2]["queue"] == "0", 120, "the queue to empty")
    robot.spin(1.0)
    right = metric = 0
    for m in heard:
        for c in m.candidates[:1]:
            if not c.verification or not c.verification[0].success:
                continue
            v = c.verification[0]
            assert v.method in (G.PNP, G.ESSENTIAL) and v.scale_known == (v.method == G.PNP), v
            if not v.scale_known:
                continue
            metric += 1
            q, r = truth[nanoseconds(m.query.stamp)], truth[nanoseconds(c.match.stamp)]
            dx, dy = q[0] - r[0], q[1] - r[1]
            want = (math.cos(r[2]) * dx + math.sin(r[2]) * dy, -math.sin(r[2]) * dx + math.cos(r[2]) * dy)
            p = v.t_match_query.pose.position
            right += math.hypot(p.x - want[0], p.y - want[1]) <= 0.3
            covariance = v.t_match_query.covariance
            assert all(covariance[7 * i] > 0 for i in range(6)) and covariance[0] < 1.0, covariance
    assert metric >= 10 and right >= 0.9 * metric, (right, metric)
