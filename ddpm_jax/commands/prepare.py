"""The images of a run, fetched and checked before training, for machines that have no network."""

from ml_collections import ConfigDict

from ddpm_jax.data.dataset import open_dataset
from ddpm_jax.data.prepared import prepared_name, tfds_folder
from ddpm_jax.runtime import workdir as workdir_lib
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.validation import validate


def prepare(config: ConfigDict | None, workdir: str) -> None:
    """Downloads and prepares a config's images unless that was done before, opens them, and prints their number, size
    and place.

    Args:
      config: of a run; None: the one in the workdir.
      workdir: of a run, if there is no config; "": none.

    Raises:
      UserError: no config, or images that cannot be downloaded or read.
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
        print(f"in {folder}; on a machine without a network, train with --config.data.data_dir={root}")
    elif data.path:
        print(f"in {data.path}")
