"""The scenarios that compare tokens per second. Every one says which ratios it wants; `compare` does the rest."""

from __future__ import annotations

from typing import Any

from serving.house import House
from serving.peers import VLLM, LlamaServer
from serving.targets import Offline, Ours, Quantization
from serving.waves import Contender, Ratio, Target, compare
from serving.workload import Workload

Result = dict[str, Any]
MIB = 2**20
VLLM_NAME = "vLLM, a LoRA per request"
NO_LIMIT = ("MHR_ADAPTER_CACHE_MB", "1000000")


def mixed(house: House) -> Result:
    """Requests at once, each with its own task, against the same without adapters."""
    clients = house.options.clients
    ratios = []
    for q in house.options.quantization:
        server = Ours(q, registered=clients)
        bare = Contender(f"no adapter{suffix(q)}", server, Workload(clients))
        each = Contender(f"{clients} tasks{suffix(q)}", server, Workload(clients, tasks=clients))
        ratios.append(Ratio(each, bare, at_least=0.85 if q == "none" else 0.8))
    return compare(house, ratios)


def many(house: House) -> Result:
    """A thousand tasks against 32, with room for all adapters and with room for 64; uniform and Zipf."""
    clients, tasks = house.options.clients, house.options.tasks
    budget = ("MHR_ADAPTER_CACHE_MB", str(64 * house.adapter_bytes // MIB + 1))
    ratios = []
    for q in house.options.quantization:
        roomy = Ours(q, tasks, (NO_LIMIT,), warm_tasks=tasks)
        few = Contender(f"{clients} tasks{suffix(q)}", roomy, Workload(clients, tasks=clients))
        uniform = Workload(clients, tasks=tasks, popularity="uniform")
        all_tasks = Contender(f"{tasks} tasks{suffix(q)}", roomy, uniform)
        small = Contender(f"{tasks} tasks, budget for 64{suffix(q)}", Ours(q, tasks, (budget,)), uniform)
        zipf = Contender(
            f"{tasks} tasks, Zipf{suffix(q)}", small.target, Workload(clients, tasks=tasks, popularity="zipf")
        )
        ratios += [Ratio(all_tasks, few, 0.95), Ratio(small, all_tasks, 0.9), Ratio(zipf, small)]
    return compare(house, ratios)


def merged(house: House) -> Result:
    """One request after another of one task, whose adapter is merged into a copy of the weights."""
    ratios = []
    for q in house.options.quantization:
        server = Ours(q)
        bare = Contender(f"one request, no adapter{suffix(q)}", server, Workload(1))
        one = Contender(f"one request of one task{suffix(q)}", server, Workload(1, tasks=1))
        ratios.append(Ratio(one, bare, at_least=0.98))
    return compare(house, ratios)


def overhead(house: House) -> Result:
    """The server over HTTP against the engine in a loop of its own, whole answers and streams."""
    clients = house.options.clients
    ratios = []
    for q in house.options.quantization:
        work = Workload(clients, tasks=clients)
        server = Ours(q, registered=clients)
        offline = Contender(f"engine offline{suffix(q)}", Offline("engine", q, clients), work)
        whole = Contender(f"HTTP{suffix(q)}", server, work)
        streams = Contender(f"HTTP, streamed{suffix(q)}", server, Workload(clients, tasks=clients, stream=True))
        ratios += [Ratio(whole, offline, 0.95), Ratio(streams, offline, 0.95)]
    return compare(house, ratios)


def registered(house: House) -> Result:
    """The same ten tasks asked of servers that hold ten, a thousand and ten thousand: flat."""
    ratios = []
    for q in house.options.quantization:
        work = Workload(house.options.clients, tasks=house.options.registered[0])
        few, *more = (
            Contender(f"{count} registered{suffix(q)}", Ours(q, count), work) for count in house.options.registered
        )
        ratios += [Ratio(contender, few) for contender in more]
    return compare(house, ratios)


def open_loop(house: House) -> Result:
    """Poisson arrivals, whatever is still being answered: no adapter, and the same arrivals over Zipf tasks."""
    clients, tasks, rate = house.options.clients, house.options.tasks, house.options.rate
    ratios = []
    for q in house.options.quantization:
        server = Ours(q, tasks)
        bare = Contender(f"no adapter, {rate:g}/s{suffix(q)}", server, Workload(clients, rate_per_s=rate, stream=True))
        zipf = Workload(clients, tasks=tasks, popularity="zipf", rate_per_s=rate, stream=True)
        ratios.append(Ratio(Contender(f"{tasks} tasks, Zipf, {rate:g}/s{suffix(q)}", server, zipf), bare))
    return compare(house, ratios)


def peers(house: House) -> Result:
    """Others on the same work: vLLM with a LoRA per request, PEFT Poly, transformers, llama.cpp with one request."""
    options, clients = house.options, house.options.clients
    each, bare = Workload(clients, tasks=clients), Workload(clients)
    ours: dict[Quantization, Contender] = {
        q: Contender(f"ours, {clients} tasks{suffix(q)}", Ours(q, clients), each) for q in options.quantization
    }
    ratios = []
    for name, target, work in installed_peers(house):
        theirs = Contender(name, target, each if work else bare)
        ratios += [Ratio(mine, theirs, vllm_target(name, q)) for q, mine in ours.items()]
    if options.llama:
        llama = Contender("llama.cpp, one request", LlamaServer(options.llama), Workload(1))
        one = Contender("ours, int8, one request", Ours("int8", clients), Workload(1, tasks=1))
        ratios.append(Ratio(one, llama, at_least=1.0))
    return compare(house, ratios) if ratios else {"skipped": "no peer was given"}


def installed_peers(house: House) -> list[tuple[str, Target, bool]]:
    """(name, target, whether every request has a task of its own); a word for each that is left out."""
    options, clients = house.options, house.options.clients
    found: list[tuple[str, Target, bool]] = []
    if options.vllm:
        found.append((VLLM_NAME, VLLM(options.vllm, clients), True))
    else:
        print("vLLM is left out: give its executable with --vllm")
    if not options.llama:
        print("llama.cpp is left out: give its server's command with --llama")
    if "peft-poly" in options.offline_peers:
        found.append(("PEFT Poly generate, offline", Offline("peft-poly", registered=clients), True))
    if "transformers" in options.offline_peers:
        found.append(("transformers continuous batching, offline, bare", Offline("transformers"), False))
    return found


def vllm_target(name: str, quantization: Quantization) -> float | None:
    if name != VLLM_NAME:
        return None
    return 1.8 if quantization == "none" else 3.0


def suffix(quantization: Quantization) -> str:
    return "" if quantization == "none" else f", {quantization}"
