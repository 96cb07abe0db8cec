"""HTTP only: every handler reads a request in, makes one call, and writes the answer out."""
