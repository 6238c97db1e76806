"""The ground: errors, files, processes. Imports nothing of the project."""
