"""The servers and libraries that infermesh is measured beside: set up, started, stopped."""
