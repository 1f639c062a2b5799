"""The node's own services, and what a restart keeps."""

import json
import math
import shutil
import signal
import struct
import subprocess
import zlib

import pytest
from harness import NODE, ROOT, accepted, qos, read_bag, tool
from rclpy.serialization import deserialize_message
from sensor_msgs.msg import CompressedImage, Image
from std_srvs.srv import SetBool, Trigger
from structvpr.msg import KeyframeId, LoopClosureCandidate as C
from structvpr.srv import LoadMap, QueryImage, SaveMap

# Small chains: these tests are about the services.
QUICK = {
    "decision.min_consistent": 2,
    "keyframe.min_descriptor_change": 0.0,
    "publish.diagnostics_period_s": 0.1,
    "qos.image.reliability": "reliable",
    "qos.image.depth": 1000,
    "input.queue_depth": 1000,
}


def images(bag):
    return [data for _, type_, data in read_bag(bag) if type_.endswith("/Image")]


def drive(robot, heard, data):
    camera = robot.publisher(Image, "image", qos(1000))
    robot.matched(camera)
    before = len(heard)
    for i, image in enumerate(data):
        camera.publish(image)
        if i % 10 == 0:
            robot.spin(0.2)
    robot.spin(0.5)
    robot.until(lambda: robot.status("images of camera")[2]["queue"] == "0", 60, "the queue to empty")
    robot.spin(0.3)
    robot.node.destroy_publisher(camera)
    return heard[before:]


def png(data):
    """A raw RGB image message as a PNG file."""
    m = deserialize_message(data, Image)
    assert m.encoding == "rgb8" and m.step == 3 * m.width
    rows = b"".join(b"\0" + bytes(m.data[y * m.step : (y + 1) * m.step]) for y in range(m.height))

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", m.width, m.height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_a_map_outlives_the_node(start, robot, short_street, tmp_path):
    lap = images(short_street)[:100]
    heard = robot.candidates()
    file = tmp_path / "site.svpr"
    node = start({**QUICK, "map.file": str(file)})
    first = drive(robot, heard, lap)
    assert len(first) == 100 and file.exists()
    answer = robot.call(SaveMap, "save_map", SaveMap.Request(path=str(tmp_path / "copy.svpr")))
    assert answer.success and answer.keyframes == len(first) and (tmp_path / "copy.svpr").exists(), answer
    answer = robot.call(SaveMap, "save_map", SaveMap.Request(path="/no/such/folder/x"))
    assert not answer.success and "/no/such/folder/x" in answer.message
    assert node.end(signal.SIGINT) == 0 and node.took < 2.0, node.took
    assert f"{len(first)} keyframes saved to {file}" in node.text()

    # A restart continues the map; the same drive is found in it, session after session.
    node = start({**QUICK, "map.file": str(file)})
    assert f"map of {len(first)} keyframes" in node.text()
    second = drive(robot, heard, lap)
    kinds = {c.kind for m in second for c in m.candidates if c.decision == C.ACCEPTED}
    assert kinds == {C.INTER_SESSION} and len(accepted(second)) > 0.8 * len(second)
    assert {m.query.session_id for m in second} == {1} and second[0].map_id == first[0].map_id
    # Twice, as a terminal and a launch file would: it is the same wish, and the map is saved all the same.
    node.process.send_signal(signal.SIGINT)
    assert node.end(signal.SIGINT) == 0 and node.took < 2.0
    assert "keyframes saved to" in node.text()

    # In a node with no file of its own, the copy is loaded, merged, or refused.
    start(QUICK)
    answer = robot.call(LoadMap, "load_map", LoadMap.Request(path=str(tmp_path / "copy.svpr")))
    assert answer.success and answer.keyframes == len(first) and answer.model_id == "structvpr-street-v3", answer
    answer = robot.call(LoadMap, "load_map", LoadMap.Request(path=str(tmp_path / "copy.svpr"), merge=True))
    assert answer.success and answer.keyframes == 2 * len(first)
    for path, words in [("", "no path"), ("/no/such.svpr", "no such file"), (str(ROOT / "README.md"), "not a StructVPR map")]:
        answer = robot.call(LoadMap, "load_map", LoadMap.Request(path=path))
        assert not answer.success and words in answer.message and answer.keyframes == 2 * len(first), answer
    answer = robot.call(SaveMap, "save_map", SaveMap.Request())
    assert not answer.success and "map.file" in answer.message


def test_a_map_of_another_model_is_refused_by_name(start, robot, short_street, tmp_path):
    heard = robot.candidates()
    file = tmp_path / "site.svpr"
    node = start({**QUICK, "map.file": str(file)})
    drive(robot, heard, images(short_street)[:10])
    assert node.end() == 0
    other = tmp_path / "other.safetensors"
    shipped = ROOT / "models/structvpr-street-v3.safetensors"
    tool("structvpr", "convert", shipped, "--out", other, "--name", "other-model", "--input-size", "160x120")
    node = start({"model.file": str(other), "map.file": str(file)}, ready=False)
    assert node.process.wait(20) == 1
    assert "`structvpr-street-v3`" in node.text() and "`other-model`" in node.text() and str(file) in node.text()
    start({**QUICK, "model.file": str(other)})
    answer = robot.call(LoadMap, "load_map", LoadMap.Request(path=str(file)))
    assert not answer.success and "`structvpr-street-v3`" in answer.message and "`other-model`" in answer.message


def test_asking_about_an_image(start, robot, short_street):
    heard = robot.candidates()
    start(QUICK)
    lap = images(short_street)[:60]
    mapped = drive(robot, heard, lap)
    request = QueryImage.Request(image=CompressedImage(format="png", data=png(lap[30])), top_k=3)
    answer = robot.call(QueryImage, "query_image", request)
    assert answer.success and len(answer.candidates.candidates) == 3, answer.message
    best = answer.candidates.candidates[0]
    assert best.similarity > 0.999 and best.rank == 0 and best.query.keyframe_id == KeyframeId.NOT_IN_MAP
    assert best.match.stamp in [m.header.stamp for m in mapped]
    assert answer.candidates.map_id == mapped[0].map_id and answer.candidates.descriptor_ms > 0
    answer = robot.call(QueryImage, "query_image", QueryImage.Request(image=CompressedImage(data=b"no image")))
    assert not answer.success and "image" in answer.message
    answer = robot.call(QueryImage, "query_image", QueryImage.Request(image=CompressedImage(data=b""), verify=True))
    assert not answer.success and "verif" in answer.message
    robot.spin(0.5)
    assert len(heard) == len(mapped), "asking adds nothing"


def test_pause_localization_relocalization_and_reset(start, robot, short_street, tmp_path):
    heard = robot.candidates()
    file = tmp_path / "site.svpr"
    start({**QUICK, "map.file": str(file)})
    lap = images(short_street)[:100]
    answer = robot.call(Trigger, "trigger_relocalization", Trigger.Request())
    assert not answer.success and "empty" in answer.message
    mapped = drive(robot, heard, lap)

    assert robot.call(SetBool, "pause", SetBool.Request(data=True)).success
    assert drive(robot, heard, lap[:10]) == []
    assert robot.status("pipeline")[1] == "paused"
    assert robot.call(SetBool, "pause", SetBool.Request(data=False)).success

    # Carried away: nothing is too recent to be found again, and the first closure says what it answers.
    assert robot.call(SetBool, "localization_only", SetBool.Request(data=True)).success
    assert robot.get("map.localization_only")[0].bool_value
    answer = robot.call(Trigger, "trigger_relocalization", Trigger.Request())
    assert answer.success and f"{len(mapped)} keyframes" in answer.message
    assert robot.status("map")[1].startswith("relocalizing")
    found = drive(robot, heard, lap[40:70])
    closed = [c for m in found for c in m.candidates if c.decision == C.ACCEPTED]
    assert [c.kind for c in closed[:2]] == [C.RELOCALIZATION, C.INTER_SESSION]
    assert all(m.query.keyframe_id == KeyframeId.NOT_IN_MAP for m in found)
    assert robot.status("map")[2]["keyframes"] == str(len(mapped))

    answer = robot.call(Trigger, "reset", Trigger.Request())
    assert answer.success and "site.svpr.before-1" in answer.message
    assert robot.status("map")[2]["keyframes"] == "0" and (tmp_path / "site.svpr.before-1").exists()


def test_the_map_is_saved_by_itself(start, robot, short_street, tmp_path):
    file = tmp_path / "site.svpr"
    heard = robot.candidates()
    node = start({**QUICK, "map.file": str(file), "map.durable_s": 0.5})
    drive(robot, heard, images(short_street)[:20])
    robot.until(lambda: robot.status("map")[2]["saved"] == "true", 10, "a save")
    rival = subprocess.run(
        [str(NODE), "--ros-args", "-p", f"map.file:={file}"], capture_output=True, text=True, timeout=20
    )
    assert rival.returncode == 1 and f"process {node.process.pid}" in rival.stderr, rival.stderr
    node.kill()
    node = start({**QUICK, "map.file": str(file)})
    assert f"map of {len(heard)} keyframes" in node.text() and heard
    assert "did not end in order" in node.text()


def test_a_map_that_cannot_be_saved_is_told(start, robot, short_street, tmp_path):
    folder = tmp_path / "stick"
    folder.mkdir()
    heard = robot.candidates()
    node = start({**QUICK, "map.file": str(folder / "m"), "map.durable_s": 0.2})
    shutil.rmtree(folder)
    drive(robot, heard, images(short_street)[:5])
    robot.until(lambda: robot.status("map")[0] == 2, 10, "an error")
    assert "could not be saved" in robot.status("map")[1] and str(folder) in robot.status("map")[1]
    assert node.end() == 1 and "the map could not be saved" in node.text()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_in_time_even_while_images_come(start, robot, short_street, tmp_path, how):
    node = start({**QUICK, "map.file": str(tmp_path / "m"), "keyframe.min_interval_s": 0.0, "input.odometry_wait_s": 10.0})
    camera = robot.publisher(Image, "image", qos(1000))
    robot.matched(camera)
    for image in images(short_street)[:60]:
        camera.publish(image)
    robot.spin(0.5)
    assert node.end(how) == 0 and node.took < 2.0, node.took
    assert "keyframes saved" in node.text() or "nothing left" in node.text()


def test_a_calibration_gives_candidates_a_confidence(start, robot, short_street, tmp_path):
    lap, file = images(short_street)[:40], tmp_path / "m"
    heard = robot.candidates()
    node = start({**QUICK, "map.file": str(file)})
    drive(robot, heard, lap)
    assert all(math.isnan(c.confidence) for m in heard for c in m.candidates)
    assert node.end() == 0
    model = json.loads(tool("structvpr", "map", "info", "--json", file))["model"]
    inputs = ["similarity", "chain_similarity", "margin", "consistent_count", "advance_error", "lead"]
    numbers = {"mean": [0.9, 0, 0, 0, 0, 0], "scale": [0.01, 1, 1, 1, 1, 1], "weights": [1, 0, 0, 0, 0, 0], "bias": 0}
    said = {"format": "structvpr-confidence-1", "model": model["name"], "model_sha256": model["sha256"]}
    calibration = tmp_path / "site.json"
    calibration.write_text(json.dumps({**said, "verification": "", "fitted_on": "by hand", "inputs": inputs, **numbers}))
    start({**QUICK, "map.file": str(file), "publish.calibration": str(calibration)})
    again = drive(robot, heard, lap)
    first = [m.candidates[0] for m in again if m.candidates]
    assert first and all(abs(c.confidence - 1 / (1 + math.exp((0.9 - c.similarity) / 0.01))) < 1e-4 for c in first)
    assert all(math.isnan(c.confidence) for m in again for c in m.candidates[1:])
