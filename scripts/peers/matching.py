"""OpenCV's BFMatcher with crossCheck as a peer of `structvpr bench`.

Usage: matching.py DIR THREADS, with DIR/query.npy and DIR/reference.npy (unit rows). Writes DIR/matches.txt: pairs.
"""
import sys
import time

import cv2
import numpy as np

folder, threads = sys.argv[1], int(sys.argv[2])
cv2.setNumThreads(threads)
q, r = (np.load(f"{folder}/{n}.npy").astype(np.float32) for n in ("query", "reference"))
matcher = cv2.BFMatcher(cv2.NORM_L2, crossCheck=True)
with open(f"{folder}/matches.txt", "w") as f:
    f.writelines(f"{m.queryIdx} {m.trainIdx}\n" for m in matcher.match(q, r))
print("ready", flush=True)
for _ in sys.stdin:
    began = time.perf_counter()
    matcher.match(q, r)
    print(time.perf_counter() - began, flush=True)
