"""faiss IndexFlatIP as a peer of `structvpr bench`: one round per line read, seconds per line written.

Usage: search.py DIR one|batch THREADS, with DIR/rows.f32 (N x 448) and DIR/queries.f32 (Q x 448): a round takes the next query, or
all of them. Writes the 20 best rows of each query to a line of DIR/ids.txt.
"""
import sys
import time

import faiss
import numpy as np

folder, what, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
faiss.omp_set_num_threads(threads)
queries = np.fromfile(f"{folder}/queries.f32", np.float32).reshape(-1, 448)
index = faiss.IndexFlatIP(448)
rows = np.memmap(f"{folder}/rows.f32", np.float32).reshape(-1, 448)
for at in range(0, len(rows), 100_000):
    index.add(np.ascontiguousarray(rows[at : at + 100_000]))
del rows
_, ids = index.search(queries, 20)
with open(f"{folder}/ids.txt", "w") as out:
    out.writelines(" ".join(str(i) for i in row) + "\n" for row in ids)
print("ready", flush=True)
for i, _ in enumerate(sys.stdin):
    query = queries if what == "batch" else queries[i % len(queries)][None]
    began = time.perf_counter()
    index.search(query, 20)
    print(time.perf_counter() - began, flush=True)
