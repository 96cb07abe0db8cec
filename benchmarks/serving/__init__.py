"""What the benchmark over HTTP is made of: servers, contenders, the load they get, and the scenarios."""
