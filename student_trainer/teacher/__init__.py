"""Clients of a served teacher."""
