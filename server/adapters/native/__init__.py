"""The compiled operator: its C++ source, and once the package is installed its library."""
