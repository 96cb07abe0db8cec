"""Run by the tests as a process of its own: `python store_child.py COMMAND DATA_DIR URL [ARGUMENT…]`.

open                     opens the store and prints "open"
claim WORKER             claims jobs until none is left, printing one id a line
die-before-commit        is killed when the blob is durable and the row not yet committed
hold-lock                takes the data directory's lock, prints "held" and waits
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from sqlalchemy import event
from sqlalchemy.engine import Engine

from adapters_store import DataDirLock, Store


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    command, data_dir, url, *arguments = sys.argv[1:]
    place = Path(data_dir)
    if command == "hold-lock":
        DataDirLock(place).acquire()
        print("held", flush=True)
        signal.pause()
    # Processes that are to collide begin together.
    sys.stdin.readline()
    with Store.open(place, url or None) as store:
        if command == "open":
            print("open")
        elif command == "claim":
            while (job := store.claim_job(arguments[0], 600)) is not None:
                print(job.id)
        elif command == "die-before-commit":
            event.listen(Engine, "commit", die)
            store.register_task(
                "t", instruction="new", defaults={}, inventory=None, metadata={}, kind="adapter", blob=b"new"
            )
        else:
            raise SystemExit(f"unknown command {command}")


if __name__ == "__main__":
    main()
