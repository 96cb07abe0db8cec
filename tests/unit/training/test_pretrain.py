from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from server.adapters.assembly import assemble
from server.adapters.injection import inject
from server.adapters.inventory import Inventory
from server.adapters.routing import routing_weights
from server.backbone import Backbone
from server.errors import InvalidInput
from server.training.batches import collate
from server.training.optimizers import OptimizerName
from server.training.pretrain import PretrainProgress, make_learner, pretrain
from server.training.pretrain_config import PretrainConfig, PretrainMethod, choose_layout
from server.training.pretrain_data import load_data
from server.training.run_folder import read_log
from server.training.trainer import StepLoss, Trainer, TrainerConfig


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    for task, answer in (("say-x", "x"), ("say-y", "y")):
        rows = [{"input": f"{i}", "output": answer, "instruction": f"Say {answer}."} for i in range(10)]
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _config(data: Path, out: Path, **changes: object) -> PretrainConfig:
    layout = choose_layout(None, 2, 2)
    trainer = TrainerConfig(steps=10, adapter_lr=1e-2)
    settings = {"layout": layout, "rank": 2, "batch_size": 4, "checkpoint_every": 3, "trainer": trainer, **changes}
    return PretrainConfig(data, out, **settings)


def test_learns_an_inventory_with_the_tasks_routings_and_a_card(backbone: Backbone, data: Path, tmp_path: Path) -> None:
    path = pretrain(_config(data, tmp_path / "out"), backbone)
    assert path is not None
    inventory = Inventory.from_bytes(path.read_bytes())
    assert inventory.backbone_fingerprint == backbone.fingerprint
    assert (inventory.num_skills, inventory.num_heads, inventory.rank) == (2, 2, 2)
    assert inventory.tasks["say-x"].instruction == "Say x."
    assert list(inventory.routings) == ["say-x", "say-y"]
    training = inventory.training
    assert all(training["validation_after"][task] < training["validation_before"][task] for task in inventory.tasks)
    card = (tmp_path / "out" / "card.md").read_text()
    assert "mhr pretrain --data DATA --out OUT --steps 10" in card
    assert "| say-x |" in card


def test_skills_are_moved_apart_and_make_the_same_adapters(backbone: Backbone, data: Path, tmp_path: Path) -> None:
    close, apart = (
        Inventory.from_bytes(path.read_bytes())
        for spread in (1.0, 4.0)
        if (path := pretrain(_config(data, tmp_path / f"{spread}", layout=choose_layout(None, 2, 2, spread)), backbone))
    )
    assert (close.spread, apart.spread) == (1.0, 4.0)
    for task, routing in close.routings.items():
        mine, theirs = assemble(apart, apart.routings[task]), assemble(close, routing)
        for linear, pair in theirs.weights.items():
            assert not torch.equal(apart.A[linear], close.A[linear])
            torch.testing.assert_close(mine.weights[linear].A, pair.A, rtol=0, atol=4 * 2**-8 * 0.5)
    assert "--spread 4" in (tmp_path / "4.0" / "card.md").read_text()


def test_a_stopped_run_goes_on_as_if_it_had_not_been(backbone: Backbone, data: Path, tmp_path: Path) -> None:
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    pretrain(_config(data, whole), backbone)
    asked = iter(range(100))
    assert pretrain(_config(data, halved), backbone, should_stop=lambda: next(asked) >= 4) is None
    # Steps after the last checkpoint, as a killed run would leave them in its log, are done again.
    with (halved / "log.jsonl").open("a") as log:
        log.write(json.dumps({"step": 9, "loss": 99.0, "seconds": 0.0}) + "\n")
    seen: list[PretrainProgress] = []
    pretrain(_config(data, halved), backbone, on_progress=seen.append)
    assert [progress.step for progress in seen] == [5, 6, 7, 8, 9, 10]
    assert [r.get("loss") for r in read_log(halved)] == [r.get("loss") for r in read_log(whole)]
    assert (halved / "inventory.safetensors").read_bytes() == (whole / "inventory.safetensors").read_bytes()


def test_heads_that_do_not_divide_are_refused_with_the_linears_name(
    backbone: Backbone, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInput, match=r"5 heads do not divide the linear 'model\.layers\.0\."):
        pretrain(_config(data, tmp_path / "out", layout=choose_layout(None, 5, 2)), backbone)


@pytest.mark.parametrize("method", list(PretrainMethod))
def test_every_method_is_an_inventory_that_its_card_names(
    backbone: Backbone, data: Path, tmp_path: Path, method: PretrainMethod
) -> None:
    heads = 2 if method is PretrainMethod.MHR else None
    path = pretrain(_config(data, tmp_path / "out", layout=choose_layout(method, heads)), backbone)
    assert path is not None
    inventory = Inventory.from_bytes(path.read_bytes())
    expected = {"mhr": (2, 8), "poly": (1, 8), "shared": (1, 1), "private": (1, 2)}[method]
    assert (inventory.num_heads, inventory.num_skills) == expected
    assert inventory.training["method"] == method
    assert f"--method {method}" in (tmp_path / "out" / "card.md").read_text()
    training = inventory.training
    assert all(training["validation_after"][task] < training["validation_before"][task] for task in inventory.tasks)


def test_shared_and_private_routings_are_not_trained(backbone: Backbone, data: Path, tmp_path: Path) -> None:
    for method in (PretrainMethod.SHARED, PretrainMethod.PRIVATE):
        path = pretrain(_config(data, tmp_path / method, layout=choose_layout(method)), backbone)
        assert path is not None
        inventory = Inventory.from_bytes(path.read_bytes())
        weights = [routing_weights(inventory.routings[task].float()) for task in ("say-x", "say-y")]
        if method is PretrainMethod.SHARED:
            assert all(bool((w == 1).all()) for w in weights)
        else:
            assert all(w[:, 0].tolist() == [[i == 0, i == 1]] * len(w) for i, w in enumerate(weights))


def test_a_private_skill_learns_from_its_own_task_alone(backbone: Backbone, data: Path, tmp_path: Path) -> None:
    config = _config(data, tmp_path / "out", layout=choose_layout(PretrainMethod.PRIVATE))
    learner = make_learner(config, backbone, 2)
    trainer = Trainer(backbone.model, inject(backbone.model), learner, config.trainer)
    mine = [example for example in load_data(config, backbone).train if example.task == 1][:4]
    trainer.losses(collate(mine)).mean().backward()
    for B in learner.B:
        assert B.grad is not None
        assert not B.grad[:, :, 0].any()
        assert B.grad[:, :, 1].any()


@pytest.mark.parametrize("method", [PretrainMethod.PRIVATE, PretrainMethod.POLY])
def test_private_skills_begin_alike_and_others_apart(
    backbone: Backbone, data: Path, tmp_path: Path, method: PretrainMethod
) -> None:
    learner = make_learner(_config(data, tmp_path / "out", layout=choose_layout(method)), backbone, 2)
    for A in learner.A:
        assert torch.equal(A[:, :, 0], A[:, :, 1]) == (method is PretrainMethod.PRIVATE)
        assert A[:, :, 0].any()


def test_accumulated_batches_make_the_same_inventory(backbone: Backbone, data: Path, tmp_path: Path) -> None:
    layout = choose_layout(None, 2, 2, 1.0)  # skills moved apart would be rounding moved apart
    whole = pretrain(_config(data, tmp_path / "whole", layout=layout, batch_size=8), backbone)
    parts = pretrain(_config(data, tmp_path / "parts", layout=layout, batch_size=2, accumulate=4), backbone)
    assert whole is not None
    assert parts is not None
    one, other = (Inventory.from_bytes(path.read_bytes()) for path in (whole, parts))
    for linear in one.linears:  # fp16 in the file
        torch.testing.assert_close(one.B[linear], other.B[linear], rtol=2e-3, atol=1e-5)


def test_a_run_killed_by_the_system_goes_on_with_the_same_losses(
    backbone: Backbone, tiny_folder: Path, data: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    pretrain(_config(data, whole), backbone)
    child = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from pathlib import Path
import torch
torch.set_num_threads(1)
from server.backbone import load_backbone
from server.training.pretrain import pretrain
from server.training.pretrain_config import PretrainConfig, choose_layout
from server.training.trainer import TrainerConfig
config = PretrainConfig(
    Path({str(data)!r}), Path({str(killed)!r}), layout=choose_layout(None, 2, 2), rank=2, batch_size=4,
    checkpoint_every=3, trainer=TrainerConfig(steps=10, adapter_lr=1e-2),
)
backbone = load_backbone({str(tiny_folder)!r}, Path({str(tmp_path / "cache")!r}))
pretrain(config, backbone, on_progress=lambda p: os.kill(os.getpid(), signal.SIGKILL) if p.step == 8 else None)
"""
    ended = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert [r["step"] for r in read_log(killed)][-1] == 8
    seen: list[PretrainProgress] = []
    pretrain(_config(data, killed), backbone, on_progress=seen.append)
    assert [progress.step for progress in seen] == [7, 8, 9, 10]
    assert [r.get("loss") for r in read_log(killed)] == [r.get("loss") for r in read_log(whole)]
    assert (killed / "inventory.safetensors").read_bytes() == (whole / "inventory.safetensors").read_bytes()


def test_a_finished_run_that_is_run_again_says_the_same(backbone: Backbone, data: Path, tmp_path: Path) -> None:
    path = pretrain(_config(data, tmp_path / "out"), backbone)
    assert path is not None
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert pretrain(_config(data, tmp_path / "out"), backbone) == path
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


@pytest.fixture
def begun(backbone: Backbone, data: Path, tmp_path: Path) -> Path:
    """A run stopped after seven steps, with checkpoints of six and seven."""
    asked = iter(range(100))
    assert pretrain(_config(data, tmp_path / "begun"), backbone, should_stop=lambda: next(asked) >= 7) is None
    return tmp_path / "begun"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rank": 1}, "rank was 2 and is 1"),
        ({"batch_size": 2}, "batch_size was 4 and is 2"),
        ({"layout": choose_layout(PretrainMethod.POLY, 1, 3)}, "method was mhr and is poly, skills was 2 and is 3"),
        ({"trainer": TrainerConfig(steps=11, adapter_lr=1e-2, seed=3)}, "steps was 10 and is 11, seed was 0 and is 3"),
        (
            {"trainer": TrainerConfig(steps=10, adapter_lr=1e-2, optimizer=OptimizerName.ADAFACTOR)},
            "optimizer was adamw and is adafactor",
        ),
    ],
)
def test_a_resume_with_other_settings_names_them(
    backbone: Backbone, data: Path, begun: Path, changes: dict[str, object], named: str
) -> None:
    with pytest.raises(InvalidInput, match=rf"other settings \({named}.*another folder"):
        pretrain(_config(data, begun, **changes), backbone)


def test_what_only_observes_may_change_at_a_resume(backbone: Backbone, data: Path, begun: Path) -> None:
    assert pretrain(_config(data, begun, checkpoint_every=5, alignment_every=2), backbone) is not None


def test_a_resume_with_other_data_names_the_tasks(backbone: Backbone, data: Path, begun: Path) -> None:
    (data / "say-x.jsonl").rename(data / "say-z.jsonl")
    rows = (data / "say-y.jsonl").read_text()
    (data / "say-y.jsonl").write_text(rows.replace('"y"', '"q"'))
    with pytest.raises(InvalidInput, match=r"new: say-z; missing: say-x; changed: say-y\); put them back"):
        pretrain(_config(data, begun), backbone)


@pytest.mark.parametrize("damage", [lambda data: data[:100], lambda data: data[:-1] + bytes([data[-1] ^ 1])])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_good(
    backbone: Backbone, data: Path, begun: Path, damage: Callable[[bytes], bytes]
) -> None:
    checkpoint = begun / "checkpoint.safetensors"
    checkpoint.write_bytes(damage(checkpoint.read_bytes()))
    with pytest.raises(InvalidInput, match=r"checkpoint\.safetensors is damaged: .*delete it to go on"):
        pretrain(_config(data, begun), backbone)
    checkpoint.unlink()
    seen: list[PretrainProgress] = []
    pretrain(_config(data, begun), backbone, on_progress=seen.append)
    assert seen[0].step == 7


def test_a_disk_that_fills_up_stops_the_run_and_keeps_its_checkpoint(
    backbone: Backbone, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    pretrain(_config(data, whole), backbone)
    sync = os.fsync

    def fills_up(descriptor: int) -> None:
        if (out / "log.jsonl").exists() and any(record["step"] >= 5 for record in read_log(out)):
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fills_up)
        with pytest.raises(InvalidInput, match=r"No space left on device; the checkpoint of step 3 is kept; put that"):
            pretrain(_config(data, out), backbone)
    pretrain(_config(data, out), backbone)
    assert (out / "inventory.safetensors").read_bytes() == (whole / "inventory.safetensors").read_bytes()


def test_a_log_that_went_missing_is_named(backbone: Backbone, data: Path, begun: Path) -> None:
    (begun / "log.jsonl").unlink()
    with pytest.raises(InvalidInput, match=r"cannot read the run's log .*log\.jsonl"):
        pretrain(_config(data, begun), backbone)


def test_a_loss_that_is_not_a_number_stops_the_run(
    backbone: Backbone, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = torch.tensor(float("nan"))
    monkeypatch.setattr(Trainer, "step", lambda self, *batches: StepLoss(lost, lost[None]))
    with pytest.raises(InvalidInput, match=r"the loss is nan at step .* lower learning rates; no checkpoint was"):
        pretrain(_config(data, tmp_path / "out"), backbone)


def test_alignment_is_logged_where_it_is_asked_for(backbone: Backbone, data: Path, tmp_path: Path) -> None:
    for method in PretrainMethod:
        heads = 2 if method is PretrainMethod.MHR else None
        out = tmp_path / method
        pretrain(_config(data, out, layout=choose_layout(method, heads), alignment_every=4), backbone)
        measured = {r["step"]: r["alignment"] for r in read_log(out) if "alignment" in r}
        assert list(measured) == [4, 8]
        assert all(value == 0 for value in measured.values()) == (method is PretrainMethod.PRIVATE)


def test_alignment_of_a_single_task_is_refused(backbone: Backbone, data: Path, tmp_path: Path) -> None:
    (data / "say-x.jsonl").unlink()
    with pytest.raises(InvalidInput, match="alignment is between tasks"):
        pretrain(_config(data, tmp_path / "out", alignment_every=4), backbone)


def test_an_id_that_no_server_would_import_is_refused_before_training(
    backbone: Backbone, data: Path, tmp_path: Path
) -> None:
    (data / "say-x.jsonl").rename(data / "Say X.jsonl")
    with pytest.raises(InvalidInput, match=r"Say X\.jsonl: 'Say X' is not a task id"):
        pretrain(_config(data, tmp_path / "out"), backbone)


def test_a_task_with_one_example_is_named(backbone: Backbone, data: Path, tmp_path: Path) -> None:
    (data / "one.jsonl").write_text('{"input": "a", "output": "b"}')
    with pytest.raises(InvalidInput, match=r"one\.jsonl: the task 'one' has one example"):
        pretrain(_config(data, tmp_path / "out"), backbone)


def test_an_answer_over_the_context_is_named_by_file_and_row(backbone: Backbone, data: Path, tmp_path: Path) -> None:
    with (data / "say-x.jsonl").open("a") as file:
        file.write(json.dumps({"input": "a", "output": "b" * 300}))
    with pytest.raises(InvalidInput, match=r"say-x\.jsonl, row 11 is \d+ tokens long .* the context holds 256"):
        pretrain(_config(data, tmp_path / "out"), backbone)


def test_a_place_that_cannot_be_written_stops_with_a_sentence(backbone: Backbone, data: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(InvalidInput, match=r"cannot use .*no checkpoint was written yet"):
        pretrain(_config(data, tmp_path / "out"), backbone)
