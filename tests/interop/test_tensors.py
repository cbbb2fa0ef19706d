import json
import pickle
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from folders import refusal

from ddpm_jax.interop import tensors as tensors_lib
from ddpm_jax.runtime.errors import UserError

TENSORS = {"b.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.array(2.5, np.float32)}


def test_written_and_read(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors_lib.write(path, {**TENSORS, "b.weight": np.asfortranarray(TENSORS["b.weight"])})
    found = tensors_lib.read(path)
    assert found.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        np.testing.assert_array_equal(found[name], value)
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("keep", [0, 3, 60, -1])
def test_truncated_file(tmp_path, suffix, keep):
    path = tmp_path / f"x{suffix}"
    if suffix == ".safetensors":
        tensors_lib.write(path, TENSORS)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x/data.pkl", pickle.dumps({}))
    path.write_bytes(path.read_bytes()[:keep])
    assert str(path) in refusal(tensors_lib.read, path)


def test_missing_file(tmp_path):
    assert "is not a file" in refusal(tensors_lib.read, tmp_path / "x.safetensors")


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_in_a_pickle_is_not_run(tmp_path):
    path, victim = tmp_path / "x.bin", tmp_path / "victim"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps({"a": Harmful(victim)}))
    pickle.loads(pickle.dumps(Harmful(tmp_path / "other"))).close()
    assert (tmp_path / "other").exists(), "what would have happened"
    assert "open, which is not a tensor and is not run" in refusal(tensors_lib.read, path)
    assert not victim.exists()


@pytest.mark.parametrize("content", [{"a": 1}, [1, 2], 3])
def test_pickle_of_something_else(tmp_path, content):
    path = tmp_path / "x.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps(content))
    assert "something other than named tensors" in refusal(tensors_lib.read, path)


@pytest.mark.peers
@pytest.mark.parametrize("legacy", [False, True])
def test_pickles_of_pytorch(tmp_path, legacy):
    """Views, shared storages and parameters, as PyTorch itself reads them."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed (pip install -e '.[peers]')")
    base = torch.arange(24.0).reshape(4, 6)
    saved = {
        "whole": base,
        "view": base[1:3, ::2],
        "transposed": base.T,
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 3),
        "integers": torch.arange(5),
        "half": torch.arange(3.0).half(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    torch.save(saved, tmp_path / "x.bin", _use_new_zipfile_serialization=not legacy)
    found = tensors_lib.read(tmp_path / "x.bin")
    assert found.keys() == saved.keys()
    for name, value in saved.items():
        expected = value.detach().numpy()
        np.testing.assert_array_equal(found[name], expected)
        assert found[name].dtype == expected.dtype


STORAGE = b"(Vstorage\nctorch\nFloatStorage\nV0\nVcpu\nI4\ntQ"


def integers(*values):
    return b"(" + b"".join(b"I%d\n" % value for value in values) + b"t"


def tensor(source, offset, size, stride):
    """As PyTorch writes one, in pickle's oldest protocol."""
    return b"ctorch._utils\n_rebuild_tensor_v2\n(%bI%d\n%b%btR" % (source, offset, integers(*size), integers(*stride))


def write_pickled(path, value, key=b"Va\n", compress=zipfile.ZIP_STORED):
    """{key: value} beside four numbers of data."""
    with zipfile.ZipFile(path, "w", compress) as archive:
        archive.writestr("x/data.pkl", b"(d" + key + value + b"s.")
        archive.writestr("x/data/0", np.arange(4, dtype=np.float32).tobytes())


def test_tensor_of_a_storage(tmp_path):
    """The valid file that the refusals below modify slightly."""
    write_pickled(tmp_path / "x.bin", tensor(STORAGE, 1, (3,), (1,)))
    np.testing.assert_array_equal(tensors_lib.read(tmp_path / "x.bin")["a"], [1, 2, 3])


@pytest.mark.parametrize(
    ("value", "options", "said"),
    [
        (tensor(STORAGE, 1, (4,), (1,)), {}, "larger than its data"),
        (tensor(STORAGE, -1, (2,), (1,)), {}, "larger than its data"),
        (tensor(STORAGE, 0, (10**12,), (0,)), {}, "larger than its data"),
        (tensor(tensor(STORAGE, 0, (10**12, 0), (0, 0)), 0, (9,), (1,)), {}, "does not refer to raw data"),
        (tensor(STORAGE, 0, (2,), (1,)), {"key": b"I0\n"}, "other than named tensors"),
        (tensor(STORAGE, 0, (2,), (1,)), {"compress": zipfile.ZIP_DEFLATED}, "it is compressed"),
    ],
)
def test_pickled_tensors_that_lie(tmp_path, value, options, said):
    write_pickled(tmp_path / "x.bin", value, **options)
    assert said in refusal(tensors_lib.read, tmp_path / "x.bin")


WANTED = {"a": (), "b.weight": (2, 3)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"a": None}, "no tensor 'a'"),
        ({"c": np.zeros(1, np.float32)}, "has a tensor 'c'"),
        ({"a": np.zeros(2, np.float32)}, "'a' in 'file' has shape (2,); accepted: ()"),
        ({"b.weight": TENSORS["b.weight"].astype(np.float16)}, "'b.weight' in 'file' is float16; accepted: float32"),
    ],
)
def test_check(change, said):
    tensors = {name: value for name, value in (TENSORS | change).items() if value is not None}
    if said is None:
        tensors_lib.check("file", tensors, WANTED)
    else:
        assert said in refusal(tensors_lib.check, "file", tensors, WANTED)


# The weights of a folder.

NAMES = ("net.safetensors", "other.bin")


def write_shards(folder, tensors, index):
    """Each tensor in a file of its own."""
    files = {name: f"net-{i}-of-{len(tensors)}.safetensors" for i, name in enumerate(sorted(tensors))}
    for name, file in files.items():
        tensors_lib.write(folder / file, {name: tensors[name]})
    (folder / index).write_text(json.dumps({"weight_map": files}))
    return [folder / file for file in files.values()]


def write_any(path, value):
    """A file of weights, or an index with shards, of one tensor of one value."""
    if path.suffix == ".safetensors":
        tensors_lib.write(path, {"a": np.float32(value)})
    elif path.suffix == ".bin":
        write_pickled(path, tensor(STORAGE, value, (), ()))
    else:
        shard = f"shard-{value}.safetensors"
        tensors_lib.write(path.with_name(shard), {"a": np.float32(value)})
        path.write_text(json.dumps({"weight_map": {"a": shard}}))


def test_which_weights_are_read(tmp_path):
    """From the last choice to the first, adding one file at a time."""
    last, first = ("other.bf16.bin", "net.safetensors.index.bf16.json"), ("net.safetensors.index.json", NAMES[0])
    half = ("other.bin.index.fp16.json", "other.fp16.bin", "net.safetensors.index.fp16.json", "net.fp16.safetensors")
    for i, name in enumerate([*last, *half, "other.bin.index.json", "other.bin", *first]):
        write_any(tmp_path / name, i % 4)
        path, tensors = tensors_lib.read_weights(tmp_path, NAMES)
        assert (path.name, float(tensors["a"])) == (name, i % 4)


def test_weights_in_shards(tmp_path):
    files = write_shards(tmp_path, TENSORS, "net.safetensors.index.json")
    path, tensors = tensors_lib.read_weights(str(tmp_path), NAMES)
    assert path == tmp_path / "net.safetensors.index.json"
    assert tensors.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        np.testing.assert_array_equal(tensors[name], value)
    files[1].write_bytes(files[1].read_bytes()[:-1])
    assert refusal(tensors_lib.read_weights, tmp_path, NAMES).startswith(f"{str(files[1])!r} cannot be read: ")
    files[1].unlink()
    assert refusal(tensors_lib.read_weights, tmp_path, NAMES) == f"{str(files[1])!r} is not a file"


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ("{}", "has no weight_map from tensor names to files"),
        ('{"weight_map": {"a": 1}}', "has no weight_map from tensor names to files"),
        ('{"weight_map": {"a": "../a.safetensors"}}', "names '../a.safetensors'; accepted: files in the same folder"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "names '/etc/passwd'; accepted: files in the same folder"),
        ("{", "is not valid JSON"),
    ],
)
def test_refused_index(tmp_path, index, said):
    (tmp_path / "net.safetensors.index.json").write_text(index)
    assert said in refusal(tensors_lib.read_weights, tmp_path, NAMES)


def test_folder_without_weights(tmp_path):
    (tmp_path / "net.non_ema.safetensors").touch()
    assert refusal(tensors_lib.read_weights, tmp_path, NAMES) == (
        f"{str(tmp_path)!r} has no weights; accepted: net.safetensors or other.bin, in one file or shards, or their "
        "fp16 or bf16 variant"
    )


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_half_precision_becomes_float32(dtype):
    kept = {"b": np.arange(3), "c": np.ones(2), "d": np.ones(2, np.float32)}
    found = tensors_lib.to_float32({"a": np.array([1 / 3, 2.0]).astype(dtype), **kept})
    assert [value.dtype for value in found.values()] == [np.float32, np.int64, np.float64, np.float32]
    np.testing.assert_array_equal(found["a"], np.array([1 / 3, 2.0]).astype(dtype).astype(np.float64))


# Files of PyTorch before 1.6.


def legacy(value, *, magic=0x1950A86A20F9469CFC6C, version=1001, little=True, keys=("0",), count=4, size=4):
    """{"a": value} and behind it the storages' data, four numbers each."""
    head = b"".join(pickle.dumps(part, 2) for part in (magic, version, {"little_endian": little}))
    data = [count.to_bytes(8, "little", signed=True) + np.arange(size, dtype=np.float32).tobytes() for _ in keys]
    return head + b"(dVa\n" + value + b"s." + pickle.dumps(list(keys), 2) + b"".join(data)


def legacy_storage(key="0", count=4, view=None, name="storage"):
    told = b"N" if view is None else b"(V%s\nI%d\nI%d\nt" % (view[0].encode(), view[1], view[2])
    return b"(V%s\nctorch\nFloatStorage\nV%s\nVcpu\nI%d\n%btQ" % (name.encode(), key.encode(), count, told)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (tensor(legacy_storage(), 1, (3,), (1,)), [1, 2, 3]),
        (tensor(legacy_storage(), 0, (2, 2), (1, 2)), [[0, 2], [1, 3]]),
        (tensor(legacy_storage(view=("v", 1, 2)), 0, (2,), (1,)), [1, 2]),
    ],
)
def test_legacy_file(tmp_path, value, expected):
    (tmp_path / "x.pth").write_bytes(legacy(value))
    np.testing.assert_array_equal(tensors_lib.read(tmp_path / "x.pth")["a"], expected)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (legacy(tensor(legacy_storage(), 1, (3,), (1,)))[:-1], "a tensor's data are truncated"),
        (legacy(tensor(legacy_storage(), 1, (3,), (1,)))[:-24], "do not have the stated length, or are truncated"),
        (legacy(tensor(legacy_storage(), 1, (3,), (1,)))[:60], ""),
        (legacy(tensor(legacy_storage(), 2, (3,), (1,))), "a tensor is larger than its data"),
        (legacy(tensor(legacy_storage(view=("v", 3, 2)), 0, (2,), (1,))), "a tensor is larger than its data"),
        (legacy(tensor(legacy_storage(), 0, (1,), (1,)), count=-1), "do not have the stated length"),
        (legacy(tensor(legacy_storage(), 0, (1,), (1,)), keys=()), "a tensor's data are missing"),
        (legacy(tensor(legacy_storage(), 0, (1,), (1,)), magic=1), "it is not a PyTorch file"),
        (legacy(tensor(legacy_storage(), 0, (1,), (1,)), version=1), "it is not a PyTorch file"),
        (legacy(tensor(legacy_storage(), 0, (1,), (1,)), little=False), "big-endian"),
        (legacy(legacy_storage(name="module")), "it contains a module, which is not a tensor"),
        (legacy(legacy_storage()), "something other than named tensors"),
        (legacy(b"cbuiltins\nopen\n"), "builtins.open, which is not a tensor"),
        (b"PK\3\4 and no more", "it is not a PyTorch file, or it is truncated"),
    ],
)
def test_refused_legacy_file(tmp_path, content, said):
    (tmp_path / "x.pth").write_bytes(content)
    assert said in refusal(tensors_lib.read, tmp_path / "x.pth")


# Training checkpoints.


def pickled(*items):
    """A hand-written pickle, in the oldest protocol, with these keys and values."""
    return b"(d" + b"".join(b"V%s\n%bs" % (key.encode(), value) for key, value in items) + b"."


TENSOR = tensor(STORAGE, 0, (4,), (1,))
CALLBACKS = b"(dcpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n(dVbest\nF0.5\nss"


def write_checkpoint(path, content):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", content)
        archive.writestr("x/data/0", np.arange(4, dtype=np.float32).tobytes())


@pytest.mark.parametrize(
    "others",
    [
        [],
        [("epoch", b"I3\n"), ("global_step", b"I875000\n"), ("pytorch-lightning_version", b"V1.4\n")],
        [("callbacks", CALLBACKS)],
        [("hyper", b"comegaconf.dictconfig\nDictConfig\n)R(dVa\nI1\nsb")],
        [("hyper", b"comegaconf.listconfig\nListConfig\n)RI1\naVa\nI1\ns")],
        [("loss", b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(Vf8\ntRVxx\ntR")],
        [("kinds", b"c__builtin__\nset\n((lI1\natR")],
        [("optimizer_states", b"(l(dVa\n%bsa" % TENSOR)],
    ],
)
def test_what_lies_beside_the_weights_is_skipped(tmp_path, others):
    for nested in (True, False):
        weights = [("state_dict", b"(dVa\n%bs" % TENSOR)] if nested else [("a", TENSOR)]
        write_checkpoint(tmp_path / "x.ckpt", pickled(*others, *weights))
        found = tensors_lib.read_checkpoint(tmp_path / "x.ckpt")
        assert list(found) == ["a"]
        np.testing.assert_array_equal(found["a"], np.arange(4))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (pickled(("a", TENSOR), ("b", b"cos\nsystem\n(Vtrue\ntR")), "os.system, which is not a tensor and is not run"),
        (pickled(("a", TENSOR), ("b", b"c__builtin__\neval\n(V1\ntR")), "eval, which is not a tensor"),
        (pickled(("a", TENSOR), ("b", b"cnumpyx\nload\n(V1\ntR")), "numpyx.load, which is not a tensor"),
        (pickled(("a", TENSOR.replace(b"FloatStorage", b"QInt8Storage"))), "torch.QInt8Storage, which is not a tensor"),
        (pickled(("a", b"I1\n")), "no named tensors"),
        (pickled(("state_dict", b"I1\n")), "other than named tensors"),
        (b"(l.", "no named tensors"),
        (b"(dI1\n%bs." % TENSOR, "other than named tensors"),
    ],
)
def test_refused_checkpoints(tmp_path, content, said):
    write_checkpoint(tmp_path / "x.ckpt", content)
    with pytest.raises(UserError) as caught:
        tensors_lib.read_checkpoint(tmp_path / "x.ckpt")
    assert said in str(caught.value)
