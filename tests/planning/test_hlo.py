"""Memory traffic and messages in programs compiled by XLA here, and in text from the TPU compiler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from ddpm_jax.planning import hlo
from ddpm_jax.planning.hlo import Collective
from ddpm_jax.runtime import parallel


def compiled_text(function, *shapes, **options):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function, **options).lower(*arguments).compile().as_text()


class TestMemoryTraffic:
    def test_of_a_product_are_its_three_matrices(self):
        assert hlo.memory_traffic(compiled_text(jnp.matmul, (64, 128), (128, 256))) == 4 * (
            64 * 128 + 128 * 256 + 64 * 256
        )

    def test_loops_count_as_often_as_they_run(self):
        def loop(length):
            return compiled_text(
                lambda x, w: lax.scan(lambda x, _: (x @ w, None), x, length=length)[0], (256, 256), (256, 256)
            )

        ten, twenty, fifty = (hlo.memory_traffic(loop(length)) for length in (10, 20, 50))
        assert twenty - ten >= 10 * 4 * 3 * 256**2
        assert fifty - ten == 4 * (twenty - ten)

    def test_a_loop_as_the_tpus_compiler_writes_it(self):
        text = """
%body (a: (s32[], f32[256])) -> (s32[], f32[256]) {
  %a = (s32[]{:T(128)}, f32[256]{0:T(256)}) parameter(0)
  %x = f32[256]{0:T(256)} get-tuple-element(%a), index=1
  %negate = f32[256]{0:T(256)} negate(%x)
  %i = s32[]{:T(128)} get-tuple-element(%a), index=0
  ROOT %out = (s32[]{:T(128)}, f32[256]{0:T(256)}) tuple(%i, %negate)
}

%condition (b: (s32[], f32[256])) -> pred[] {
  %constant.3 = s32[]{:T(128)} constant(50)
  %b = (s32[]{:T(128)}, f32[256]{0:T(256)}) parameter(0)
  %count = s32[]{:T(128)} get-tuple-element(%b), index=0
  ROOT %lt.0 = pred[]{:T(512)} compare(%count, %constant.3), direction=LT, metadata={op_name="lt"}
}

ENTRY %main (c: (s32[], f32[256])) -> (s32[], f32[256]) {
  %c = (s32[]{:T(128)}, f32[256]{0:T(256)}) parameter(0)
  ROOT %while = (s32[]{:T(128)}, f32[256]{0:T(256)}) while(%c), condition=%condition, body=%body
}
"""
        assert hlo.memory_traffic(text) == 50 * 2 * 4 * 256

    def test_what_lies_in_the_chips_own_memory_is_left_out(self):
        # As the TPU's compiler writes: two copies and a slice into VMEM, S(1), there a sum, and its result to HBM.
        text = """
ENTRY %main (x: f32[256], y: f32[256], z: f32[512]) -> f32[256] {
  %x = f32[256]{0:T(256)} parameter(0)
  %y = f32[256]{0:T(256)} parameter(1)
  %z = f32[512]{0:T(512)} parameter(2)
  %copy-start = (f32[256]{0:T(256)S(1)}, f32[256]{0:T(256)}, u32[]{:S(2)}) copy-start(%x)
  %copy-done = f32[256]{0:T(256)S(1)} copy-done(%copy-start)
  %slice-start = ((f32[512]{0:T(512)}), f32[256]{0:T(256)S(1)}, s32[]{:S(2)}) slice-start(%z), slice={[0:256]}
  %slice-done = f32[256]{0:T(256)S(1)} slice-done(%slice-start)
  %joined = f32[256]{0:T(256)S(1)} custom-call(%slice-done), custom_call_target="ConcatBitcast"
  ROOT %fusion = f32[256]{0:T(256)} fusion(%copy-done, %joined, /*index=2*/%y), kind=kLoop, calls=%fused
}
"""
        assert hlo.memory_traffic(text) == 4 * (256 + 256 + 256 + 256)


class TestCollectives:
    """On 8 virtual devices, 4 along data and 2 along fsdp."""

    @pytest.mark.parametrize(
        ("axes", "devices", "along_data"), [(("data", "fsdp"), 8, True), ("data", 4, True), ("fsdp", 2, False)]
    )
    @pytest.mark.parametrize(
        ("kind", "message", "whole"),
        [
            ("all-reduce", lambda x, axes: lax.psum(x, axes), lambda devices: 4 * 1024),
            ("all-gather", lambda x, axes: lax.all_gather(x, axes), lambda devices: 4 * 1024 * devices),
            ("reduce-scatter", lambda x, axes: lax.psum_scatter(x, axes, tiled=True), lambda devices: 4 * 1024),
            ("all-to-all", lambda x, axes: lax.all_to_all(x, axes, 0, 0, tiled=True), lambda devices: 4 * 1024),
        ],
    )
    def test_found_in_what_xla_compiles(self, kind, message, whole, axes, devices, along_data):
        mesh = parallel.make_mesh(data=4, fsdp=2)
        function = jax.shard_map(
            lambda x: message(x, axes), mesh=mesh, in_specs=P(), out_specs=P(mesh.axis_names), check_vma=False
        )
        (found,) = hlo.parse_collectives(compiled_text(function, (1024,)), fsdp=2)
        assert found == Collective(kind, whole(devices), devices, along_data)

    def test_a_permutation(self):
        mesh = parallel.make_mesh()
        around = [(i, (i + 1) % 8) for i in range(8)]
        function = jax.shard_map(
            lambda x: lax.ppermute(x, "data", around), mesh=mesh, in_specs=P("data"), out_specs=P("data")
        )
        (found,) = hlo.parse_collectives(compiled_text(function, (1024,)))
        assert (found.kind, found.bytes, found.sent) == ("collective-permute", 512, 512)

    @pytest.mark.parametrize(
        ("groups", "devices", "along_data"),
        [
            ("{{0,1},{2,3},{4,5},{6,7}}", 2, False),
            ("[4,2]<=[8]", 2, False),
            ("[2,4]<=[4,2]T(1,0)", 4, True),
            ("mesh['x'=4,'y'=2] {'y'}", 2, False),
            ("mesh['x'=4,'y'=2] {'x'}", 4, True),
            ("mesh['x'=1,'y'=2,'z'=4], device_ids=([4,2]T(1,0)) {'y'}", 2, False),
            ("mesh['x'=1,'y'=2,'z'=4], device_ids=([4,2]T(1,0)) {'z'}", 4, True),
        ],
    )
    def test_groups_in_each_way_that_xla_writes_them(self, groups, devices, along_data):
        text = f"""
ENTRY %main (x: f32[256]) -> f32[256] {{
  %x = f32[256]{{0}} parameter(0)
  ROOT %sum = f32[256]{{0}} all-reduce(%x), channel_id=7, replica_groups={groups}, to_apply=%add
}}
"""
        assert hlo.parse_collectives(text, fsdp=2) == [Collective("all-reduce", 4 * 256, devices, along_data)]

    def test_the_gradient_of_a_divided_batch_is_reduced_once(self):
        mesh = parallel.make_mesh()
        whole, rows = parallel.replicated(mesh), parallel.batch_sharding(mesh)
        text = compiled_text(
            jax.grad(lambda w, x: jnp.sum((x @ w) ** 2)),
            (16, 32),
            (64, 16),
            in_shardings=(whole, rows),
            out_shardings=whole,
        )
        assert hlo.parse_collectives(text) == [Collective("all-reduce", 4 * 16 * 32, 8, True)]

    def test_on_one_device_there_are_none(self):
        assert hlo.parse_collectives(compiled_text(jnp.matmul, (8, 16), (16, 32))) == []

    @pytest.mark.parametrize(
        ("kind", "sent"),
        [("all-reduce", 2 * 3 / 4), ("all-gather", 3 / 4), ("reduce-scatter", 3 / 4), ("collective-permute", 1.0)],
    )
    def test_messages_go_around_a_ring(self, kind, sent):
        assert Collective(kind, 80.0, 4).sent == 80.0 * sent

    def test_a_longer_data_axis_lengthens_its_messages_alone(self):
        inner, across = Collective("all-gather", 1.0, 2, along_data=False), Collective("all-reduce", 1.0, 4)
        assert hlo.on_more_chips([inner, across], 8) == (inner, Collective("all-reduce", 1.0, 32))


def test_an_analysis_holds_together():
    mesh = parallel.make_mesh()
    whole, rows = parallel.replicated(mesh), parallel.batch_sharding(mesh)
    step = jax.jit(
        lambda w, x: w - jax.grad(lambda w: jnp.sum((x @ w) ** 2))(w), in_shardings=(whole, rows), out_shardings=whole
    )
    shapes = jax.ShapeDtypeStruct((16, 32), np.float32), jax.ShapeDtypeStruct((64, 16), np.float32)
    program = hlo.analyse(step.lower(*shapes).compile(), 1000.0)
    state = 4 * (16 * 32 + 8 * 16 + 16 * 32)
    assert program.state_traffic == state
    assert program.peak_memory >= state
    assert program.traffic >= state
    assert program.messages == 1
    half = program.over(2)
    assert (half.flops, half.traffic, half.messages) == (500.0, program.traffic / 2, 0.5)
    assert half.collectives[0].bytes == program.collectives[0].bytes / 2
    assert half.peak_memory == program.peak_memory
