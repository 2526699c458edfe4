"""The configuration: its schema, how it is loaded, and which values it may have."""
