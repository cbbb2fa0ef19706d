"""What every other part stands on: devices and processes, the files of a run, progress, errors, random keys."""
