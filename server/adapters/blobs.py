"""What a task's version keeps on disk: a routing over an inventory, or an adapter of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from server.adapters.assembly import Adapter, LowRank
from server.adapters.documents import read_document, write_document
from server.errors import InvalidInput

ROUTING_FORMAT = "mhr-routing-1"
ADAPTER_FORMAT = "mhr-adapter-1"


def routing_to_bytes(logits: Tensor, inventory_digest: str, dtype: torch.dtype = torch.float16) -> bytes:
    """A routing (L, h, K), with the inventory it is over."""
    return write_document(
        ROUTING_FORMAT, {"inventory_digest": inventory_digest}, {"routing": logits.detach().cpu().to(dtype)}
    )


def routing_from_bytes(data: bytes) -> Tensor:
    """Logits (L, h, K) in fp32. Raises InvalidInput when the file is not a routing."""
    _, tensors = read_document(ROUTING_FORMAT, data)
    if "routing" not in tensors:
        raise InvalidInput("the routing file has no tensor named 'routing'")
    return tensors["routing"].float()


def adapter_to_bytes(adapter: Adapter, backbone_fingerprint: str, dtype: torch.dtype = torch.float16) -> bytes:
    """An adapter, with the backbone it is for: `<linear>.A` (d_in, r) and `<linear>.B` (r, d_out)."""
    tensors = {f"{linear}.A": pair.A.detach().cpu().to(dtype) for linear, pair in adapter.weights.items()}
    tensors |= {f"{linear}.B": pair.B.detach().cpu().to(dtype) for linear, pair in adapter.weights.items()}
    document = {
        "alpha": adapter.alpha,
        "rank": adapter.rank,
        "backbone_fingerprint": backbone_fingerprint,
        "linears": list(adapter.weights),
    }
    return write_document(ADAPTER_FORMAT, document, tensors)


def adapter_from_bytes(data: bytes) -> Adapter:
    """The adapter in fp32. Raises InvalidInput when the file is not one."""
    document, tensors = read_document(ADAPTER_FORMAT, data)
    try:
        weights = {n: LowRank(tensors[f"{n}.A"].float(), tensors[f"{n}.B"].float()) for n in document["linears"]}
        return Adapter(weights=weights, alpha=float(document["alpha"]), rank=int(document["rank"]))
    except KeyError as error:
        raise InvalidInput(f"the adapter file is incomplete: {error} is missing") from error


def adapter_fingerprint(data: bytes) -> str:
    """The fingerprint of the backbone that an adapter file is for. Raises InvalidInput when the file is not one."""
    document, _ = read_document(ADAPTER_FORMAT, data)
    return str(document.get("backbone_fingerprint"))
