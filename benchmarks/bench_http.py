"""The server over HTTP: many tasks in one batch, waiting, memory, and peers on the same work.

Every server under test is started here, on a data directory of its own with a random inventory and tasks routed over
it; the load comes from a process of its own. What is compared runs in turns within this one run, and a ratio is the
median over neighbouring runs. Every request has exactly the asked number of tokens in and out. Scenarios:
  mixed       32 requests at once, 32 tasks, against no adapter
  many        1,000 tasks against 32; room for 64 adapters against room for all; Zipf
  merged      one task alone against no adapter
  overhead    HTTP, whole and streamed, against the engine without HTTP
  open-loop   Poisson arrivals: Zipf tasks against no adapter
  registered  the same work on servers that hold 10, 1,000 and 10,000 tasks
  memory      bytes per registered task
  cold        first token of a task never asked before
  long-prompt time between streams' tokens when a long prompt arrives
  training    the same while a job trains
  peers       vLLM (--vllm), llama.cpp's server (--llama), PEFT Poly and transformers continuous batching
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from common import conditions, print_json
from serving import latency, scenarios
from serving.house import House

from server.backbone import BUNDLED_BACKBONE

SCENARIOS: dict[str, Callable[[House], dict[str, Any]]] = {
    "mixed": scenarios.mixed,
    "many": scenarios.many,
    "merged": scenarios.merged,
    "overhead": scenarios.overhead,
    "open-loop": scenarios.open_loop,
    "registered": scenarios.registered,
    "memory": latency.memory,
    "cold": latency.cold,
    "long-prompt": latency.long_prompt,
    "training": latency.training,
    "peers": scenarios.peers,
}


def main() -> None:
    options = parse_options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))  # so that the servers end too
    results = {}
    about = conditions()
    for name in options.scenarios:
        with House(options) as house:
            results[name] = SCENARIOS[name](house)
            settings = house.settings
    print_json({"benchmark": "http", "conditions": about, "options": settings, "results": results})


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", default=["mixed"], help="which, in this order; mixed if none is named")
    parser.add_argument("--backbone", default=BUNDLED_BACKBONE, help="bundled name, or a directory")
    parser.add_argument("--cache-dir", type=Path, default=Path(gettempdir()) / "mhr-benchmarks")
    parser.add_argument("--quantization", nargs="+", default=["none"], choices=["none", "int8"])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--clients", type=int, default=32, help="requests at once")
    parser.add_argument("--tasks", type=int, default=1000, help="where there are many")
    parser.add_argument("--registered", type=int, nargs="+", default=[10, 1000, 10000], help="numbers of tasks held")
    parser.add_argument("--rate", type=float, default=1.5, help="requests per second of the open loop")
    parser.add_argument("--streams", type=int, default=8, help="streams beside a long prompt or a job")
    parser.add_argument("--stream-tokens", type=int, default=250, help="of each stream beside the long prompt")
    parser.add_argument("--long-tokens", type=int, default=1500)
    parser.add_argument("--arrival-tokens", type=int, default=80, help="of each stream before the long prompt comes")
    parser.add_argument("--skills", type=int, default=8)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=1, help="waves of every contender that do not count")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--vllm", help="vLLM's executable, in its own environment")
    parser.add_argument("--llama", help="llama.cpp's server with all its arguments, {port} where the port goes")
    parser.add_argument("--offline-peers", nargs="*", default=["peft-poly", "transformers"])
    options = parser.parse_args()
    unknown = [name for name in options.scenarios if name not in SCENARIOS]
    if unknown:
        parser.error(f"unknown scenarios {', '.join(unknown)}; there are {', '.join(SCENARIOS)}")
    return options


if __name__ == "__main__":
    main()
