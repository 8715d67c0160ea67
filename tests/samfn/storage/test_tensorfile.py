import hashlib
import json
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from samfn.storage import tensorfile
from samfn.storage.tensorfile import DTYPES, CorruptError, read, write


def same(left, right):
    assert left.keys() == right.keys()
    return all(
        left[name].dtype == right[name].dtype
        and left[name].shape == right[name].shape
        and bytes_of(left[name]) == bytes_of(right[name])
        for name in left
    )


def bytes_of(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=8),
        st.tuples(
            st.sampled_from([*DTYPES.values()]),
            st.lists(st.integers(0, 4), max_size=3),
            st.booleans(),
        ),
        max_size=6,
    ).filter(lambda shapes: "__metadata__" not in shapes),
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=8),
        st.text(st.characters(codec="utf-8"), max_size=80),
        max_size=4,
    ).filter(lambda texts: tensorfile.DIGEST not in texts),
)
def test_what_is_written_is_read_back(tmp_path_factory, shapes, texts):
    path = tmp_path_factory.mktemp("f") / "file"
    tensors = {}
    for name, (dtype, shape, turned) in shapes.items():
        tensor = (torch.rand(shape) * 9).to(dtype)
        tensors[name] = tensor.mT if turned and tensor.ndim > 1 else tensor
    write(path, tensors, texts)
    found, read_texts = read(path)
    assert same(found, tensors)
    assert read_texts == texts
    assert same(load_file(path), tensors)


def test_tensors_that_share_memory_and_strides_are_no_matter(tmp_path):
    whole = torch.arange(24.0).view(2, 3, 2, 2)
    tensors = {
        "a": whole,
        "b": whole,
        "part": whole[1],
        "last": whole.to(memory_format=torch.channels_last),
        "expanded": torch.ones(1).expand(5),
    }
    write(tmp_path / "file", tensors, {})
    assert same(read(tmp_path / "file")[0], tensors)


def test_tensors_come_as_those_that_are_alike(tmp_path):
    tensors = {name: torch.rand(2, 3, 4, 4) for name in ("same", "shape", "dtype", "none")}
    write(tmp_path / "file", tensors, {})
    channels_last = torch.empty(2, 3, 4, 4).to(memory_format=torch.channels_last)
    like = {
        "same": channels_last,
        "shape": channels_last[:1],
        "dtype": channels_last.double(),
        "other": channels_last,
    }
    found, _ = read(tmp_path / "file", like)
    assert same(found, tensors)
    strides = {name: found[name].stride() for name in tensors}
    usual = tensors["none"].stride()
    assert strides.pop("same") == channels_last.stride()
    assert set(strides.values()) == {usual}


def test_dtypes_are_called_as_safetensors_calls_them(tmp_path):
    for name, dtype in DTYPES.items():
        save_file({"w": torch.zeros(1).to(dtype)}, tmp_path / "file")
        with (tmp_path / "file").open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            assert json.loads(file.read(length))["w"]["dtype"] == name


def test_other_dtypes_are_refused(tmp_path):
    with pytest.raises(TypeError, match=r"safetensors holds, got .*complex128"):
        write(tmp_path / "file", {"w": torch.ones(1, dtype=torch.complex128)}, {})
    assert not [*tmp_path.iterdir()]


def test_a_file_that_ends_while_it_is_read_is_refused(tmp_path):
    path = tmp_path / "file"
    write(path, {"w": torch.ones(9)}, {})

    class Cuts(dict):
        def get(self, name):
            with path.open("rb+") as file:
                file.truncate(path.stat().st_size - 1)

    with pytest.raises(CorruptError, match="it ended while it was read"):
        read(path, Cuts(w=None))


def test_the_digest_is_the_sha256_of_the_manifest(tmp_path):
    write(tmp_path / "file", {"w": torch.tensor([1.0, 2.0])}, {"note": "é"})
    inner = hashlib.sha256(struct.pack("<2f", 1, 2)).hexdigest()
    manifest = [{"w": ["torch.float32", [2], inner]}, {"note": "é"}]
    text = json.dumps(manifest, sort_keys=True)
    expected = hashlib.sha256(text.encode()).hexdigest()
    assert tensorfile.read_texts(tmp_path / "file")[tensorfile.DIGEST] == expected


def test_every_bit_counts(tmp_path):
    path = tmp_path / "file"
    tensors = {"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(3)}
    write(path, tensors, {"note": "x"})
    content = path.read_bytes()
    refused = 0
    for place in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            found, texts = read(path)
        except CorruptError:
            refused += 1
        else:  # Such as padding of another kind.
            assert same(found, tensors)
            assert texts == {"note": "x"}
    assert refused > 0.99 * 8 * len(content)
    path.write_bytes(content)
    assert same(read(path)[0], tensors)


def with_header(path, header):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    return path


ENTRY = '"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
HOSTILE = {
    "name twice": f"{{{ENTRY},{ENTRY}}}".encode(),
    "text twice": f'{{"__metadata__":{{"a":"1","a":"2"}},{ENTRY}}}'.encode(),
    "number as text": f'{{"__metadata__":{{"a":1}},{ENTRY}}}'.encode(),
    "texts as list": f'{{"__metadata__":["a"],{ENTRY}}}'.encode(),
    "list": b"[]",
    "deep": b"[" * 10**6,
    "no JSON": b"{...}",
    "no UTF-8": b'{"\xff": 1}',
    "many": json.dumps({str(i): {"dtype": "F32"} for i in range(10_001)}).encode(),
    "beyond the end": ENTRY.replace("[0,8]", "[0,80]").join("{}").encode(),
    "hole": ENTRY.replace("[0,8]", "[4,8]").replace("[2]", "[1]").join("{}").encode(),
    "overlap": f"{{{ENTRY},{ENTRY.replace('w', 'v')}}}".encode(),
    "huge shape": ENTRY.replace("[2]", "[99999999999,99999999999]").join("{}").encode(),
    "negative shape": ENTRY.replace("[2]", "[-2]").join("{}").encode(),
    "unknown dtype": ENTRY.replace("F32", "F99").join("{}").encode(),
    "no digest": ENTRY.join("{}").encode(),
    "wrong digest": f'{{"__metadata__":{{"samfn.sha256":"{"0" * 64}"}},{ENTRY}}}'.encode(),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_headers_are_refused(tmp_path, kind):
    with pytest.raises(CorruptError, match="file"):
        read(with_header(tmp_path / "file", HOSTILE[kind]))


@pytest.mark.parametrize("content", [b"", b"1234567", struct.pack("<Q", 2**63) + b"{}"])
def test_files_without_a_header_are_refused(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(CorruptError, match="expected a header of 2 to 8,388,608 bytes"):
        read(tmp_path / "file")


def test_files_of_others_are_refused_unless_asked_for(tmp_path):
    path, tensors = tmp_path / "file", {"w": torch.arange(3.0)}
    save_file(tensors, path)
    with pytest.raises(CorruptError, match="it was not written by samfn"):
        read(path)
    assert same(read(path, foreign=True)[0], tensors)
    write(path, tensors, {})  # One that can be verified is.
    assert same(read(path, foreign=True)[0], tensors)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptError, match="is damaged"):
        read(path, foreign=True)


def test_a_file_that_cannot_be_written_says_what_and_how_much(tmp_path):
    with pytest.raises(OSError, match=r"cannot write .*absent/file, 8 bytes: .*No such"):
        write(tmp_path / "absent" / "file", {"w": torch.ones(2)}, {})


def test_a_name_that_stands_twice_is_refused_even_if_both_say_the_same(tmp_path):
    path = tmp_path / "file"
    write(path, {"w": torch.tensor([1.0, 2.0])}, {})
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    once = json.dumps(header).encode()
    twice = b'{"w":' + json.dumps(header["w"]).encode() + b"," + once[1:]
    for text in (once, twice):
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
        if text is once:
            assert same(read(path)[0], {"w": torch.tensor([1.0, 2.0])})
        else:
            with pytest.raises(CorruptError, match="a name stands in it twice"):
                read(path)


def test_sparse_tensors_are_refused_by_their_names(tmp_path):
    place = torch.tensor([[0], [1]])
    sparse = torch.sparse_coo_tensor(place, torch.ones(1), (3, 3), check_invariants=True)
    with pytest.raises(TypeError, match="got sparse ones: edges"):
        tensorfile.write(tmp_path / "file", {"w": torch.ones(1), "edges": sparse}, {})
    assert not [*tmp_path.iterdir()]
