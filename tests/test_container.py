"""Files that are whole or absent, and refused when they are anything else."""

import json
import struct
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import peftlib
from peftlib import LoRA, PeftlibError
from peftlib.container import read, write
from peftlib.errors import CheckpointError


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


@pytest.fixture(params=["plain", "optimizer"])
def file(tmp_path, request):
    path = tmp_path / "t.safetensors"
    base = model()
    tuning = peftlib.attach(base, LoRA(rank=1), targets=["0"])
    with torch.no_grad():
        for p in tuning.parameters():
            p.normal_()
    optimizer = torch.optim.Adam(tuning.parameters())
    base(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    tuning.save(path, optimizer=optimizer if request.param == "optimizer" else None)
    return path


def refused(path, match=None):
    fresh = model()
    before = {k: v.clone() for k, v in fresh.state_dict().items()}
    shape = repr(fresh)
    with pytest.raises(CheckpointError, match=match):
        peftlib.load(fresh, path)
    assert repr(fresh) == shape
    assert not peftlib.tunings(fresh)
    assert all(torch.equal(v, before[k]) for k, v in fresh.state_dict().items())
    assert all(p.requires_grad for p in fresh.parameters())


def rewrite(path, change):
    """The file with its header changed by ``change(header)`` and written back without a new checksum."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    change(header)
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data[8 + size :])


def test_every_flipped_byte_is_refused(file):
    data = file.read_bytes()
    for i in range(len(data)):
        broken = bytearray(data)
        broken[i] ^= 1 << (i % 8)
        file.write_bytes(broken)
        with pytest.raises(CheckpointError):
            read(file)
    file.write_bytes(data)
    read(file)


def test_every_truncation_is_refused(file):
    data = file.read_bytes()
    for size in (0, 1, 7, 8, 9, 64, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:size])
        refused(file, "no readable tuning file")
    file.write_bytes(data + b"x")
    refused(file)


def test_what_is_wrong_is_named(file, tmp_path):
    refused(tmp_path / "absent.safetensors", "no file")
    refused(tmp_path, "is a directory")
    data = file.read_bytes()

    file.write_bytes(struct.pack("<Q", 2**60) + data[8:])
    refused(file, "no readable tuning file")
    file.write_bytes(data)
    rewrite(file, lambda h: h["__metadata__"].update(version="2"))
    refused(file, "format version '2'")
    file.write_bytes(data)
    rewrite(file, lambda h: h["__metadata__"].update(format="other"))
    refused(file, "not of a peftlib tuning")
    file.write_bytes(data)
    rewrite(file, lambda h: h["__metadata__"].update(tuning="{}"))
    refused(file, "checksum")


def forged(path, about, tensors):
    """A file with a right checksum and a wrong content: what an attacker or a later version would write."""
    write(path, tensors, about)
    return path


def test_hostile_plans_are_refused_without_allocating(file, tmp_path):
    about, tensors = read(file)
    site = about["plan"][0]["sites"]
    path = tmp_path / "forged.safetensors"

    def with_plan(**part):
        return {**about, "plan": [{**about["plan"][0], **part}]}

    for wrong, match in [
        (with_plan(method="os.system"), "which this program does not have"),
        (with_plan(method="Method"), None),
        (with_plan(config={"rank": 1, "evil": 1}), "unknown setting"),
        (with_plan(config={"rank": "1"}), None),
        (with_plan(config={"rank": 10**12}), "shape"),
        (with_plan(config={"rank": 1, "dtype": "torch.load"}), "dtype"),
        (
            with_plan(method="Adapter", config={"dim": 10**12}, sites={"0": {"in": 4, "out": 4, "axis": -1}}),
            "shape|missing",
        ),
        (with_plan(sites={"nowhere": {}}), "nowhere"),
        (with_plan(sites=[1]), None),
        ({**about, "plan": "x"}, None),
        ({**about, "base": {}}, "another base"),
        ({**about, "base": 3}, None),
        ({"plan": []}, None),
        ({**about, "name": "a.b"}, "name"),
    ]:
        forged(path, wrong, tensors)
        fresh = model()
        with pytest.raises(PeftlibError, match=match):
            peftlib.load(fresh, path)
        assert not peftlib.tunings(fresh)
    key = next(iter(tensors))
    for changed in (
        {k: v for k, v in tensors.items() if k != key},
        {**tensors, "more": torch.zeros(1)},
        {**tensors, key: torch.zeros(7)},
    ):
        refused(forged(path, about, changed), "missing|unexpected|shape")
    assert site == {"0": {}}


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
        max_leaves=12,
    )
)
@settings(max_examples=60, deadline=None)
def test_any_description_is_refused_with_the_libraries_own_error(tmp_path_factory, anything):
    path = tmp_path_factory.mktemp("h") / "t.safetensors"
    for about in (anything, {"name": "x", "plan": anything, "base": anything}):
        write(path, {"a": torch.zeros(2)}, about)
        with pytest.raises(PeftlibError):
            peftlib.load(model(), path)


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_any_bytes_are_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("h") / "t.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError):
        read(path)


def test_a_tuning_that_changes_while_it_is_saved_makes_a_whole_file(tmp_path, monkeypatch):
    tensors = {"a": torch.zeros(1000), "b": torch.zeros(1000)}
    plain = zlib.crc32

    def summed_and_trained_on(*args):
        total = plain(*args)
        for t in tensors.values():
            t.add_(1)
        return total

    monkeypatch.setattr(zlib, "crc32", summed_and_trained_on)
    write(tmp_path / "t.safetensors", tensors, {})
    monkeypatch.undo()
    _, found = read(tmp_path / "t.safetensors")
    assert all(bool((t == t[0]).all()) for t in found.values())


def test_permissions_are_those_of_any_new_file(tmp_path):
    write(tmp_path / "a", {"x": torch.zeros(1)}, {})
    (tmp_path / "b").write_bytes(b"")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_a_base_on_meta_gets_a_tuning_with_values(file):
    with torch.device("meta"):
        empty = model()
    tuning = peftlib.load(empty, file)
    assert {p.device.type for p in tuning.parameters()} == {"cpu"}
    loaded = peftlib.load(model(), file)
    for a, b in zip(tuning.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b)


def test_loading_draws_no_random_numbers(file):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    fresh = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    after = torch.get_rng_state()
    assert not torch.equal(before, after)
    peftlib.load(fresh, file)
    assert torch.equal(torch.get_rng_state(), after)
