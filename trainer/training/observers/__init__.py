"""What watches a run without changing it: trackers, the profiler, the log of phases, figures of use."""
