"""Safetensors as such: the same files as the format's own library, and headers that lie."""

import json
import struct

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peftlib.errors import CheckpointError
from peftlib.storage import DTYPES, METADATA, Stored, encoded, laid_out, write_atomically

KINDS = {v: k for k, v in DTYPES.items()}


def store(path, tensors, metadata=None):
    entries, data = laid_out(tensors)
    write_atomically(path, encoded({METADATA: metadata or {}, **entries}), *data.values())


def some(dtype, shape):
    size = torch.Size(shape).numel() * dtype.itemsize
    bits = torch.randint(0, 2 if dtype is torch.bool else 256, (size,), dtype=torch.uint8)
    return bits.view(dtype).view(shape)


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8)


shapes = st.lists(st.integers(0, 4), max_size=3)


@given(st.lists(st.tuples(st.sampled_from(list(KINDS)), shapes), max_size=6), st.randoms())
@settings(max_examples=80)
def test_what_is_written_is_what_the_formats_own_library_reads_and_back(tmp_path_factory, kinds, random):
    path = tmp_path_factory.mktemp("s") / "t.safetensors"
    tensors = {f"n{i}.{'é' * i}": some(dtype, shape) for i, (dtype, shape) in enumerate(kinds)}
    store(path, tensors, {"about": "x"})
    theirs = safetensors.torch.load_file(path)
    assert theirs.keys() == tensors.keys()
    safetensors.torch.save_file(tensors, path.with_name("theirs"), {"about": "y"})
    for file, about in ((path, "x"), (path.with_name("theirs"), "y")):
        with Stored(file) as stored:
            assert stored.metadata == {"about": about}
            names = list(tensors)
            random.shuffle(names)
            ours = stored.read(names)
            assert list(ours) == names
            some_of_them = stored.read(names[1::2])
        for name, tensor in tensors.items():
            for other in (theirs[name], ours[name], some_of_them.get(name, tensor)):
                assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape)
                assert torch.equal(bits(other), bits(tensor))
            assert ours[name].untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).view(3, 4).T,
        torch.arange(12.0)[::3],
        torch.ones(2, 3).expand(4, 2, 3),
        torch.tensor(3.0),
    ],
    ids=["transposed", "strided", "expanded", "scalar"],
)
def test_any_layout_is_written_in_order(tmp_path, tensor):
    store(tmp_path / "t", {"a": tensor, "again": tensor})
    assert torch.equal(safetensors.torch.load_file(tmp_path / "t")["a"], tensor)


def test_what_the_format_has_no_name_for_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"'a' is torch.complex128, for which"):
        store(tmp_path / "t", {"a": torch.zeros(2, dtype=torch.complex128)})
    assert not list(tmp_path.iterdir())


def test_another_byte_order_is_refused(tmp_path, monkeypatch):
    store(tmp_path / "t", {"a": torch.zeros(2)})
    monkeypatch.setattr("sys.byteorder", "big")
    with pytest.raises(ValueError, match="little-endian"):
        Stored(tmp_path / "t")
    with pytest.raises(CheckpointError, match="little-endian"):
        store(tmp_path / "u", {"a": torch.zeros(2)})


# -- headers that lie --------------------------------------------------------------------------------------------------

sizes = st.integers(-2, 20) | st.sampled_from([2**31, 2**62, 2**63, 2**64, 10**30, True, 1.0, None, "4"])
entry = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F64", "U8", "BF16", "F8_E4M3", "F4", "", 3, None]),
        "shape": st.lists(sizes, max_size=4) | sizes,
        "data_offsets": st.lists(sizes, min_size=1, max_size=3) | sizes,
        "more": st.just(1),
    },
)


@st.composite
def nearly_right(draw):
    """Entries that follow one another, of which some may then be bent."""
    header, at = {}, 0
    for i in range(draw(st.integers(0, 3))):
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        stop = at + 4 * torch.Size(shape).numel()
        header[f"t{i}"] = {"dtype": "F32", "shape": shape, "data_offsets": [at, stop]}
        at = stop
    if header and draw(st.booleans()):
        bent = header[draw(st.sampled_from(sorted(header)))]
        field = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        bent[field] = draw(entry.filter(lambda e: field in e))[field]
    if draw(st.booleans()):
        header[METADATA] = draw(
            st.dictionaries(st.text(max_size=3), st.text(max_size=3) | st.integers(), max_size=2)
        )
    return header, at + draw(st.sampled_from([0, 0, 0, 1, -1]))


@given(
    nearly_right() | st.tuples(st.dictionaries(st.text(max_size=3), entry, max_size=3), st.integers(0, 40))
)
@settings(max_examples=400)
def test_a_header_is_believed_as_far_as_the_formats_own_library_does_and_the_file_bears_it_out(
    tmp_path_factory, made
):
    header, size = made
    path = tmp_path_factory.mktemp("s") / "t.safetensors"
    data = bytes(range(1, 1 + max(size, 0)))
    path.write_bytes(encoded(header) + data)
    try:
        theirs = safetensors.torch.load(path.read_bytes())
    except (safetensors.SafetensorError, ValueError, RuntimeError, OverflowError, KeyError, TypeError):
        theirs = None
    try:
        with Stored(path) as stored:
            allocated = sum(e.stop - e.start for e in stored.entries.values())
            ours = stored.read(stored.entries)
    except (ValueError, RuntimeError):
        ours = None
    if ours is None:
        assert theirs is None, header
        return
    assert allocated == sum(t.untyped_storage().nbytes() for t in ours.values()) == len(data)
    assert theirs is not None, header
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(bits(ours[k]), bits(t)) for k, t in theirs.items())


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "0 bytes"),
        (struct.pack("<Q", 2**63) + b"{}", "announces a header of 9223372036854775808"),
        (struct.pack("<Q", 0) + b"{}", "announces a header of 0"),
        (struct.pack("<Q", 3) + b"{}", "announces a header of 3"),
        (struct.pack("<Q", 2) + b"[]", "its header is list"),
        (struct.pack("<Q", 2) + b"{}" + b"x", "describes 0 bytes of data, and there are 1"),
        (struct.pack("<Q", 100_000) + b"[" * 100_000, "nested too deep"),
        (struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc", "codec|decode"),
        (struct.pack("<Q", 5000) + b"[" + b"9" * 4998 + b"]", "limit"),
    ],
)
def test_what_is_wrong_with_a_header_is_said(tmp_path, data, words):
    (tmp_path / "t").write_bytes(data)
    with pytest.raises(ValueError, match=words):
        Stored(tmp_path / "t")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda h: h["a"].update(data_offsets=[8, 16]), "begin at 8, and those before end at 0"),
        (lambda h: h["a"].update(data_offsets=[0, 4]), "another number of bytes than its shape"),
        (lambda h: h["a"].update(shape=[2**62, 4]), "another number of bytes than its shape"),
        (lambda h: h["a"].update(dtype="F4"), "unknown kind 'F4'"),
        (lambda h: h["a"].update(extra=1), "dtype, shape and data_offsets alone"),
        (lambda h: h.update({METADATA: {"a": 1}}), "no object of strings"),
        (lambda h: h["b"].update(data_offsets=[0, 8]), "begin at 0, and those before end at 8"),
    ],
)
def test_what_is_wrong_with_an_entry_is_said(tmp_path, change, words):
    entries, data = laid_out({"a": torch.zeros(2), "b": torch.ones(2)})
    change(entries)
    write_atomically(tmp_path / "t", encoded(entries), *data.values())
    with pytest.raises(ValueError, match=words):
        Stored(tmp_path / "t")


def test_a_name_that_stands_twice_is_refused(tmp_path):
    one = json.dumps({"dtype": "U8", "shape": [1], "data_offsets": [0, 1]})
    header = f'{{"a":{one},"a":{one}}}'.encode()
    (tmp_path / "t").write_bytes(struct.pack("<Q", len(header)) + header + b"x")
    with pytest.raises(ValueError, match="stands in its header twice"):
        Stored(tmp_path / "t")
