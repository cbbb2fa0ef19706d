"""Sources of images (`sources`), and the batches of training steps (`pipeline`)."""
