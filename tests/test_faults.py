"""What may happen while files are written and read: kills, full disks, locked folders, others who do the same."""

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import peftlib
import peftlib.hf
from peftlib import LoRA
from peftlib.container import read, write
from peftlib.errors import CheckpointError

KINDS = ["file", "directory"]


def make(value=1.0):
    """A tuning whose every number, the configured scale included, says which one it is."""
    model = nn.Sequential(nn.Linear(3, 4))
    tuning = peftlib.attach(model, {"0": LoRA(rank=1, alpha=value)}, name="t")
    with torch.no_grad():
        for p in tuning.parameters():
            p.fill_(value)
    return tuning


def save(kind, tuning, path):
    if kind == "directory":
        peftlib.hf.save(tuning, path)
    else:
        optimizer = torch.optim.SGD(tuning.parameters(), lr=0.1, momentum=0.5)
        for p in tuning.parameters():
            optimizer.state[p]["momentum_buffer"] = p.detach().clone()
        tuning.save(path, optimizer=optimizer)


def which(kind, path):
    """The value that one look at a file or directory finds, in weights, configuration and optimizer alike."""
    if kind == "directory":
        tuning = peftlib.hf.load(nn.Sequential(nn.Linear(3, 4)), path)
        alpha, tensors = tuning.sites["0"].alpha, list(tuning.parameters())
    else:
        about, state = read(path)
        alpha, tensors = about["plan"][0]["config"]["alpha"], list(state.values())
        assert len(tensors) == 4
    values = {alpha, *torch.cat([t.detach().flatten() for t in tensors]).tolist()}
    assert len(values) == 1, values
    return float(values.pop())


def run(script, *arguments):
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])


# -- kills -------------------------------------------------------------------------------------------------------------

KILLED_AT = """
import os, signal, sys
from pathlib import Path
from tests import test_faults as t

kind, path = sys.argv[1], Path(sys.argv[2])
WATCHED = {"open", "os.rename", "os.remove", "os.chmod", "os.mkdir", "os.rmdir", "tempfile.mkstemp", "tempfile.mkdtemp"}

# Whatever is imported at a first use is imported here, and does not count.
t.save(kind, t.make(1.0), path.with_name("first"))
t.which(kind, path.with_name("first"))


def killed(k, value, path):
    # A process that saves and is killed before its k-th operation on files; False if it had fewer.
    pid = os.fork()
    if pid:
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        return os.WIFSIGNALED(status)
    tuning, left = t.make(value), [k]

    def count(event, args):
        if event in WATCHED:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    t.save(kind, tuning, path)
    os._exit(0)
"""

OVER_AN_OLD_ONE = (
    KILLED_AT
    + """
k, value, going = 0, 1.0, True
t.save(kind, t.make(value), path)
while going:
    going = killed(k, value + 1, path)
    try:
        now = t.which(kind, path)
        assert now in (value, value + 1), (k, now, value)
        print("old" if now == value else "new")
        value = now
    except t.CheckpointError as error:
        assert kind == "directory" and "interrupted" in str(error), error
        print("refused")
        t.save(kind, t.make(value), path)
    k += 1
"""
)

WHERE_NONE_WAS = (
    KILLED_AT
    + """
k, going = 0, True
while going:
    place = path.with_name(f"new{k}")
    going = killed(k, 2.0, place)
    print("new" if place.exists() and t.which(kind, place) == 2.0 else "absent")
    k += 1
"""
)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("kind", KINDS)
def test_a_saver_killed_before_any_of_its_file_operations_leaves_the_old_or_the_new(kind, tmp_path):
    found = run(OVER_AN_OLD_ONE, kind, tmp_path / "saved").stdout.split()
    assert len(found) > 5
    assert found[0] == "old"
    assert found[-1] == "new"
    assert found == sorted(found, key=["old", "refused", "new"].index)
    # A directory has two files: between them it may be refused, but is never one of the old and one of the new.
    assert ("refused" in found) == (kind == "directory")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("kind", KINDS)
def test_a_saver_killed_where_nothing_was_leaves_all_or_nothing(kind, tmp_path):
    found = run(WHERE_NONE_WAS, kind, tmp_path / "saved").stdout.split()
    assert found[-1] == "new"
    assert found == sorted(found)
    assert found.count("absent") > 3


AT_ANY_MOMENT = """
import os, signal, sys, time
from pathlib import Path
from tests import test_faults as t

kind, path = sys.argv[1], Path(sys.argv[2])
t.save(kind, t.make(0.5), path)
for turn in range(12):
    seen, pid = set(), os.fork()
    if not pid:
        value = 100.0 * turn
        while True:
            value += 1
            t.save(kind, t.make(value), path)
    try:
        stop = time.monotonic() + 60
        while len(seen) < 3 and time.monotonic() < stop:
            seen.add(t.which(kind, path))
        time.sleep(turn / 1000)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if kind == "directory" and not (path / "adapter_config.json").exists():
        print("refused")
        t.save(kind, t.make(0.5), path)
    print(t.which(kind, path))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("kind", KINDS)
def test_savers_killed_at_any_moment_in_a_loop(kind, tmp_path):
    """At moments that no list of operations names, with a reader who looks on: within a write, within the system."""
    found = run(AT_ANY_MOMENT, kind, tmp_path / "saved").stdout.split()
    values = {float(v) for v in found if v != "refused"}
    assert len(values) > 2
    assert not {v for v in values if v != 0.5 and v % 100 == 0}


# -- others who do the same --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_savers_and_readers_at_once(kind, tmp_path):
    path = tmp_path / "saved"
    save(kind, make(0.5), path)
    failures, seen = [], set()

    def saver(value):
        for turn in range(12):
            save(kind, make(value + turn % 2), path)

    def reader():
        try:
            for _ in range(25):
                seen.add(which(kind, path))
        except Exception as error:  # noqa: BLE001 (shown by the assertion)
            failures.append(error)

    threads = [threading.Thread(target=saver, args=(v,)) for v in (1.0, 3.0, 5.0)]
    threads += [threading.Thread(target=reader) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert which(kind, path) in {2.0, 4.0, 6.0}
    assert seen <= {0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0}
    assert len(seen) > 1
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]
    if kind == "directory":
        assert sorted(p.name for p in path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_savers_of_one_new_directory_leave_one_of_theirs(tmp_path):
    path = tmp_path / "a" / "saved"
    start = threading.Barrier(4)

    def saver(value):
        tuning = make(value)
        start.wait()
        peftlib.hf.save(tuning, path)

    threads = [threading.Thread(target=saver, args=(v,)) for v in (1.0, 2.0, 3.0, 4.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert which("directory", path) in {1.0, 2.0, 3.0, 4.0}
    assert [p.name for p in path.parent.iterdir()] == ["saved"]


def test_a_file_replaced_while_it_is_read_is_read_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "t.safetensors"
    write(path, {"a": torch.ones(1000), "b": torch.ones(1000)}, {"n": 1})
    plain = torch.empty

    def replace_first(*args, **kwargs):
        monkeypatch.setattr(torch, "empty", plain)
        write(path, {"a": torch.zeros(7), "c": torch.zeros(1)}, {"n": 2})
        return plain(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", replace_first)
    about, tensors = read(path)
    assert about == {"n": 1}
    assert {k: t.sum().item() for k, t in tensors.items()} == {"a": 1000, "b": 1000}
    assert read(path)[0] == {"n": 2}


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "t.safetensors"
    write(path, {"a": torch.ones(1000)}, {})
    plain = torch.empty

    def shrink(*args, **kwargs):
        os.truncate(path, path.stat().st_size - 100)
        return plain(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", shrink)
    with pytest.raises(CheckpointError, match="it ends within 'a'"):
        read(path)


# -- places that refuse ------------------------------------------------------------------------------------------------


def test_unwritable_places_lose_nothing(tmp_path):
    tuning, file = make(), tmp_path / "t.safetensors"
    tuning.save(file)
    with pytest.raises(CheckpointError, match="Cannot write into"):
        tuning.save(tmp_path / "no" / "such" / "folder.safetensors")
    with pytest.raises(CheckpointError, match="Cannot write into"):
        tuning.save(file / "inside-a-file.safetensors")
    with pytest.raises(CheckpointError, match="Cannot write to"):
        peftlib.hf.save(tuning, file / "inside-a-file")
    folder = tmp_path / "folder.safetensors"
    folder.mkdir()
    with pytest.raises(CheckpointError, match="Cannot write"):
        tuning.save(folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.safetensors", "t.safetensors"]


@pytest.mark.skipif(not hasattr(os, "setuid"), reason="needs users")
@pytest.mark.parametrize("kind", KINDS)
def test_a_read_only_folder_is_refused_and_can_be_read(kind, tmp_path):
    script = """
        import os, sys
        from pathlib import Path
        from tests import test_faults as t
        kind, folder = sys.argv[1], Path(sys.argv[2])
        t.save(kind, t.make(2.0), Path(sys.argv[3]))  # imports what it needs while it may
        t.which(kind, Path(sys.argv[3]))
        if os.geteuid() == 0:
            os.setuid(65534)  # to the owner of all, every folder is writable
        path = folder / "saved"
        assert t.which(kind, path) == 1.0
        for place in (path, folder / "new"):
            try:
                t.save(kind, t.make(2.0), place)
                print("saved!")
            except t.CheckpointError as error:
                print(error)
        assert t.which(kind, path) == 1.0
    """
    # Not in pytest's own folder, which nobody else may enter.
    folder = Path(tempfile.mkdtemp())
    try:
        save(kind, make(1.0), folder / "saved")
        inside = [p for p in [folder / "saved"] if p.is_dir()]
        for place in (*inside, folder):
            place.chmod(0o555)
        said = run(script, kind, folder, tmp_path / "first").stdout
        assert said.count("Cannot write") == 2, said
        assert "saved!" not in said
    finally:
        for place in (folder, *inside):
            place.chmod(0o755)
        assert [p.name for p in folder.iterdir()] == ["saved"]
        shutil.rmtree(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_leaves_the_old_state(kind, tmp_path):
    resource = pytest.importorskip("resource")
    script = """
        import resource, signal, sys, torch, peftlib, peftlib.hf
        from pathlib import Path
        from tests import test_faults as t
        kind, folder = sys.argv[1], Path(sys.argv[2])
        big = peftlib.attach(torch.nn.Sequential(torch.nn.Linear(4000, 4000)), {"0": peftlib.LoRA(rank=64)})
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        for place in ("saved", "new"):
            try:
                t.save(kind, big, folder / place)
                print("saved!")
            except t.CheckpointError as error:
                print(error)
    """
    save(kind, make(1.0), tmp_path / "saved")
    said = run(script, kind, tmp_path).stdout
    assert said.count("Cannot write") == 2, said
    assert "saved!" not in said
    assert which(kind, tmp_path / "saved") == 1.0
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]
    if kind == "directory":
        assert len(list((tmp_path / "saved").iterdir())) == 2
    assert resource.getrlimit(resource.RLIMIT_FSIZE) == (-1, -1)


def test_a_directory_without_its_configuration_says_that_a_save_may_have_stopped(tmp_path):
    save("directory", make(1.0), tmp_path / "saved")
    config = tmp_path / "saved" / "adapter_config.json"
    assert json.loads(config.read_text())["lora_alpha"] == 1
    config.unlink()
    with pytest.raises(CheckpointError, match=r"interrupted\. Save again"):
        which("directory", tmp_path / "saved")
    save("directory", make(2.0), tmp_path / "saved")
    assert which("directory", tmp_path / "saved") == 2.0


def test_what_else_lies_in_a_directory_stays(tmp_path):
    path = tmp_path / "saved"
    path.mkdir()
    (path / "README.md").write_text("mine")
    for value in (1.0, 2.0, 2.0):
        save("directory", make(value), path)
        assert which("directory", path) == value
    assert (path / "README.md").read_text() == "mine"
    assert len(list(path.iterdir())) == 3


def test_the_content_is_on_disk_before_its_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    """What a power cut keeps cannot be tried here; the order of the calls that decide it can."""
    done = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(handle):
        found = os.fstat(handle)
        done.append(("folder", None) if stat.S_ISDIR(found.st_mode) else ("content", found.st_size))
        fsync(handle)

    def noted_replace(self, target):
        done.append(("rename", self.stat().st_size))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    path = tmp_path / "tuning.safetensors"
    save("file", make(), path)
    size = path.stat().st_size
    assert done == [("content", size), ("rename", size), ("folder", None)]
