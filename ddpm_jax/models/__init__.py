"""The networks: the UNet, its blocks, the layers that make it fast, and the text encoders."""
