"""The playground: a browser page for trying a run, and its server; `--mode=serve`."""
