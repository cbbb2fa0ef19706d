"""What the command line's modes do: library calls that end in files."""
