"""What the node adds to the model's own time. Run by scripts/bench_node."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import NUMBER  # noqa: F401  (sets the domain)
from harness import ROOT, TOOLS, Process, Robot, nanoseconds

RATE, SECONDS, WIDTH, HEIGHT = 30, 60, 640, 480


def row(name, values):
    values = sorted(values)
    print(f"| {name} | {statistics.median(values):.2f} | {values[int(0.95 * len(values))]:.2f} |")


def main():
    profile = {"FASTRTPS_DEFAULT_PROFILES_FILE": str(ROOT / "config/fastdds.xml")}
    os.environ.update(profile)
    namespace = f"/bench_{os.getpid()}"
    with tempfile.TemporaryDirectory() as folder:
        # Every image that is not too soon becomes a keyframe, so that each describes, searches, decides and publishes.
        params = {"keyframe.min_descriptor_change": 0.0, "publish.diagnostics_period_s": 1.0}
        params["map.file"] = f"{folder}/map.svpr"
        made = [TOOLS / "structvpr", "bench", "--only", "pipeline", "--rounds", "3", "--keep-map", params["map.file"]]
        subprocess.run(made, check=True, stdout=subprocess.DEVNULL)
        node = Process(Path(folder) / "log", params, namespace=namespace, env=profile)
        node.wait_for("listening to")
        robot = Robot(namespace)
        heard, arrived = robot.candidates(), []
        robot.diagnostics()
        command = [sys.executable, Path(__file__).with_name("camera.py"), namespace, RATE, SECONDS, WIDTH, HEIGHT, "--wall", "--places"]
        camera = subprocess.Popen([str(c) for c in command], stdout=subprocess.DEVNULL)
        while camera.poll() is None:
            robot.executor.spin_once(timeout_sec=0.05)
            now = time.time_ns()
            arrived += [now] * (len(heard) - len(arrived))
        assert camera.returncode == 0 and heard, f"the camera or the node failed:\n{node.text()}"
        _, _, stages = robot.status("pipeline")
        _, _, images = robot.status("images of camera")
        robot.close()
        node.end()
    print(f"{len(heard)} keyframes of {images['received']} images ({WIDTH}x{HEIGHT} rgb8, {RATE} Hz), {images['dropped']} dropped, "
          f"a map of 10 000 before the first, {os.cpu_count()} cores; milliseconds\n")
    print("| | median | p95 |\n|---|---|---|")
    row("model (preprocessing and network)", [m.descriptor_ms for m in heard])
    row("node, image received to candidates published, less the model", [m.total_ms - m.descriptor_ms for m in heard])
    ratios = [m.total_ms / m.descriptor_ms for m in heard]
    row("image received to candidates published, to the model's time", ratios)
    outside = [(t - nanoseconds(m.header.stamp)) / 1e6 - m.descriptor_ms for t, m in zip(arrived, heard)]
    row("from the camera's publish() to the subscriber's callback over DDS, less the model", outside)
    print()
    for stage in ["queue", "decode", "odometry", "search"]:
        print(f"of which {stage}: median {stages[stage + '_ms_p50']}, p95 {stages[stage + '_ms_p95']}")


main()
