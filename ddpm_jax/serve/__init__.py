"""The playground: a page in the browser on a run, and the server behind it; `--mode=serve`."""
