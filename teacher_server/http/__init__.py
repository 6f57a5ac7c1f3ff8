"""The HTTP of the server, without a model: connections, bodies, replies, and what they share."""
