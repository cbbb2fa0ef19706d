import pytest

import ddpm_jax

HEAVY = "{'jax', 'flax', 'optax', 'numpy', 'PIL', 'grain', 'orbax', 'tensorflow', 'tensorflow_datasets', 'torch'}"


@pytest.mark.parametrize(
    "code", ["import ddpm_jax", "from ddpm_jax import UserError", "import ddpm_jax; dir(ddpm_jax)"]
)
def test_import_is_light(python, code):
    assert python(f"{code}\nprint(*sorted({HEAVY} & set(sys.modules)))").split() == []


BACKENDS = "from jax._src import xla_bridge\nprint(len(xla_bridge._backends))\n"


@pytest.mark.parametrize(
    "module",
    ["ddpm_jax.run", "ddpm_jax.training.loop", "ddpm_jax.config", "ddpm_jax.commands.evaluation", "configs.cifar10"],
)
def test_import_touches_no_device_and_no_tensorflow(python, module):
    assert python(f"import {module}\n{BACKENDS}").split() == ["0"]


def test_using_a_device_is_noticed(python):
    """What the test above would see."""
    assert python(f"import jax\njax.devices()\n{BACKENDS}").split() != ["0"]
    assert python("try:\n    import tensorflow\nexcept ImportError: pass\n") == "TENSORFLOW\n"


def test_importing_everything_imports_no_tensorflow_datasets(python):
    code = "from ddpm_jax import *\nprint(len({'tensorflow_datasets', 'tensorflow', 'sklearn'} & set(sys.modules)))\n"
    assert python(code + BACKENDS).split() == ["0", "0"]


@pytest.mark.parametrize("name", ddpm_jax.__all__)
def test_every_public_name_resolves(name):
    assert getattr(ddpm_jax, name).__name__ == name
    assert getattr(ddpm_jax, name).__doc__
    assert name in dir(ddpm_jax)


def test_public_names_are_imported_from_the_module():
    from ddpm_jax import UserError, make_schedule
    from ddpm_jax.diffusion import schedules
    from ddpm_jax.runtime.errors import UserError as Original

    assert UserError is Original
    assert make_schedule is schedules.make_schedule


def test_unknown_name():
    with pytest.raises(AttributeError, match="module 'ddpm_jax' has no attribute 'trian'"):
        ddpm_jax.trian  # noqa: B018
    with pytest.raises(ImportError):
        from ddpm_jax import trian  # noqa: F401
