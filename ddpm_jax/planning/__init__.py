"""What a run costs: its programs compiled for a TPU slice that need not be there, or measured on the devices here.

The time of a compiled program is a roofline's (Williams et al. 2009): a step takes at least as long as each of the
chip's units is busy with it, at the unit's peak. It says what a program asks of a machine, and is no measurement of it.
"""
