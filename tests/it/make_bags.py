"""Bags written by the Python package `rosbags`: what our reader is held against.

Usage: make_bags.py DIR. Makes DIR/{mcap,db3,split,message_zstd,file_zstd,two_cameras,no_images}.
"""
import pathlib
import struct
import sys
import zlib

import numpy as np
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

store = get_typestore(Stores.ROS2_HUMBLE)
T = store.types


def header(i):
    return T["std_msgs/msg/Header"](stamp=T["builtin_interfaces/msg/Time"](sec=100 + i, nanosec=5), frame_id="cam")


def png(rgb):
    h, w, _ = rgb.shape
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    rows = b"".join(b"\0" + row.tobytes() for row in rgb)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def picture(i):
    y, x = np.mgrid[0:48, 0:64]
    return np.stack([(x * 3 + i * 40) % 256, (y * 5 + i * 20) % 256, (x * y + i) % 256], axis=-1).astype(np.uint8)


def write(path, storage, images=6, compressed=True, mode=None, second=False, with_images=True):
    with Writer(path, version=8, storage_plugin=storage) if mode is None else _compressing(path, storage, mode) as bag:
        def add(topic, name):
            return bag.add_connection(topic, name, typestore=store)

        if with_images:
            image = add("/cam/image_raw/compressed", "sensor_msgs/msg/CompressedImage") if compressed else add("/cam/image_raw", "sensor_msgs/msg/Image")
        other = add("/cam2/image_raw", "sensor_msgs/msg/Image") if second else None
        info, odom = add("/cam/camera_info", "sensor_msgs/msg/CameraInfo"), add("/odom", "nav_msgs/msg/Odometry")
        fix, pose = add("/fix", "sensor_msgs/msg/NavSatFix"), add("/ground_truth/pose", "geometry_msgs/msg/PoseStamped")

        def put(connection, message, i):
            bag.write(connection, (100 + i) * 10**9 + 7, store.serialize_cdr(message, message.__msgtype__))

        for i in range(images):
            rgb = picture(i)
            raw = T["sensor_msgs/msg/Image"](header=header(i), height=48, width=64, encoding="rgb8", is_bigendian=0, step=192, data=rgb.ravel())
            if with_images:
                if compressed:
                    put(image, T["sensor_msgs/msg/CompressedImage"](header=header(i), format="png", data=np.frombuffer(png(rgb), np.uint8)), i)
                else:
                    put(image, raw, i)
            if second:
                put(other, raw, i)
            roi = T["sensor_msgs/msg/RegionOfInterest"](x_offset=0, y_offset=0, height=0, width=0, do_rectify=False)
            put(info, T["sensor_msgs/msg/CameraInfo"](
                header=header(i), height=48, width=64, distortion_model="plumb_bob", d=np.array([0.1, 0.2, 0.0, 0.0, 0.3]),
                k=np.array([50.0, 0, 32, 0, 51, 24, 0, 0, 1]), r=np.eye(3).ravel(), p=np.zeros(12), binning_x=0, binning_y=0, roi=roi), i)
            point = T["geometry_msgs/msg/Point"](x=float(i), y=2.0 * i, z=0.5)
            q = T["geometry_msgs/msg/Quaternion"](x=0.0, y=0.0, z=0.6, w=0.8)
            p = T["geometry_msgs/msg/Pose"](position=point, orientation=q)
            v = T["geometry_msgs/msg/Vector3"](x=0.0, y=0.0, z=0.0)
            put(odom, T["nav_msgs/msg/Odometry"](
                header=header(i), child_frame_id="base", pose=T["geometry_msgs/msg/PoseWithCovariance"](pose=p, covariance=np.zeros(36)),
                twist=T["geometry_msgs/msg/TwistWithCovariance"](twist=T["geometry_msgs/msg/Twist"](linear=v, angular=v), covariance=np.zeros(36))), i)
            put(pose, T["geometry_msgs/msg/PoseStamped"](header=header(i), pose=p), i)
            status = T["sensor_msgs/msg/NavSatStatus"](status=0, service=1)
            put(fix, T["sensor_msgs/msg/NavSatFix"](
                header=header(i), status=status, latitude=52.0 + i * 1e-5, longitude=13.0, altitude=30.0, position_covariance=np.zeros(9),
                position_covariance_type=0), i)


def _compressing(path, storage, mode):
    writer = Writer(path, version=8, storage_plugin=storage)
    writer.set_compression(mode, CompressionFormat.ZSTD)
    return writer


out = pathlib.Path(sys.argv[1])
write(out / "mcap", StoragePlugin.MCAP)
write(out / "db3", StoragePlugin.SQLITE3, compressed=False)
write(out / "message_zstd", StoragePlugin.SQLITE3, mode=CompressionMode.MESSAGE)
write(out / "file_zstd", StoragePlugin.SQLITE3, mode=CompressionMode.FILE)
write(out / "two_cameras", StoragePlugin.MCAP, second=True)
write(out / "no_images", StoragePlugin.MCAP, with_images=False)
