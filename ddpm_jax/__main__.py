from absl import flags

from ddpm_jax import cli

__doc__ = cli.__doc__  # what --help begins with
flags.adopt_module_key_flags(cli)

if __name__ == "__main__":
    cli.run()
