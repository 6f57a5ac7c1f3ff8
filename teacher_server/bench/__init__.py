"""The command `bench`: a running server's tokens a second, latencies, and what limits them."""
