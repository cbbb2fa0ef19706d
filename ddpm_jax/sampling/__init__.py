"""Turns requests into pictures, in batches over all devices, and writes many images to files."""
