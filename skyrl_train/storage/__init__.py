"""Folders of this machine and remote ones, of which fsspec knows how to reach them."""
