"""From what a person asks for to pictures: batches over all devices, and many images in files."""
