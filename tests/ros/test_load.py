"""A camera at 30 Hz for a minute: nothing lost, nothing that grows."""

import os
import subprocess
import sys
import time
from pathlib import Path

from harness import ROOT

RATE, SECONDS = 30, 60


def test_thirty_images_a_second_for_a_minute(start, robot):
    profile = {"FASTRTPS_DEFAULT_PROFILES_FILE": str(ROOT / "config/fastdds.xml")}
    # Without the gate for what did not change: how many of these waves differ enough would be chance.
    start({"keyframe.min_descriptor_change": 0.0}, env=profile)
    heard = robot.candidates()
    robot.diagnostics()
    command = [sys.executable, Path(__file__).with_name("camera.py"), start.namespace, RATE, SECONDS, 640, 480]
    camera = subprocess.Popen([str(c) for c in command], env={**os.environ, **profile}, stdout=subprocess.PIPE, text=True)
    memory, queue = [], []
    began = time.monotonic()
    while camera.poll() is None:
        robot.spin(1.0)
        memory.append((time.monotonic() - began, float(robot.status("map")[2]["memory_mib"])))
        queue.append(int(robot.status("images of camera")[2]["queue"]))
    assert camera.returncode == 0
    robot.spin(1.0)
    _, _, values = robot.status("images of camera")
    settled = [m for t, m in memory if t > 15]
    print(
        f"\n{camera.stdout.read().strip()}: {values['received']} received, {values['dropped']} dropped by the queue, {len(heard)} keyframes, "
        f"queue at most {values['queue_max']}, memory {settled[0]:.0f} MiB after 15 s, {settled[-1]:.0f} MiB at the end"
    )
    _, _, stages = robot.status("pipeline")
    print("  " + ", ".join(f"{k[:-7]} {v}" for k, v in stages.items() if k.endswith("_ms_p50")) + " (medians, ms)")
    assert values["received"] == str(RATE * SECONDS)
    assert int(values["queue_max"]) <= 4 and max(queue) <= 4
    # That many are keyframes shows that images were worked on.
    assert len(heard) > 50
    # A keyframe takes its descriptor and a thumbnail, some 20 KiB; anything more is a leak.
    assert settled[-1] - settled[0] < 20.0, memory
