"""The clients of a served teacher."""
