"""The cost of a run: its programs compiled for a TPU slice that need not be available, or measured on local devices.

The time of a compiled program comes from a roofline model (Williams et al. 2009): a step takes at least as long as each
of the chip's units needs for it at peak rate. It is a lower bound from the program's demands, not a measurement.
"""
