"""The benchmarks, each a module with a table and one line of JSON."""
