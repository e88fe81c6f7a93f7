"""Python ends while the explorer is at work: in order, whatever runs, and on a busy machine"""
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest


@pytest.fixture
def busy():
    "Two loops that keep two cores busy, until the test ends or whoever runs it is gone"
    loop = f"import os\nwhile os.getppid() == {os.getpid()}: pass"
    loops = [subprocess.Popen([sys.executable, "-c", loop]) for _ in range(2)]
    yield
    for process in loops:
        process.kill()
        process.wait()


OPEN = """
import sys, time
from transporter_nb.explain.transporter import Transporter
from transporter_nb.app.widgets import Explorer

explorer = Explorer(l2v=Transporter.load("phi4"))
"""
FEW = """
from transporter_nb.app import clips
clips.stops = lambda step: [0., 1.5]
""" # clips are made ahead before the work that is meant begins
AT_WORK = { # what runs when Python ends
    "clips": "time.sleep(1)",
    "certificate": "assert explorer.maker.join(600); explorer.certify(); time.sleep(.3)",
    "learning": """
assert explorer.maker.join(600)
explorer.set.word.value, explorer.set.into.value = "stone", "snowy"
explorer.add()
import psutil
until = time.monotonic() + 200
while not psutil.Process().children() and time.monotonic() < until: time.sleep(.05)
time.sleep(1)
print(*[child.pid for child in psutil.Process().children()])
""",
    "long job": """
import torch
def job():
    values, until = torch.eye(300), time.monotonic() + 8
    while time.monotonic() < until: values = torch.tanh(values @ values)
assert explorer.maker.join(600)
explorer.desk.ask(job)
time.sleep(.5)
""",
}


def end_while(work:str, folder:Path) -> subprocess.CompletedProcess:
    "A Python of its own that opens an explorer and ends while it works"
    before = "" if work == "clips" else FEW
    ended = subprocess.run([sys.executable, "-c", before + OPEN + AT_WORK[work] + "\nprint('end')"],
                           capture_output=True, text=True, timeout=900, cwd=folder)
    assert ended.returncode == 0, f"status {ended.returncode}: {ended.stderr[-500:]}"
    assert ended.stdout.split()[-1] == "end"
    assert not ended.stderr.strip(), ended.stderr[-2000:]
    return ended


@pytest.mark.parametrize("turn", range(3)) # how threads take turns is a matter of chance
def test_python_ends_in_order_while_clips_are_made(turn, busy, tmp_path):
    end_while("clips", tmp_path)


def test_python_waits_for_a_job_however_long_it_takes(tmp_path):
    end_while("long job", tmp_path)


def test_python_ends_in_order_while_a_certificate_is_made(busy, tmp_path):
    end_while("certificate", tmp_path)


def test_python_ends_in_order_while_a_concept_is_learned(busy, tmp_path):
    children = end_while("learning", tmp_path).stdout.split()[:-1]
    assert children, "the concept was not being learned"
    assert not any(psutil.pid_exists(int(child)) for child in children)
