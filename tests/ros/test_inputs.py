"""What comes in: several cameras, broken messages, publishers that do not fit, die and return."""

import random
import time

import pytest
from harness import qos, read_bag, seconds
from nav_msgs.msg import Odometry
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from std_msgs.msg import Float64MultiArray
from structvpr.msg import LoopClosureCandidate as C, LoopClosureCandidates

# Deep queues everywhere: these tests send bursts, and count.
QUICK = {
    "decision.min_consistent": 2,
    "publish.diagnostics_period_s": 0.1,
    "qos.image.reliability": "reliable",
    "qos.image.depth": 1000,
    "input.queue_depth": 1000,
}


def image(stamp, width=64, height=48, encoding="rgb8", step=None, seed=0, size=None):
    rng = random.Random(seed)
    step = 3 * width if step is None else step
    blocks = [rng.randrange(256) for _ in range(64)]
    size = step * height if size is None else size
    data = bytes(blocks[(i // 24 + (i // 1536) * 8) % 64] for i in range(min(size, 2_000_000)))
    m = Image(height=height, width=width, encoding=encoding, step=step, data=data)
    m.header.stamp.sec, m.header.stamp.nanosec = int(stamp), int(stamp % 1 * 1e9)
    m.header.frame_id = "camera"
    return m


def test_best_effort_is_not_heard_by_reliable_and_it_says_so(start, robot):
    node = start({**QUICK, "input.no_image_s": 0.5})
    camera = robot.publisher(Image, "image", qos(5, reliable=False))
    end = time.monotonic() + 3
    while time.monotonic() < end:
        camera.publish(image(time.monotonic()))
        robot.spin(0.05)
    words = f"publisher {start.namespace}/robot offers best-effort, we ask reliable; set qos.image.reliability to \"best_effort\""
    level, message, values = robot.status("images of camera")
    assert level == 2 and words in message and f"no image received on {start.namespace}/image for" in message
    assert values["topic"] == f"{start.namespace}/image" and values["received"] == "0"
    assert words in node.text() and node.text().count(words) == 1, "said once, not ten times a second"


def test_another_type_on_the_topic_is_named(start, robot):
    start({**QUICK, "input.no_image_s": 0.5}, args=["-r", "image:=picture"])
    camera = robot.publisher(CompressedImage, "picture")
    robot.spin(1.5)
    level, message, _ = robot.status("images of camera")
    assert level == 2 and 'set input.image_transport to "compressed"' in message, message
    assert f"{start.namespace}/picture" in message
    del camera


def test_garbage_does_no_harm(start, robot):
    start({**QUICK, "keyframe.min_luma_std": 0.0, "keyframe.min_descriptor_change": 0.0})
    heard = robot.candidates()
    camera = robot.publisher(Image, "image", qos(1000))
    robot.matched(camera)
    garbage = [
        image(1, encoding="mp3"),
        image(2, step=5),
        image(3, size=10),
        image(4, width=0, height=0, size=0),
        image(5, width=4_000_000_000, height=4_000_000_000, step=0, size=0),
        image(6, width=20_000, height=20_000, step=60_000, size=1000),
        image(7, encoding="\x00" * 300),
        image(8, encoding="bayer_rggb8", width=3, height=3, step=3),
        image(9, width=1, height=1),
    ]
    for m in garbage:
        camera.publish(m)
    # Bytes that are no Image at all.
    rng = random.Random(1)
    for n in [0, 1, 4, 7, 20, 100, 5000]:
        camera.publish(b"\0\1\0\0" + bytes(rng.randrange(256) for _ in range(n)))
    robot.spin(0.5)
    for i in range(5):
        camera.publish(image(100 + i, seed=i))
    robot.until(lambda: len([m for m in heard if m.header.stamp.sec >= 100]) == 5, what="the good images")
    level, message, values = robot.status("pipeline")
    assert int(values["unusable"]) >= 12 and values["keyframes"] == str(len(heard))


def test_an_image_of_another_size_is_used_too(start, robot):
    start({**QUICK, "keyframe.min_descriptor_change": 0.0, "decision.min_consistent": 1, "search.exclusion_keyframes": 0})
    heard = robot.candidates()
    camera = robot.publisher(Image, "image")
    robot.matched(camera)
    camera.publish(image(1, width=64, height=48, seed=3))
    camera.publish(image(100, width=128, height=96, step=400, seed=4))
    robot.until(lambda: len(heard) == 2, what="both")
    assert len(heard[1].candidates) == 1


def test_two_cameras_in_one_map(start, robot, short_street):
    lap = [data for _, type_, data in read_bag(short_street) if type_.endswith("/Image")][:60]
    start({**QUICK, "input.cameras": ["front", "rear"]})
    heard = robot.candidates()
    front, rear = (robot.publisher(Image, f"{c}/image", qos(1000)) for c in ["front", "rear"])
    robot.matched(front)
    robot.matched(rear)
    for i, data in enumerate(lap):
        front.publish(data)
        # The other camera sees the drive from its end.
        other = lap[len(lap) - 1 - i]
        rear.publish(data[:4] + data[4:12] + other[12:])
        if i % 5 == 0:
            robot.spin(0.2)
    robot.until(lambda: robot.status("images of front")[2]["queue"] == robot.status("images of rear")[2]["queue"] == "0", 60)
    robot.spin(0.5)
    cameras = [m.camera for m in heard]
    assert set(cameras) == {"front", "rear"} and min(cameras.count("front"), cameras.count("rear")) > 40
    assert {m.query.session_id for m in heard} == {0}
    assert len({m.query.keyframe_id for m in heard}) == len(heard)
    assert robot.status("map")[2]["keyframes"] == str(len(heard))


def test_a_publisher_that_dies_and_returns(start, robot):
    node = start({**QUICK, "input.no_image_s": 2.0, "keyframe.min_descriptor_change": 0.0})
    heard = robot.candidates()
    for round_ in range(2):
        camera = robot.publisher(Image, "image")
        robot.matched(camera)
        for i in range(5):
            camera.publish(image(10 * round_ + i, seed=i))
        robot.until(lambda: len(heard) == 5 * (round_ + 1), what="keyframes")
        assert robot.status("images of camera")[0] == 0
        robot.node.destroy_publisher(camera)
        robot.until(lambda: robot.status("images of camera")[0] == 2, 10, "a report of silence")
        assert "nobody publishes" in robot.status("images of camera")[1]
    assert {m.query.session_id for m in heard} == {0}
    assert "images arrive on" in node.text() and node.end() == 0


def test_undistortion_waits_for_the_calibration(start, robot):
    start({**QUICK, "input.undistort": True, "keyframe.min_descriptor_change": 0.0})
    heard = robot.candidates()
    camera, info = robot.publisher(Image, "image"), robot.publisher(CameraInfo, "camera_info")
    robot.matched(camera)
    robot.matched(info)
    camera.publish(image(1))
    robot.until(lambda: robot.status("pipeline")[2]["unusable"] == "1", what="a complaint")
    m = CameraInfo(width=64, height=48, distortion_model="plumb_bob", d=[0.1, 0.0, 0.0, 0.0, 0.0], k=[50.0, 0, 32, 0, 50, 24, 0, 0, 1])
    info.publish(m)
    robot.until(lambda: robot.status("images of camera")[2]["camera_info"] == "true", what="the calibration")
    camera.publish(image(2))
    robot.until(lambda: len(heard) == 1, what="a keyframe")


def test_parked_with_odometry_adds_nothing(start, robot):
    start({**QUICK, "keyframe.min_interval_s": 0.0})
    heard = robot.candidates()
    camera, odom = robot.publisher(Image, "image"), robot.publisher(Odometry, "odom")
    robot.matched(camera)
    robot.matched(odom)

    def go(stamp, x, seed):
        m = Odometry()
        m.header.frame_id, m.child_frame_id, m.pose.pose.position.x, m.pose.pose.orientation.w = "odom", "base", x, 1.0
        m.header.stamp.sec = stamp
        odom.publish(m)
        camera.publish(image(stamp, seed=seed))
        robot.spin(0.03)

    for i in range(-5, 0):
        odom.publish(Odometry())
    robot.until(lambda: "ago" in robot.status("pipeline")[2]["odometry"], what="odometry")
    for i in range(30):
        go(i, 0.0, i)
    for i in range(30, 35):
        go(i, float(i), i)
    robot.until(lambda: len(heard) >= 6, what="keyframes")
    robot.spin(0.3)
    assert [int(seconds(m.header.stamp)) for m in heard] == [0, 30, 31, 32, 33, 34]
    assert robot.status("pipeline")[2]["reason_STATIONARY"] == "29"


def test_depth_tells_a_wall(start, robot):
    node = start({**QUICK, "input.depth": True, "keyframe.min_depth_m": 1.0, "keyframe.min_descriptor_change": 0.0})
    heard = robot.candidates()
    camera, depth = robot.publisher(Image, "image"), robot.publisher(Image, "depth")
    robot.matched(camera)
    robot.matched(depth)

    def see(stamp, millimetres):
        m = Image(height=48, width=64, encoding="16UC1", step=128, data=millimetres.to_bytes(2, "little") * (64 * 48))
        m.header.stamp.sec = stamp
        depth.publish(m)
        robot.spin(0.2)
        camera.publish(image(stamp, seed=stamp))
        robot.spin(0.2)

    see(1, 400)
    see(2, 3000)
    see(3, 500)
    robot.until(lambda: robot.status("pipeline")[2].get("reason_LOW_QUALITY") == "2", what="two walls")
    assert [m.header.stamp.sec for m in heard] == [2]
    assert robot.status("images of camera")[2]["median_depth_m"] == "0.50"
    depth.publish(image(4))
    node.wait_for("image encoding `rgb8` is not supported; supported: 16UC1, 32FC1")


def test_the_pair_is_drawn_only_for_who_looks(start, robot):
    start({**QUICK, "decision.min_consistent": 1, "search.exclusion_keyframes": 0, "keyframe.min_descriptor_change": 0.0, "decision.min_margin": 0.0})
    heard = robot.candidates()
    camera = robot.publisher(Image, "image")
    robot.matched(camera)
    camera.publish(image(1, width=160, height=120, seed=1))
    camera.publish(image(100, width=160, height=120, seed=1))
    robot.until(lambda: len(heard) == 2, what="keyframes")
    pairs = robot.listen(Image, "structvpr/match_image", qos(5, reliable=False))
    robot.spin(1.0)
    camera.publish(image(200, width=160, height=120, seed=1))
    robot.until(lambda: pairs, what="a picture")
    m = pairs[0]
    assert len(pairs) == 1 and m.encoding == "rgb8" and (m.width, m.height) == (329, 145) and len(m.data) == m.step * m.height
    best = heard[2].candidates[0]
    assert best.decision == C.ACCEPTED
    # The frame around an accepted pair is green.
    assert m.data[1] > m.data[0] and m.data[1] > m.data[2]


def test_names_are_remapped_as_lio_sam_wants(start, robot):
    start(
        {**QUICK, "decision.min_consistent": 1, "search.exclusion_keyframes": 0, "keyframe.min_descriptor_change": 0.0},
        args=["-r", "image:=/rig/left/image", "-r", "~/match_stamps:=/lio_loop/loop_closure_detection", "-r", "__node:=vpr"],
    )
    stamps = robot.listen(Float64MultiArray, "/lio_loop/loop_closure_detection")
    heard = robot.listen(LoopClosureCandidates, "vpr/candidates")
    camera = robot.publisher(Image, "/rig/left/image")
    robot.matched(camera)
    camera.publish(image(1, seed=1))
    camera.publish(image(100.25, seed=1))
    robot.until(lambda: len(heard) == 2 and stamps, what="a closure")
    assert list(stamps[0].data) == [100.25, 1.0]


def test_an_edge_for_kimera_and_hydra(start, robot):
    messages = pytest.importorskip("pose_graph_tools_msgs.msg", reason="the node was built without pose_graph_tools_msgs")
    start({**QUICK, "decision.min_consistent": 1, "search.exclusion_keyframes": 0, "keyframe.min_descriptor_change": 0.0, "map.robot_id": 3})
    graphs = robot.listen(messages.PoseGraph, "structvpr/pose_graph")
    camera = robot.publisher(Image, "image")
    robot.matched(camera)
    camera.publish(image(1, seed=1))
    camera.publish(image(100, seed=1))
    robot.until(lambda: graphs, what="an edge")
    (edge,) = graphs[0].edges
    assert (edge.key_from, edge.key_to, edge.robot_from, edge.robot_to, edge.type) == (0, 1, 3, 3, messages.PoseGraphEdge.LOOPCLOSE)
    assert edge.pose.orientation.w == 1.0 and edge.covariance[0] == 25.0 and edge.covariance[1] == 0.0
    assert graphs[0].nodes == [] and graphs[0].header.stamp.sec == 100, "no odometry, no poses"


def test_late_images_are_dropped_oldest_first_and_counted(start, robot):
    start({**QUICK, "input.queue_depth": 2, "keyframe.min_interval_s": 0.0, "keyframe.min_descriptor_change": 0.0})
    heard = robot.candidates()
    camera = robot.publisher(Image, "image", qos(1000))
    robot.matched(camera)
    for i in range(100):
        camera.publish(image(i * 0.2, seed=i))
    robot.until(lambda: heard and seconds(heard[-1].header.stamp) > 19.7, what="the last image")
    robot.spin(0.3)
    _, _, values = robot.status("images of camera")
    assert int(values["received"]) == 100 and int(values["queue_max"]) == 2
    assert int(values["dropped"]) == 100 - len(heard) > 0
