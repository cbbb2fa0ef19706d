from ddpm_jax import cli

if __name__ == "__main__":
    cli.run()
