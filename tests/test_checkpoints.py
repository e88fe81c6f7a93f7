"""Nothing is lost: full disk, interrupted process, truncated, altered and missing files, resumed
training"""
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from transporter_nb.core import base as core
from transporter_nb.core.base import (
    checkpoint_path, load_checkpoint, load_training, save_checkpoint, save_training,
    seeded_generator,
)

OLD = {"weight": torch.arange(6.).reshape(2, 3)}


@pytest.fixture
def saved(tmp_path):
    return save_checkpoint(tmp_path / "part.safetensors", OLD, {"width": 3})


def assert_untouched(path):
    assert torch.equal(load_checkpoint(path).tensors["weight"], OLD["weight"])
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_round_trip(saved):
    tensors, config = load_checkpoint(saved)
    assert torch.equal(tensors["weight"], OLD["weight"]) and config == {"width": 3}


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8,
        torch.bool,
    ],
)
def test_every_type_returns_bit_for_bit(tmp_path, dtype):
    value = torch.randint(0, 2, (3, 5), generator=seeded_generator(0)).to(dtype)
    path = save_checkpoint(
        tmp_path / "x.safetensors",
        {"value": value, "scalar": value[0, 0], "view": value.T, "none": value[:0]},
    )
    for name, expected in {
        "value": value, "scalar": value[0, 0], "view": value.T, "none": value[:0],
    }.items():
        found = load_checkpoint(path).tensors[name]
        assert found.dtype == dtype and found.shape == expected.shape and torch.equal(
            found, expected,
        )


def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weight file vae.safetensors.*train_mini"):
        load_checkpoint(tmp_path / "vae.safetensors")


@pytest.mark.parametrize("kept", [0, 5, 60, -1])
def test_truncated(saved, kept):
    saved.write_bytes(saved.read_bytes()[:kept])
    with pytest.raises(ValueError, match="not a complete weight file.*git checkout"):
        load_checkpoint(saved)


def test_one_flipped_bit_in_a_weight(saved):
    content = bytearray(saved.read_bytes())
    content[-2] ^= 1
    saved.write_bytes(content)
    with pytest.raises(ValueError, match="was altered: SHA-256"):
        load_checkpoint(saved)


def test_an_altered_configuration(saved):
    saved.write_bytes(saved.read_bytes().replace(rb'width\": 3', rb'width\": 4'))
    with pytest.raises(ValueError, match="was altered: SHA-256"):
        load_checkpoint(saved)


def test_a_file_of_someone_else(tmp_path):
    save_file(OLD, str(tmp_path / "x.safetensors"))
    with pytest.raises(ValueError, match="no checksum"):
        load_checkpoint(tmp_path / "x.safetensors")


def test_a_full_disk_leaves_the_old_file(saved, monkeypatch):
    def fill_up(tensors, path, metadata=None):
        with open(path, "wb") as file: file.write(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(core, "save_file", fill_up)
    with pytest.raises(OSError, match="No space left.*untouched; free some space"):
        save_checkpoint(saved, {"weight": torch.zeros(2, 3)})
    assert_untouched(saved)


def test_a_real_limit_on_file_size_leaves_the_old_file(saved):
    script = f"""
import resource, signal, torch
from transporter_nb.core.base import save_checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try: save_checkpoint({str(saved)!r}, {{"weight": torch.zeros(300, 300)}})
except OSError as error: print("refused:", error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=600,
    )
    assert "refused: part.safetensors could not be written" in done.stdout, done.stderr[-2000:]
    assert_untouched(saved)


def test_a_killed_process_leaves_the_old_file(saved):
    script = f"""
import os, signal
from transporter_nb.core.base import write_aside
with write_aside({str(saved)!r}) as aside:
    aside.write_bytes(b"half of it")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=600).returncode == -9
    assert torch.equal(load_checkpoint(saved).tensors["weight"], OLD["weight"])


def test_checkpoint_path():
    assert checkpoint_path("vae").parts[-4:] == (
        "transporter_nb", "checkpoints", "mini", "vae.safetensors",
    )
    with pytest.raises(ValueError, match="'mini', 'paper'"):
        checkpoint_path("vae", "large")


def build():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(.5), nn.BatchNorm1d(6), nn.Linear(6, 2))
    ema = nn.Sequential(nn.Linear(4, 6), nn.Dropout(.5), nn.BatchNorm1d(6), nn.Linear(6, 2))
    ema.load_state_dict(model.state_dict())
    return model, ema, seeded_generator(1), seeded_generator(2)


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(.5, .8), amsgrad=True),
    "groups": lambda p: torch.optim.AdamW(
        [{"params": (p := list(p))[:2], "lr": 1e-3}, {"params": p[2:], "weight_decay": 0.}],
        lr=1e-2,
    ),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=.9, nesterov=True),
}


def advance(model, ema, data, noise, optimizer, schedule, steps):
    losses = []
    for _ in range(steps):
        inputs = torch.randn(8, 4, generator=data)
        loss = (model(inputs + torch.randn(8, 4, generator=noise)) - inputs[:, :2]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for average, value in zip(ema.parameters(), model.parameters()):
                average.lerp_(value, .1)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_interrupted_training_resumes_to_the_same_numbers(tmp_path, name):
    def fresh():
        parts = build()
        optimizer = OPTIMIZERS[name](parts[0].parameters())
        return *parts, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)

    whole = fresh()
    expected = advance(*whole, steps=17)

    model, ema, data, noise, optimizer, schedule = first = fresh()
    losses = advance(*first, steps=8)
    save_training(
        tmp_path / "run.safetensors", 8, model, optimizer, ema, {"data": data, "noise": noise},
        extra={"schedule": schedule.state_dict(), "losses": losses},
    )

    torch.manual_seed(99)  # a new process knows nothing of the old one
    model, ema, data, noise, optimizer, schedule = second = fresh()
    state = load_training(tmp_path / "run.safetensors")
    assert state.restore(model, optimizer, ema, {"data": data, "noise": noise}) == 8
    schedule.load_state_dict(state.extra["schedule"])
    assert state.extra["losses"] + advance(*second, steps=9) == expected
    for there, here in ((whole[0], model), (whole[1], ema)):
        assert all(
            torch.equal(there.state_dict()[key], here.state_dict()[key])
            for key in there.state_dict()
        )


def test_a_forgotten_generator_is_noticed(tmp_path):
    model, ema, data, noise = build()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    save_training(
        tmp_path / "run.safetensors", 0, model, optimizer, ema, {"data": data, "noise": noise},
    )
    with pytest.raises(
        ValueError, match=r"\['data', 'noise'\] were saved and \['data'\] were given",
    ):
        load_training(tmp_path / "run.safetensors").restore(model, optimizer, ema, {"data": data})


def test_a_weight_file_is_not_a_training(saved):
    with pytest.raises(ValueError, match="no training state"):
        load_training(saved)
