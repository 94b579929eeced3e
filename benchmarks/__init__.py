"""Measurements against other libraries. Not part of the package; needs `pip install saekit[bench]`."""
