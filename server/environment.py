"""Names of environment variables, in a module that imports nothing."""

from __future__ import annotations

PREFIX = "MHR_"
CONFIG_FILE = "MHR_CONFIG_FILE"
# What the command line tells its client.
CLIENT_URL = "MHR_URL"
CLIENT_KEY = "MHR_API_KEY"
# Read by tests alone; the server ignores them.
TEST_PREFIX = "MHR_TEST_"
