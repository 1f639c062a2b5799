"""A camera: python camera.py NAMESPACE HZ SECONDS WIDTH HEIGHT [--wall] [--places] publishes rgb8 images, best effort, and says how many.

Stamps count from 0; with --wall they are the time of publication. The images are of one wave that moves; with --places each is
of blocks of other colours.
"""

import os
import sys
import time

import numpy as np
import rclpy
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import Image


def main():
    namespace, rate, seconds, width, height = sys.argv[1], *map(int, sys.argv[2:6])
    rclpy.init()
    node = rclpy.create_node("camera", namespace=namespace)
    camera = node.create_publisher(Image, "image", qos_profile_sensor_data)
    while camera.get_subscription_count() == 0:
        time.sleep(0.02)
    time.sleep(0.5)
    m = Image(height=height, width=width, encoding="rgb8", step=3 * width)
    m.header.frame_id = "camera"
    pixels = os.urandom(3 * width) * (height + 1)
    random = np.random.default_rng(7)
    start = time.monotonic()
    for i in range(rate * seconds):
        if "--places" in sys.argv:
            colours = random.integers(0, 256, (height // 20, width // 20, 3), np.uint8)
            m.data = colours.repeat(20, 0).repeat(20, 1).tobytes()
        else:
            # A wave that moves: no two images are alike.
            shift = 3 * (i * 7 % width)
            m.data = pixels[shift : shift + 3 * width * height]
        m.header.stamp.sec, m.header.stamp.nanosec = i // rate, i % rate * 1_000_000_000 // rate
        if "--wall" in sys.argv:
            now = time.time_ns()
            m.header.stamp.sec, m.header.stamp.nanosec = now // 1_000_000_000, now % 1_000_000_000
        camera.publish(m)
        time.sleep(max(0.0, start + (i + 1) / rate - time.monotonic()))
    print(f"{rate * seconds} images in {time.monotonic() - start:.1f} s", flush=True)
    time.sleep(1.0)
    rclpy.shutdown()


main()
