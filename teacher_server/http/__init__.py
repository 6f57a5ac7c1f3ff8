"""HTTP as such: connections, the event loop, bodies, replies."""
