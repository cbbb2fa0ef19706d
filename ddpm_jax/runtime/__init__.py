"""Foundations used everywhere: devices and processes, the files of a run, progress, errors, random keys."""
