"""Shardings on meshes of several shapes, and moving a state from one to another."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from ddpm_jax.runtime import parallel
from ddpm_jax.runtime.checkpoints import Checkpoints
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.training.state import create_state

MESHES = [(8, 1), (4, 2), (2, 4), (1, 8)]


@pytest.mark.parametrize(
    ("given", "shape"),
    [({}, (8, 1)), ({"fsdp": 4}, (2, 4)), ({"data": 2, "fsdp": -1}, (2, 4)), ({"data": 4, "fsdp": 2}, (4, 2))],
)
def test_mesh_shape_fills_in_what_is_left(given, shape):
    assert parallel.mesh_shape(8, **given) == shape
    assert tuple(parallel.make_mesh(**given).shape.values()) == shape


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"fsdp": 3}, "fsdp 3, which do not make up 8 devices"),
        ({"data": 2, "fsdp": 2}, "data 2 and fsdp 2, which do not make up 8"),
        ({"data": 16}, "do not make up 8"),
        ({"data": -1, "fsdp": -1}, "both -1"),
        ({"fsdp": 0}, "config.mesh.fsdp is 0"),
    ],
)
def test_mesh_shapes_refused(given, message):
    with pytest.raises(UserError, match=message):
        parallel.make_mesh(**given)


def test_given_devices_keep_their_order():
    devices = jax.devices()[::-2]
    mesh = parallel.make_mesh(fsdp=2, devices=devices)
    assert tuple(mesh.shape.values()) == (2, 2)
    assert mesh.devices.ravel().tolist() == devices
    with pytest.raises(UserError, match="do not make up 4 devices"):
        parallel.make_mesh(data=8, devices=devices)


@pytest.mark.parametrize(("size", "expected"), [(1, 8), (8, 8), (9, 16)])
def test_batches_are_rounded_up_to_the_devices(size, expected):
    assert parallel.rounded(size, parallel.make_mesh(4, 2)) == expected


def test_an_array_is_placed_as_asked():
    mesh, values = parallel.make_mesh(4, 2), np.arange(32, dtype=np.float32).reshape(16, 2)
    for sharding, rows in ((parallel.batch_sharding(mesh), 2), (parallel.replicated(mesh), 16)):
        placed = parallel.place(values, sharding)
        assert placed.sharding == sharding
        np.testing.assert_array_equal(placed, values)
        assert {len(shard.data) for shard in placed.addressable_shards} == {rows}


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((3, 3, 64, 128), (None, None, None, "fsdp")),
        ((3, 3, 128, 64), (None, None, "fsdp")),
        ((3, 3, 128, 128), (None, None, None, "fsdp")),
        ((3, 3, 64, 130), (None, None, "fsdp")),
        ((127, 3, 129), ()),  # no axis divides
        ((8, 8), ()),  # too small
        ((), ()),
    ],
)
def test_longest_axis_that_divides_is_divided(shape, spec):
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    assert parallel.state_shardings(parallel.make_mesh(fsdp=4), x).spec == PartitionSpec(*spec)
    assert parallel.state_shardings(parallel.make_mesh(), x).spec == PartitionSpec()


@pytest.mark.parametrize(("data", "fsdp"), MESHES)
@pytest.mark.parametrize("axis", [0, 1])
def test_batches_are_divided_over_all_devices(data, fsdp, axis):
    mesh = parallel.make_mesh(data, fsdp)
    rows = parallel.local_rows(mesh, 16)
    np.testing.assert_array_equal(rows, np.arange(16))
    values = np.arange(16 * 6).reshape((16, 6) if axis == 0 else (6, 16))
    placed = parallel.from_local_rows(mesh, values, rows, 16, axis)
    np.testing.assert_array_equal(placed, values)
    assert {shard.data.shape[axis] for shard in placed.addressable_shards} == {2}


@pytest.mark.eight
@pytest.mark.slow
@pytest.mark.parametrize(("data", "fsdp"), MESHES[:1] + MESHES[2:])
def test_a_state_moves_to_another_mesh(tmp_path, data, fsdp):
    def create():
        kernel = jax.random.normal(jax.random.key(0), (3, 3, 64, 64))
        return create_state({"kernel": kernel, "bias": kernel[0, 0, 0]}, optax.adam(1e-3), (0.9,))

    def laid(mesh):
        return parallel.laid(shapes, parallel.state_shardings(mesh, shapes))

    shapes = jax.eval_shape(create)
    first = laid(parallel.make_mesh(4, 2))
    state = jax.jit(create, out_shardings=jax.tree.map(lambda x: x.sharding, first))()
    assert {shard.data.shape for shard in state.params["kernel"].addressable_shards} == {(3, 3, 64, 32)}
    saved = Checkpoints(tmp_path)
    saved.save(7, state)
    saved.close()

    wanted = laid(parallel.make_mesh(data, fsdp))
    opened = Checkpoints(tmp_path)
    step, restored = opened.restore_latest(wanted)
    opened.close()
    assert step == 7
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    kernels = restored.params["kernel"], restored.ema["0.9"]["kernel"], restored.opt_state[0].mu["kernel"]
    for kernel in kernels:
        assert {shard.data.shape for shard in kernel.addressable_shards} == {(3, 3, 64, 64 // fsdp)}
