"""Where images come from (`sources`) and which of them make up a step (`pipeline`)."""
