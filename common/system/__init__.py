"""Files, processes, memory and fail-points of one machine."""
