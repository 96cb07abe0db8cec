"""Python client of MHR Server."""
