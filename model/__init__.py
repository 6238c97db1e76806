"""Processes, networks and samplers."""
