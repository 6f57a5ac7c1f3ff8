"""Pages and charts of what runs left in their folders."""
