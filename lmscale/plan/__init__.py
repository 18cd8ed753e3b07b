"""The planner: parameters, FLOPs and devices, without torch."""
