"""A merge in a process of its own: prints how much memory it took besides what the libraries take.

    python tests/one_merge.py SMALL_ADAPTER ADAPTER OUTPUT_DIR MAX_SHARD_SIZE

The small one is merged first, so that what the libraries load by the way is not counted. Counted is anonymous memory
(`RssAnon`), sampled every millisecond: pages of mapped files belong to the system, which takes them back at need.
"""

import json
import re
import sys
import threading
import time
from pathlib import Path

import torch

from qlora_dpo import merge_adapter


def anonymous_bytes() -> int:
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def main(small_adapter: str, adapter: str, output_dir: str, max_shard_size: str) -> None:
    torch.set_num_threads(1)
    merge_adapter(small_adapter, f"{output_dir}-small")
    before, peak, done = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], anonymous_bytes())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    report = merge_adapter(adapter, output_dir, max_shard_size=max_shard_size)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    print(json.dumps({"taken": peak[0] - before, "written": report.total_bytes, "seconds": seconds}))


if __name__ == "__main__":
    main(*sys.argv[1:])
