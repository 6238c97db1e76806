"""Sets, grids and trajectories of samples."""
