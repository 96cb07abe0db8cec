"""The adaptation worker as a process: its store, its own copy of the backbone, and its signals."""

from __future__ import annotations

import os
import signal
import socket
import threading
from contextlib import closing

import torch

from adapters_store.store import Store
from server.adapters.cache import AdapterCache
from server.adapters.injection import linear_sizes
from server.backbone import Backbone, load_backbone, training_dtype
from server.inventories import bundled_names
from server.logs import get_logger
from server.settings import Settings
from server.tasks import TaskCatalog
from server.training.worker import Worker

log = get_logger(__name__)


def run(settings: Settings) -> None:
    """Work on jobs until SIGTERM or SIGINT; a job in hand goes back to the queue with its checkpoint."""
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    if settings.worker_threads is not None:
        torch.set_num_threads(settings.worker_threads)
    with closing(Store.open(settings.data_dir, settings.database())) as store:
        worker_id = f"{socket.gethostname()}-{os.getpid()}"
        log.info("waiting for jobs", action="worker.ready", worker=worker_id)
        Worker(store, lambda: load_for_jobs(settings, store), worker_id).run(stopping)
    log.info("the worker stopped", action="worker.stop", worker=worker_id)


def load_for_jobs(settings: Settings, store: Store) -> tuple[Backbone, TaskCatalog]:
    """The backbone and the tasks, loaded when the first job comes."""
    backbone = load_backbone(settings.backbone, settings.data_dir, settings.device, training_dtype(settings.device))
    catalog = TaskCatalog(
        store,
        AdapterCache(0),  # a job looks at one adapter once
        backbone,
        linear_sizes(backbone.model),
        preferred_inventories=[settings.inventory] if settings.inventory else bundled_names(),
    )
    return backbone, catalog
