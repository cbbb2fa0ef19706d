"""The images of a run, before anything is trained: on a machine with a network, for those that have none."""

from ml_collections import ConfigDict

from ddpm_jax.data.dataset import open_dataset
from ddpm_jax.data.sources import prepared_name, tfds_folder
from ddpm_jax.runtime import workdir as workdir_lib
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.validation import validate


def prepare(config: ConfigDict | None, workdir: str) -> None:
    """Fetches and prepares a config's images if they are not there, opens them, and prints what and where they are.

    Args:
      config: of a run; None: that of the workdir.
      workdir: of a run, if there is no config; "": none.

    Raises:
      UserError: no config, or images that cannot be had or read.
    """
    if config is None:
        if not workdir:
            raise UserError("--mode=prepare needs --config, or the --workdir of a run")
        config = workdir_lib.read_config(workdir)
    validate(config)
    source, data = open_dataset(config), config.data
    print(f"{len(source):,} images of {'x'.join(map(str, source.shape))}")
    name = prepared_name(data.source, data.name)
    if name:
        folder, _ = tfds_folder(name, data.data_dir or None)
        root = folder.parents[name.count("/") + 1]  # folder is root/name/version
        print(f"in {folder}; where there is no network: --config.data.data_dir={root}")
    elif data.path:
        print(f"in {data.path}")
