"""What this machine can do at most: memory bandwidth, and multiply-adds of matrix products at the sizes of decoding.

Bandwidth is that of reading: the sum of a buffer much larger than a cache of its own, and a product of one row with a
matrix that large, as decoding one sequence does. Products are of the backbone's widths at 1, 32 and 1,024 rows. The
floor of a decoding step is every weight read once, and two operations for every weight and row.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import gettempdir

import torch
from common import conditions, print_json, print_table

from server.adapters.injection import linear_sizes
from server.backbone import BUNDLED_BACKBONE, load_backbone

MIB = 2**20


def main() -> None:
    options = parse_options()
    if options.threads:
        torch.set_num_threads(options.threads)
    about = conditions()
    backbone = load_backbone(options.backbone, options.cache_dir)
    sizes = list(linear_sizes(backbone.model).values())
    config = backbone.model.config
    weights = sum(d_in * d_out for d_in, d_out in sizes) + config.vocab_size * config.hidden_size
    size = options.buffer_mib * MIB
    with torch.inference_mode():
        bandwidth = {
            "sum": size / seconds_of(torch.ones(size // 4).sum, options.repeats),
            "one row times a matrix": size / seconds_of(one_row(size // 4, max(sizes)[0]), options.repeats),
        }
        speed = {rows: linear_speed(rows, sizes, options.repeats) for rows in (1, 32, 1024)}
    print_table("Reading memory", ("how", "GB/s"), [(how, rate / 1e9) for how, rate in bandwidth.items()])
    print_table(
        f"All {len(sizes)} linears of the backbone in fp32, {about['threads']} threads",
        ("rows", "ms", "GFLOP/s"),
        [(rows, 1000 * seconds, rate / 1e9) for rows, (seconds, rate) in speed.items()],
    )
    read_s = 4 * weights / max(bandwidth.values())
    compute_s = 2 * 32 * weights / max(rate for _, rate in speed.values())
    print(f"\nfloor of a step in fp32: {1000 * read_s:.1f} ms to read {weights / 1e6:.0f} million weights; ", end="")
    print(f"{1000 * compute_s:.1f} ms to compute 32 rows")
    print_json(
        {
            "benchmark": "roofline",
            "conditions": about,
            "read_bytes_per_s": bandwidth,
            "linears": {str(rows): {"seconds": s, "flops_per_s": rate} for rows, (s, rate) in speed.items()},
            "floor_ms": {"read_weights": 1000 * read_s, "compute_32_rows": 1000 * compute_s},
        }
    )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default=BUNDLED_BACKBONE, help="bundled name, directory or Hugging Face id")
    parser.add_argument("--cache-dir", type=Path, default=Path(gettempdir()) / "mhr-benchmarks")
    parser.add_argument("--buffer-mib", type=int, default=1024, help="much larger than the last cache")
    parser.add_argument("--threads", type=int, help="torch's threads; its own choice by default")
    parser.add_argument("--repeats", type=int, default=7)
    return parser.parse_args()


def one_row(numbers: int, width: int) -> Callable[[], object]:
    matrix, row = torch.ones(numbers // width, width), torch.ones(width)
    return lambda: matrix @ row


def linear_speed(rows: int, sizes: list[tuple[int, int]], repeats: int) -> tuple[float, float]:
    """(seconds of one pass through all linears, operations per second); weights are distinct, as in the model."""
    layers = [(torch.randn(rows, d_in), torch.nn.Linear(d_in, d_out, bias=False)) for d_in, d_out in sizes]
    seconds = seconds_of(lambda: [linear(x) for x, linear in layers], repeats)
    return seconds, 2 * rows * sum(d_in * d_out for d_in, d_out in sizes) / seconds


def seconds_of(work: Callable[[], object], repeats: int) -> float:
    """The median, after one run that does not count."""
    runs = []
    for _ in range(repeats + 1):
        start_s = time.perf_counter()
        work()
        runs.append(time.perf_counter() - start_s)
    return statistics.median(runs[1:])


if __name__ == "__main__":
    main()
