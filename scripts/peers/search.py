"""faiss IndexFlatIP as a peer of `structvpr bench`: one query per line read, seconds per line written.

Usage: search.py DIR THREADS, with DIR/rows.npy (N x D f32) and DIR/query.npy (1 x D).
Writes the 20 best rows to DIR/ids.txt.
"""
import sys
import time

import faiss
import numpy as np

folder, threads = sys.argv[1], int(sys.argv[2])
faiss.omp_set_num_threads(threads)
rows = np.load(f"{folder}/rows.npy")
query = np.load(f"{folder}/query.npy")
index = faiss.IndexFlatIP(rows.shape[1])
index.add(rows)
del rows
_, ids = index.search(query, 20)
with open(f"{folder}/ids.txt", "w") as out:
    out.write(" ".join(str(i) for i in ids[0]))
print("ready", flush=True)
for _ in sys.stdin:
    began = time.perf_counter()
    index.search(query, 20)
    print(time.perf_counter() - began, flush=True)
