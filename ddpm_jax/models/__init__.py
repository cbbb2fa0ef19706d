"""The network: the UNet, its blocks, and the layers that make it fast."""
