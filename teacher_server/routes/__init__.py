"""The routes: each reads a request, checks and admits it, runs its jobs, and replies."""
